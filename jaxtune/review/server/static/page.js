// On every page: the theme's switch, signing out, copying a link.
import * as kept from "./kept.js";
import { find } from "./dom.js";

const root = document.documentElement, button = find("#theme");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => {
  if (button) button.textContent = dark() ? "◐ Light" : "◐ Dark";
};
button?.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  try {
    localStorage.setItem("jaxtune:theme", root.dataset.theme);
  } catch {
    // for this page alone
  }
  name();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
name();

let warned = false;
find("#sign-out")?.addEventListener("submit", (event) => {
  const left = kept.load("outbox", []).length;
  if (left && !warned) {
    event.preventDefault();
    warned = true;
    const told = find("#sign-out-warning");
    told.textContent = `${left} of your answers are not saved yet. Sign out again to lose them, or wait on the work page.`;
    told.hidden = false;
    return;
  }
  kept.clear();
});

for (const one of document.querySelectorAll("time")) {
  const at = new Date(one.dateTime);
  one.title = one.textContent;
  one.textContent = at.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

for (const copy of document.querySelectorAll("[data-copy]")) {
  copy.addEventListener("click", async () => {
    const field = find(copy.dataset.copy);
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
    } catch {
      document.execCommand("copy"); // pages over plain HTTP have no clipboard
    }
    copy.textContent = "Copied";
  });
}

for (const form of document.querySelectorAll("form[data-ask]")) {
  form.addEventListener("submit", (event) => {
    const go = form.querySelector("button[type=submit]");
    if (form.dataset.asked) return;
    event.preventDefault();
    form.dataset.asked = "1";
    go.textContent = form.dataset.ask;
  });
}
