// The kinds that are answered by choosing: label, rate, accept. Each builds its part of the page and returns what its keys do.
import { asked, block, choice, el } from "./dom.js";

const key = (index) => (index < 9 ? String(index + 1) : "");

export function label(work) {
  const { task, item, stage, answers } = work;
  stage.append(...asked(item.payload));
  const chosen = new Set(work.former?.labels || (task.multi ? item.prelabel?.labels : []) || []);
  const keys = {};
  task.labels.forEach((name, index) => {
    const act = () => {
      if (!task.multi) return work.send("label", { labels: [name] });
      if (chosen.has(name)) chosen.delete(name);
      else chosen.add(name);
      button.setAttribute("aria-pressed", String(chosen.has(name)));
      work.draft({ labels: [...chosen] });
    };
    const pressed = task.multi || work.former ? chosen.has(name) : undefined;
    const button = choice(key(index), name, act, { pressed, suggested: item.prelabel?.labels?.includes(name) });
    answers.append(button);
    if (key(index)) keys[key(index)] = act;
  });
  if (task.multi) {
    const send = () => work.send("label", { labels: [...chosen] });
    answers.append(choice("Enter", "Send", send, { cls: "primary" }));
    keys.Enter = send;
  }
  return { keys, help: [[task.labels.length > 1 ? `1 – ${Math.min(9, task.labels.length)}` : "1", task.multi ? "choose a label, or take it back" : "choose a label"], ...(task.multi ? [["Enter", "send"]] : [])] };
}

export function rate(work) {
  const { task, item, stage, answers } = work;
  stage.append(...asked(item.payload));
  if (item.payload.answer !== undefined) stage.append(block("Answer", item.payload.answer));
  const [low, high, step] = task.scale;
  const values = Array.from({ length: Math.round((high - low) / step) + 1 }, (_, index) => Number((low + index * step).toFixed(6)));
  const ends = task.scale_ends.some(Boolean) ? el("div", { class: "ends" }, el("span", {}, `${low}: ${task.scale_ends[0]}`), el("span", {}, `${high}: ${task.scale_ends[1]}`)) : null;
  return values.length <= 11 ? steps(work, values, ends) : slider(work, low, high, step, ends);
}

function steps(work, values, ends) {
  const keys = {};
  const own = values.every((one) => Number.isInteger(one) && one >= 0 && one <= 9);
  const row = el("div", { class: "scale", role: "group", "aria-label": "Rating" });
  values.forEach((value, index) => {
    const send = () => work.send("rate", { rating: value });
    const hint = own ? String(value) : key(index);
    const said = work.task.scale_ends[index === 0 ? 0 : 1];
    const button = choice(own ? "" : hint, String(value), send, { pressed: work.former ? work.former.rating === value : undefined, suggested: work.item.prelabel?.rating === value });
    if (own) button.setAttribute("aria-keyshortcuts", hint);
    if (said && (index === 0 || index === values.length - 1)) button.append(el("span", { class: "visually-hidden" }, `: ${said}`));
    row.append(button);
    if (hint) keys[hint] = send;
  });
  work.answers.append(el("div", { class: "rating" }, row, ends));
  return { keys, help: [[own ? `${values[0]} – ${values[values.length - 1]}` : `1 – ${Math.min(9, values.length)}`, own ? "rate" : "rate, from the lowest on"]] };
}

function slider(work, low, high, step, ends) {
  const start = work.former?.rating ?? work.item.prelabel?.rating ?? low + Math.round((high - low) / step / 2) * step;
  const told = el("output", { for: "rating" }, String(start));
  const range = el("input", { type: "range", id: "rating", min: low, max: high, step, value: start, oninput: () => (told.textContent = range.value) });
  const send = () => work.send("rate", { rating: Number(range.value) });
  const move = (by) => () => {
    range.value = String(Number(range.value) + by * step);
    told.textContent = range.value;
    work.say(range.value);
  };
  const given = work.item.prelabel?.rating !== undefined && !work.former ? el("span", { class: "tag warn" }, `suggested: ${start}`) : null;
  work.answers.append(el("label", { for: "rating" }, "Rating ", told), range, ...(ends ? [ends] : []), ...(given ? [given] : []), choice("Enter", "Send", send, { cls: "primary" }));
  return { keys: { Enter: send, ArrowLeft: move(-1), ArrowRight: move(1) }, help: [["← →", "lower, higher"], ["Enter", "send"]] };
}

export function accept(work) {
  const { item, stage, answers } = work;
  stage.append(...asked(item.payload));
  if (item.payload.answer !== undefined) stage.append(block("Answer", item.payload.answer));
  const reason = el("textarea", { id: "reason", rows: 2, maxlength: 4000, oninput: () => work.draft({ reason: reason.value }) });
  reason.value = work.former?.reason || "";
  const yes = () => work.send("accept", { accept: true, reason: "" });
  const no = () => work.send("accept", { accept: false, reason: reason.value.trim() });
  const why = el("div", { class: "block" }, el("label", { for: "reason" }, "Why is it rejected? ", el("span", { class: "muted small" }, "One line helps whoever mends it.")), reason,
    el("div", { class: "row" }, choice("", "Send the rejection", no, { cls: "primary" }), el("span", { class: "muted small" }, "Ctrl + Enter sends; Esc goes back")));
  why.hidden = !work.former?.reason && work.former?.accept !== false;
  const ask = () => {
    why.hidden = false;
    why.scrollIntoView({ block: "nearest" });
    reason.focus();
  };
  const before = (value) => (work.former?.accept === undefined ? undefined : work.former.accept === value);
  answers.append(
    choice("A", "Accept", yes, { pressed: before(true), suggested: item.prelabel?.accept === true }),
    choice("R", "Reject …", ask, { pressed: before(false), suggested: item.prelabel?.accept === false }),
  );
  stage.append(why);
  return {
    keys: { a: yes, r: ask, "ctrl+enter": () => (why.hidden ? undefined : no()) },
    help: [["A", "accept"], ["R", "reject, with a reason"], ["Ctrl + Enter", "send the rejection"]],
  };
}
