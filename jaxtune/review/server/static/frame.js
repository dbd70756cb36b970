// What stands around the item: progress, guideline, what others said, the end.
import { el, find } from "./dom.js";

const minutes = (seconds) => (seconds < 90 ? "about a minute" : seconds < 5400 ? `about ${Math.round(seconds / 60)} minutes` : `about ${(seconds / 3600).toFixed(1)} hours`);

export function showProgress(progress) {
  const bar = find("#bar"), of = progress.done + progress.left;
  bar.max = Math.max(of, 1);
  bar.value = progress.done;
  find("#progress-text").textContent = `${progress.done} of ${of} done` + (progress.left && progress.seconds_left ? ` · ${minutes(progress.seconds_left)} left` : "");
}

let version = Number(find("#guide").dataset.number);

/** The guideline in force, where it is another than the one shown. */
export async function showGuideline(number, say) {
  if (number === version) return;
  const first = version === 0;
  version = number;
  const answer = await fetch(`/api/guidelines/${number}`, { credentials: "same-origin" });
  if (!answer.ok) return;
  const { html, version: of } = await answer.json();
  const made = new DOMParser().parseFromString(html, "text/html"); // rendered by the server, which lets no markup of the text through
  find("#guide-text").replaceChildren(...made.body.childNodes);
  find("#guide-version").textContent = `version ${of}`;
  if (!first) {
    find("#guide").open = true;
    say("The guideline has changed.");
  }
}

export function earlier(item, task) {
  const lines = item.earlier.map((one, index) => el("li", {}, el("strong", {}, `Expert ${index + 1}: `), said(one, item, task)));
  return el("section", { class: "block prompt" }, el("h2", {}, "Experts disagree here. You settle it."), el("ul", { class: "earlier" }, ...lines));
}

function said({ answer }, item) {
  if (answer.labels) return answer.labels.join(", ") || "no label";
  if (answer.spans) return answer.spans.map((one) => `${one.label}: “${Array.from(item.payload.text).slice(one.start, one.end).join("")}”`).join(" · ") || "nothing marked";
  if (answer.rating !== undefined) return String(answer.rating);
  if (answer.order) return (answer.bad ? "none is good" : answer.order.length === 1 ? "equally good" : answer.order.map((group) => group.map((id) => `Answer ${id}`).join(" = ")).join(", then "));
  if (answer.accept !== undefined) return answer.accept ? "accept" : `reject${answer.reason ? `: ${answer.reason}` : ""}`;
  return el("div", { class: "text" }, answer.text);
}

export function finished(task) {
  return el("section", { class: "block finished" }, el("h2", {}, "All done"), el("p", {}, "Nothing is left for you in this task. Thank you."),
    el("p", {}, el("a", { class: "button primary", href: "/" }, "To my tasks")), el("p", { class: "muted small" }, "Undo takes your last answer back."));
}
