// The work page: asks the server for an item, shows it, sends the answer, and goes on with the item that comes back with it.
import { accept, label, rate } from "./choices.js";
import { clock } from "./clock.js";
import { compare } from "./compare.js";
import { el, find } from "./dom.js";
import { edit } from "./edit.js";
import { countOne, earlier, finished, showGuideline, showProgress } from "./frame.js";
import * as kept from "./kept.js";
import { flagPanel, isOpen, keysPanel, opened, skipPanel } from "./panels.js";
import { span } from "./span.js";
import { Trouble, deliver, fresh, post, put, waiting } from "./wire.js";

const KINDS = { label, span, rate, compare, edit, accept };
const task = JSON.parse(find("#task").textContent);
const stage = find("#stage"), answers = find("#answers"), status = find("#status"), spoken = find("#spoken");
const time = clock();
let item = null; // what is shown
let part = { keys: {} }; // what its kind made of it
let busy = false;
let draftTimer = 0;

const draftKey = () => `draft:${item.item}:${task.corrects || ""}`;

/** Says something: in the status line, or, with `quiet`, to screen readers alone. */
function say(text, trouble = false, quiet = false) {
  if (quiet) {
    spoken.textContent = text;
    return;
  }
  tell(text, trouble ? "trouble" : "");
}

function tell(text, state) {
  status.textContent = text;
  status.dataset.state = state;
}

function show(next, words) {
  part.dispose?.();
  item = next;
  stage.replaceChildren();
  answers.replaceChildren();
  answers.hidden = find("#flag").disabled = find("#skip").disabled = item === null;
  if (item === null) {
    part = { keys: {} };
    stage.append(finished(task));
    stage.focus({ preventScroll: true });
    return;
  }
  if (task.name !== item.task) return location.assign(`/work/${encodeURIComponent(item.task)}`);
  const draft = kept.load(draftKey());
  const work = { task, item, stage, answers, send, say, former: draft || item.former || null, draft: saveDraft };
  if (item.adjudicates) stage.append(earlier(item, task));
  part = KINDS[task.kind](work);
  part.keys = Object.fromEntries(Object.entries(part.keys).map(([key, act]) => [key.toLowerCase(), act]));
  keysPanel([...part.help, ["F", "flag: bias, privacy, harm, …"], ["S", "skip"], ["U", "undo the last answer"], ["G", "guideline, shown or hidden"], ["Esc", "leave a text or a panel"], ["?", "this list"]]);
  if (draft) say("Your draft is back.");
  if (words) say(words);
  stage.classList.remove("fresh");
  requestAnimationFrame(() => stage.classList.add("fresh"));
  scrollTo(0, 0);
  stage.focus({ preventScroll: true });
  part.start?.();
  showGuideline(item.guideline, say);
  time.restart();
}

function saveDraft(answer) {
  clearTimeout(draftTimer);
  const key = draftKey();
  draftTimer = setTimeout(() => kept.save(key, answer), 250);
}

function hold(on) {
  busy = on;
  document.body.toggleAttribute("data-busy", on);
  stage.setAttribute("aria-busy", String(on));
  for (const button of answers.querySelectorAll("button")) button.disabled = on;
}

async function send(kind, answer) {
  if (busy || !item) return;
  const verdict = { id: fresh(), item: item.item, task: task.name, kind, answer, seconds: time.seconds(), supersedes: kind === task.kind || kind === "skip" ? task.corrects || "" : "" };
  if (kind !== "flag") clearTimeout(draftTimer);
  const survives = put(verdict);
  hold(true);
  const late = setTimeout(() => tell("Saving …", ""), 300);
  try {
    const found = await deliver(verdict, (trouble) => {
      clearTimeout(late);
      const where = survives ? "kept in this browser" : "kept on this page: leave it open";
      tell(trouble.status === 507 ? `Not saved: the server's disk is full. Your answer is ${where} and sent again.` : `Waiting to send. Your answer is ${where}.`, "waiting");
    });
    clearTimeout(late);
    hold(false);
    if (kind !== "flag") kept.drop(draftKey());
    if (kind === "flag") return tell("Flag saved. You can still answer.", "saved");
    if (task.corrects) return location.assign("/history?changed=1");
    if (!("next" in found)) return next("");
    if (!found.progress) countOne(kind !== "skip");
    took(found, "Saved");
  } catch (trouble) {
    clearTimeout(late);
    hold(false);
    await refused(trouble, kind);
  }
}

function took(found, words) {
  if (found.progress) showProgress(found.progress);
  show(found.next, "");
  tell(words, "saved");
}

/** The server said no for good: say why, and go on where that helps. */
async function refused(trouble, kind) {
  if (!(trouble instanceof Trouble)) throw trouble;
  if (trouble.status === 401) return signedOut();
  if (trouble.reason === "csrf") return tell("This page is from an earlier sign-in. Load it again; your answer is kept in this browser.", "trouble");
  if ([404, 409].includes(trouble.status) && kind !== "flag" && !task.corrects) {
    kept.drop(draftKey());
    await next(trouble.message);
    return;
  }
  tell(trouble.message, "trouble");
}

function signedOut() {
  tell("", "trouble");
  status.append("You are signed out. Your answers are kept in this browser. ", el("a", { href: `/sign-in?to=${encodeURIComponent(location.pathname)}` }, "Sign in again"));
}

async function next(words = "") {
  if (task.corrects) return;
  for (let wait = 1000; ; wait = Math.min(wait * 2, 30000)) {
    try {
      const found = await post("/api/next", { task: task.name });
      showProgress(found.progress);
      show(found.next);
      if (words) tell(words, "trouble");
      return;
    } catch (trouble) {
      if (!(trouble instanceof Trouble)) throw trouble;
      if (trouble.status === 401) return signedOut();
      tell(trouble.message, trouble.passing ? "waiting" : "trouble");
      if (!trouble.passing) return;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

async function undo() {
  if (busy || task.corrects) return;
  hold(true);
  try {
    const found = await post("/api/undo", { task: task.name });
    hold(false);
    if (!found.undone) return say("There is nothing to undo.");
    if (found.next && found.next.task !== task.name) return location.assign(`/work/${encodeURIComponent(found.next.task)}`);
    if (found.kind === "flag") return say("The flag is taken back.");
    if (found.next) kept.drop(`draft:${found.next.item}:`);
    took(found, "Taken back: answer again");
  } catch (trouble) {
    hold(false);
    if (trouble.status === 401) return signedOut();
    say(trouble.message, true);
  }
}

/** Answers that an earlier page could not send. */
async function flush() {
  for (const verdict of waiting()) {
    tell(`Sending ${waiting().length} kept answers …`, "waiting");
    try {
      await deliver(verdict, () => tell(`Waiting to send ${waiting().length} kept answers.`, "waiting"));
      if (verdict.kind !== "flag") kept.drop(`draft:${verdict.item}:${verdict.supersedes}`); // a flag is beside the answer
      tell("Kept answers saved", "saved");
    } catch (trouble) {
      if (trouble.status === 401) return signedOut();
      tell(`A kept answer was not taken: ${trouble.message}`, "trouble");
    }
  }
}

const flag = flagPanel(task, (flags) => send("flag", { flags }));
const skip = skipPanel((reason) => send("skip", { reason }));
const guide = find("#guide");
const everywhere = {
  f: () => item && flag(), s: () => item && skip(), u: undo, "?": () => opened("#keys-dialog"),
  g: () => {
    guide.open = !guide.open;
    if (guide.open) guide.querySelector("summary").focus();
  },
};
for (const [id, act] of [["#flag", everywhere.f], ["#skip", everywhere.s], ["#undo", everywhere.u], ["#keys", everywhere["?"]]]) find(id).addEventListener("click", act);

const single = find("#single-keys");
single.checked = kept.load("single-keys", true);
single.addEventListener("change", () => kept.save("single-keys", single.checked));

function keyOf(event) {
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) return `ctrl+${key}`;
  if (event.altKey) return `alt+${key}`;
  return event.shiftKey && key.startsWith("arrow") ? `shift+${key}` : key;
}

document.addEventListener("keydown", (event) => {
  if (isOpen() || event.defaultPrevented || event.isComposing || event.repeat && !event.key.startsWith("Arrow")) return;
  const writes = event.target.matches("textarea, select, input:not([type=checkbox])");
  const key = keyOf(event);
  if (key === "escape" && writes) return stage.focus();
  const modified = key.startsWith("ctrl+") || key.startsWith("alt+");
  if (writes && !modified) return;
  if (key === "enter" && event.target.closest("button, a, summary")) return;
  if (!single.checked && !modified && (key.length === 1)) return;
  const act = part.keys[key] || (key === "ctrl+z" && !writes ? undo : null) || everywhere[key];
  if (!act) return;
  event.preventDefault();
  act();
});

const every = Math.max(5, task.lease_seconds / 3) * 1000;
setInterval(async () => {
  if (!item || busy || document.hidden || task.corrects) return;
  try {
    const { held } = await post("/api/renew", { item: item.item });
    if (!held) say("This item was open for long and others may be asked now. You can still answer.");
  } catch {
    // the answer itself will say it
  }
}, every);

for (const link of document.querySelectorAll(".top a")) {
  link.addEventListener("click", () => {
    if (item && !task.corrects && !waiting().length) post("/api/release", { item: item.item }).catch(() => {}); // the page is left: others may be asked
  });
}

if (innerWidth < 960) guide.open = false;
if (task.corrects) show(task.item);
else flush().finally(() => next(status.dataset.state === "trouble" ? status.textContent : ""));
