// Elements are made here and nowhere by parsing strings: what models and data say stays text.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const find = (selector) => document.querySelector(selector);

/** A button that shows its key; the key is no part of its name. */
export function choice(key, name, act, { pressed, suggested, cls = "choice" } = {}) {
  return el(
    "button",
    { type: "button", class: cls, "aria-keyshortcuts": key || null, "aria-pressed": pressed === undefined ? null : String(pressed), onclick: act },
    key ? el("kbd", { "aria-hidden": "true" }, key) : null,
    el("span", { class: "label-text" }, name),
    suggested ? el("span", { class: "tag warn" }, "suggested") : null,
  );
}

export function block(title, text, cls = "") {
  return el("section", { class: `block ${cls}` }, el("h2", {}, title), el("div", { class: "text" }, text));
}

const WHO = { user: "Question", assistant: "Answer", system: "Instruction" };

/** A prompt: a text, or messages of role and content. */
export function prompt(value) {
  if (typeof value === "string") return block("Question", value, "prompt");
  const turns = value.map((one) =>
    el("div", { class: "turn" }, el("p", { class: "who" }, WHO[one.role] || one.role), el("div", { class: "text" }, one.content)),
  );
  return el("section", { class: "block prompt" }, el("h2", {}, "Conversation so far"), ...turns);
}

/** What the item's payload shows before the kind's own part. */
export function asked(payload) {
  return [
    payload.prompt ? prompt(payload.prompt) : null,
    payload.text !== undefined ? block("Text", payload.text) : null,
  ].filter(Boolean);
}
