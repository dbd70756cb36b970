// What goes to the server. A verdict is put into this browser's outbox first and leaves it only when the server says that it is saved,
// or that it never will be. Its id is chosen here, so that sending it twice saves it once.
import * as kept from "./kept.js";

const token = document.querySelector('meta[name="csrf"]')?.content || "";
const TRY_AGAIN = new Set([408, 425, 429, 500, 502, 503, 504, 507]);

export class Trouble extends Error {
  constructor(status, body) {
    super(body?.error || "Something went wrong.");
    this.status = status;
    this.reason = body?.reason || "";
    this.body = body;
  }
  get passing() {
    return this.status === 0 || TRY_AGAIN.has(this.status);
  }
}

export async function post(path, value = {}) {
  const body = JSON.stringify(value);
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST", credentials: "same-origin", keepalive: body.length < 15000, // browsers refuse more than 64 KiB of bytes
      headers: { "content-type": "application/json", "x-csrf-token": token }, body,
    });
  } catch {
    throw new Trouble(0, { error: "The server cannot be reached." });
  }
  const found = await answer.json().catch(() => null);
  if (!answer.ok) throw new Trouble(answer.status, found);
  return found;
}

export function fresh() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // pages over plain HTTP have no randomUUID
  bytes[6] = (bytes[6] & 15) | 64;
  bytes[8] = (bytes[8] & 63) | 128;
  const hex = Array.from(bytes, (one) => one.toString(16).padStart(2, "0")).join("");
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`;
}

export const waiting = () => kept.load("outbox", []);

/** Puts a verdict into the outbox; returns whether it outlives the page there. */
export function put(verdict) {
  return kept.save("outbox", [...waiting().filter((one) => one.id !== verdict.id), verdict]);
}

const remove = (id) => kept.save("outbox", waiting().filter((one) => one.id !== id));
const pause = (ms) =>
  new Promise((done) => {
    const finish = () => {
      clearTimeout(timer);
      removeEventListener("online", finish);
      done();
    };
    const timer = setTimeout(finish, ms);
    addEventListener("online", finish);
  });

/**
 * Sends a verdict of the outbox until the server answers for good. `tell(trouble)` hears of each try that failed.
 * Returns the server's answer; throws Trouble where it refused (the verdict has left the outbox) or the session is over (it has not).
 */
export async function deliver(verdict, tell = () => {}) {
  for (let wait = 1000; ; wait = Math.min(wait * 2, 30000)) {
    try {
      const answer = await post("/api/verdicts", verdict);
      remove(verdict.id);
      return answer;
    } catch (trouble) {
      if (!(trouble instanceof Trouble)) throw trouble;
      if (trouble.status === 401 || trouble.reason === "csrf") throw trouble;
      if (!trouble.passing) {
        remove(verdict.id);
        throw trouble;
      }
      tell(trouble);
      await pause(wait * (0.75 + Math.random() / 2));
    }
  }
}
