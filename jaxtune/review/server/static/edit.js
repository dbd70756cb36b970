// Correcting an answer: a text to write in, the differences below it, and the original one key away.
import { asked, choice, el } from "./dom.js";
import { drawn } from "./diff.js";

export function edit(work) {
  const { item, stage, answers } = work;
  const original = item.payload.answer ?? "";
  stage.append(...asked(item.payload));
  const area = el("textarea", { class: "editor", id: "editor", maxlength: 100000, spellcheck: "true", oninput: () => changed() });
  area.value = work.former?.text ?? original;
  const source = el("section", { class: "block", id: "original", hidden: true }, el("h2", {}, "Original"), el("div", { class: "text" }, original));
  const changes = el("div", { class: "text diff" });
  const shown = el("section", { class: "block", id: "changes" }, el("h2", {}, "Changes"), changes);
  const help = el("div", { class: "row" });
  const suggestion = item.prelabel?.text;
  stage.append(
    el("section", { class: "block" }, el("h2", {}, el("label", { for: "editor" }, "Answer, yours to correct")), area, help,
      suggestion ? el("div", { class: "row" }, el("span", { class: "tag warn" }, "suggested by a model"), choice("", "Put the suggestion in", () => { area.value = suggestion; changed(); area.focus(); }, { cls: "compact" })) : null),
    shown, source,
  );
  let timer = 0;
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 4, 900)}px`;
  };
  const draw = () => {
    changes.replaceChildren(...(area.value === original ? [el("span", { class: "muted" }, "None yet.")] : drawn(original, area.value)));
  };
  const changed = () => {
    fit();
    work.draft({ text: area.value });
    clearTimeout(timer);
    timer = setTimeout(draw, 120);
  };
  const send = () => (area.value.trim() ? work.send("edit", { text: area.value }) : work.say("The answer is empty. Write one, or skip.", true));
  const keep = () => work.send("edit", { text: original });
  const toggle = (part, name) => () => {
    part.hidden = !part.hidden;
    work.say(`${name} ${part.hidden ? "hidden" : "shown"}.`);
    if (!part.hidden) part.scrollIntoView({ block: "nearest" });
  };
  const write = () => area.focus();
  const putBack = () => {
    area.value = original;
    changed();
    draw();
    work.say("The original text is back.");
  };
  const first = toggle(source, "Original"), second = toggle(shown, "Changes");
  help.append(choice("O", "Original", first, { cls: "compact" }), choice("D", "Changes", second, { cls: "compact" }), choice("", "Start over", putBack, { cls: "compact" }));
  answers.append(
    choice("Ctrl+Enter", "Send", send, { cls: "primary" }), choice("K", "Fine as it is", keep), choice("E", "Write", write, { cls: "choice hide-small" }),
  );
  requestAnimationFrame(() => (fit(), draw()));
  return {
    keys: { "ctrl+enter": send, k: keep, e: write, o: first, d: second, "alt+o": first, "alt+d": second },
    dispose: () => clearTimeout(timer),
    help: [["E", "write; Esc leaves the text"], ["Ctrl + Enter", "send"], ["K", "it is fine as it is"], ["O or Alt + O", "original, shown or hidden"], ["D or Alt + D", "changes, shown or hidden"]],
  };
}
