// Marking passages, by mouse, by touch, or by keys. The browser's own selection says what is chosen; places are counted in
// characters (code points), as the server counts them.
import { asked, choice, el } from "./dom.js";

const points = (text, units) => Array.from(text.slice(0, units)).length;
const units = (text, points) => Array.from(text).slice(0, points).join("").length;
const WORD = /[\p{L}\p{M}\p{N}_]+(?:['’.-][\p{L}\p{M}\p{N}_]+)*/gu; // \p{M}: vowel signs, accents of their own

export function span(work) {
  const { task, item, stage, answers } = work;
  const text = item.payload.text;
  let spans = (work.former?.spans || item.prelabel?.spans || []).map((one) => ({ start: units(text, one.start), end: units(text, one.end), label: one.label }));
  stage.append(...asked({ ...item.payload, text: undefined }));
  const box = el("div", { class: "text span-text", id: "span-text", tabindex: "0", role: "group", "aria-label": "Text to mark", "aria-describedby": "span-help" });
  const list = el("ul", { class: "spans", "aria-label": "Marked passages" });
  stage.append(
    el("section", { class: "block" }, el("h2", {}, "Text", item.prelabel?.spans && !work.former ? el("span", { class: "tag warn" }, "marked by a model: check each passage") : null), box,
      el("p", { class: "muted small", id: "span-help" }, "Choose a passage with the mouse, or with ← → and Shift, then a label.")),
    el("section", { class: "block" }, el("h2", {}, "Marked passages"), list),
  );
  const place = placed(box);
  let chosen = null; // what was last chosen, in UTF-16 units; touching a button may take the browser's selection away
  const onSelect = () => {
    const now = place.read();
    if (now) chosen = now;
  };
  document.addEventListener("selectionchange", onSelect);

  const save = () => work.draft({ spans: given() });
  const given = () => spans.map((one) => ({ start: points(text, one.start), end: points(text, one.end), label: one.label }));
  const draw = () => {
    paint(box, text, spans, task.labels);
    list.replaceChildren(...spans.map((one, index) => line(one, index)));
    if (!spans.length) list.replaceChildren(el("li", { class: "muted" }, "None. If there is nothing to mark, send it as it is."));
  };
  const line = (one, index) =>
    el("li", {}, el("span", { class: `swatch c${(task.labels.indexOf(one.label) % 9) + 1}`, "aria-hidden": "true" }), el("strong", {}, one.label), el("q", {}, text.slice(one.start, one.end)),
      el("button", { type: "button", class: "compact", "aria-label": `Remove ${one.label}: ${text.slice(one.start, one.end)}`, onclick: () => remove(index) }, "Remove"));
  const remove = (index) => {
    const [gone] = spans.splice(index, 1);
    draw();
    save();
    box.focus();
    work.say(`Removed: ${gone.label}.`);
  };
  const mark = (label) => () => {
    const now = trimmed(text, place.read() || chosen);
    if (!now) return work.say("Choose a passage first.", true);
    if (spans.some((one) => one.start === now.start && one.end === now.end && one.label === label)) return work.say("It is marked so already.");
    spans = [...spans, { ...now, label }].sort((a, b) => a.start - b.start || a.end - b.end);
    chosen = null;
    draw();
    save();
    place.write(now.end, now.end);
    work.say(`${label}: ${text.slice(now.start, now.end)}`);
  };
  const unmark = () => {
    const at = place.read(true) || chosen;
    const index = at ? spans.findIndex((one) => one.start <= at.end && at.start <= one.end) : -1;
    if (index < 0) return work.say("No marked passage is chosen.");
    remove(index);
  };
  const send = () => work.send("span", { spans: given() });
  const keys = { Enter: send, delete: unmark, backspace: unmark, ...walking(box, text, place, work.say) };
  task.labels.forEach((label, index) => {
    const button = choice(index < 9 ? String(index + 1) : "", label, mark(label));
    button.prepend(el("span", { class: `swatch c${(index % 9) + 1}`, "aria-hidden": "true" }));
    button.addEventListener("mousedown", (event) => event.preventDefault()); // the selection stays
    answers.append(button);
    if (index < 9) keys[String(index + 1)] = mark(label);
  });
  answers.append(choice("Enter", "Send", send, { cls: "primary" }));
  draw();
  return {
    keys,
    start: () => box.focus({ preventScroll: true }),
    dispose: () => document.removeEventListener("selectionchange", onSelect),
    help: [["← →", "go by words"], ["Shift + ← →", "choose more or fewer words"], [", .", "move the end by one character"], ["< >", "move the beginning by one character"], [`1 – ${Math.min(9, task.labels.length)}`, "mark what is chosen"], ["Del", "take a mark away"], ["Enter", "send"]],
  };
}

/** Draws the text with its marks; where marks overlap the shorter one is seen. */
function paint(box, text, spans, labels) {
  const cuts = [...new Set([0, text.length, ...spans.flatMap((one) => [one.start, one.end])])].sort((a, b) => a - b);
  const made = [];
  for (let index = 0; index + 1 < cuts.length; index++) {
    const [from, to] = [cuts[index], cuts[index + 1]];
    const over = spans.filter((one) => one.start <= from && to <= one.end).sort((a, b) => a.end - a.start - (b.end - b.start))[0];
    const part = text.slice(from, to);
    if (!over) made.push(part);
    else made.push(el("mark", { class: `c${(labels.indexOf(over.label) % 9) + 1} ${to === over.end ? "last" : ""}`, "data-label": over.label }, part));
  }
  box.replaceChildren(...made);
}

function trimmed(text, range) {
  if (!range) return null;
  let { start, end } = range;
  while (start < end && /\s/.test(text[start])) start++;
  while (end > start && /\s/.test(text[end - 1])) end--;
  return start < end ? { start, end } : null;
}

/** Reads and writes the browser's selection as offsets in the box's text. */
function placed(box) {
  const offset = (node, inside) => {
    const range = document.createRange();
    range.selectNodeContents(box);
    range.setEnd(node, inside);
    return range.toString().length;
  };
  const spot = (at) => {
    const walk = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    let last = null;
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
      if (at <= node.length) return [node, at];
      at -= node.length;
      last = node;
    }
    return last ? [last, last.length] : [box, 0];
  };
  return {
    read(evenEmpty = false) {
      const now = getSelection();
      if (!now.rangeCount || !box.contains(now.anchorNode) || !box.contains(now.focusNode)) return null;
      const [a, b] = [offset(now.anchorNode, now.anchorOffset), offset(now.focusNode, now.focusOffset)];
      return a !== b || evenEmpty ? { start: Math.min(a, b), end: Math.max(a, b), anchor: a, focus: b } : null;
    },
    write(anchor, focus) {
      getSelection().setBaseAndExtent(...spot(anchor), ...spot(focus));
    },
  };
}

/** Keys that go through the text: a word at a time, the choice growing with Shift. */
function walking(box, text, place, say) {
  const found = [...text.matchAll(WORD)];
  const words = (found.length ? found : [...text.matchAll(/\S+/gu)]).map((one) => ({ start: one.index, end: one.index + one[0].length }));
  const tell = (start, end) => say(text.slice(start, end), false, true);
  const go = (by) => () => {
    const now = place.read(true);
    let index = now ? words.findIndex((one) => one.end > now.start) : -1;
    if (now && now.start !== now.end) index += by;
    else if (now && by < 0 && (index < 0 || words[index].start >= now.start)) index = index < 0 ? words.length - 1 : index - 1;
    index = Math.max(0, Math.min(words.length - 1, index));
    if (!words.length) return;
    box.focus();
    place.write(words[index].start, words[index].end);
    tell(words[index].start, words[index].end);
  };
  const grow = (by) => () => {
    const now = place.read(true);
    if (!now || now.start === now.end) return go(1)();
    const next = by > 0 ? words.find((one) => one.end > now.end) : [...words].reverse().find((one) => one.end < now.end && one.end > now.start);
    if (next) {
      place.write(now.start, next.end);
      tell(now.start, next.end);
    }
  };
  const nudge = (start, end) => () => {
    const now = place.read();
    if (!now) return say("Choose a passage first.", true);
    const step = (at, by) => (by < 0 ? at - (Array.from(text.slice(Math.max(0, at - 2), at)).pop()?.length || 0) : at + (Array.from(text.slice(at, at + 2))[0]?.length || 0));
    const [a, b] = [start ? step(now.start, start) : now.start, end ? step(now.end, end) : now.end];
    if (a >= b) return;
    place.write(a, b);
    tell(a, b);
  };
  return {
    ArrowRight: go(1), ArrowLeft: go(-1), "shift+arrowright": grow(1), "shift+arrowleft": grow(-1),
    ",": nudge(0, -1), ".": nudge(0, 1), "<": nudge(-1, 0), ">": nudge(1, 0),
  };
}
