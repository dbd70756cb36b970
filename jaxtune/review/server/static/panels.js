// Dialogs of the work page: flag, skip, keys. The browser's own <dialog> keeps the focus inside and gives it back.
import { el, find } from "./dom.js";

const FLAGS = {
  bias: "Bias: it treats a group of people worse, or speaks of it in clichés",
  privacy: "Privacy: it tells something about a person that it should not",
  harm: "Harm: someone could come to harm by it",
  wrong: "Wrong: it is false, or out of date",
  off_guideline: "Against the guideline",
};

export const isOpen = () => document.querySelector("dialog[open]") !== null;

export function opened(id) {
  const dialog = find(id);
  dialog.showModal();
  return dialog;
}

for (const button of document.querySelectorAll("dialog [data-close]")) button.addEventListener("click", () => button.closest("dialog").close());

/** The flag panel; `send(flags, thenSkip)` is called with what was said. */
export function flagPanel(task, send) {
  const dialog = find("#flag-dialog"), form = dialog.querySelector("form"), types = find("#flag-types"), group = find("#flag-group");
  types.append(
    ...Object.entries(FLAGS).map(([type, name], index) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", name: "type", value: type }), el("kbd", { "aria-hidden": "true" }, String(index + 1)), el("span", {}, name))),
  );
  group.append(el("option", { value: "" }, "No group, or another one"), ...task.groups.map((one) => el("option", { value: one }, one)));
  find("#flag-group-field").hidden = !task.groups.length;
  dialog.addEventListener("keydown", (event) => {
    if (/^[1-5]$/.test(event.key) && event.target.tagName !== "TEXTAREA" && event.target.tagName !== "SELECT") {
      const box = types.querySelectorAll("input")[Number(event.key) - 1];
      box.checked = !box.checked;
      box.focus();
      event.preventDefault();
    }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const note = find("#flag-note").value.trim();
    const flags = [...types.querySelectorAll("input:checked")].map((one) => ({ type: one.value, group: one.value === "bias" ? group.value : "", note }));
    find("#flag-error").hidden = flags.length > 0;
    if (!flags.length) return types.querySelector("input").focus();
    dialog.close();
    send(flags);
  });
  return () => {
    form.reset();
    find("#flag-error").hidden = true;
    opened("#flag-dialog");
    types.querySelector("input").focus();
  };
}

export function skipPanel(send) {
  const dialog = find("#skip-dialog"), form = dialog.querySelector("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
    send(new FormData(form).get("reason") === "other" ? find("#skip-note").value.trim() : new FormData(form).get("reason"));
  });
  find("#skip-note").addEventListener("input", () => (form.querySelector('[value="other"]').checked = true));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.type === "radio") {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return () => {
    form.reset();
    opened("#skip-dialog");
    form.querySelector("input").focus();
  };
}

/** Fills the overlay of keys. */
export function keysPanel(lines) {
  find("#keys-list").replaceChildren(...lines.flatMap(([keys, does]) => [el("dt", {}, ...keys.split(" ").map((one) => /^(or|–|\+)$/.test(one) ? ` ${one} ` : el("kbd", {}, one))), el("dd", {}, does)]));
}
