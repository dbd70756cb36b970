// What this browser keeps: answers that are not saved yet, drafts, and choices about the page. Keyed by person; where storage is
// refused or full, the page's own memory serves, and what depends on it is told so.
const person = document.body.dataset.person || "";
const memory = new Map();
const name = (key) => `jaxtune:${person}:${key}`;

export function load(key, otherwise = null) {
  if (memory.has(key)) return memory.get(key);
  try {
    const text = localStorage.getItem(name(key));
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Returns whether the value outlives the page. */
export function save(key, value) {
  try {
    localStorage.setItem(name(key), JSON.stringify(value));
    memory.delete(key);
    return true;
  } catch {
    memory.set(key, value);
    return false;
  }
}

export function drop(key) {
  memory.delete(key);
  try {
    localStorage.removeItem(name(key));
  } catch {
    // nothing was kept
  }
}

/** Clears all that is this person's: nothing of their work stays in a browser they signed out of. */
export function clear() {
  memory.clear();
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(name(""))) localStorage.removeItem(key);
  } catch {
    // nothing was kept
  }
}
