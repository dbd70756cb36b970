// Differences by words: what was taken away and what was put in, as elements.
import { el } from "./dom.js";

const words = (text) => text.match(/\s+|[\p{L}\p{N}_'’]+|[^\s\p{L}\p{N}_]/gu) || [];
const MOST = 4_000_000; // cells of the table; above, what lies between common ends is one change

/** Returns [kind, text] parts, kind being "same", "del" or "ins". */
export function parts(before, after) {
  const a = words(before), b = words(after);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const middle = between(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const all = [["same", a.slice(0, start).join("")], ...middle, ["same", a.slice(a.length - end).join("")]];
  return all.filter((one) => one[1]).reduce((kept, one) => {
    const last = kept[kept.length - 1];
    if (last && last[0] === one[0]) last[1] += one[1];
    else kept.push([...one]);
    return kept;
  }, []);
}

function between(a, b) {
  if (!a.length || !b.length || a.length * b.length > MOST) return [["del", a.join("")], ["ins", b.join("")]];
  const wide = b.length + 1;
  const longest = new Uint32Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i * wide + j] = a[i] === b[j] ? longest[(i + 1) * wide + j + 1] + 1 : Math.max(longest[(i + 1) * wide + j], longest[i * wide + j + 1]);
  const found = [];
  let i = 0, j = 0;
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) found.push(["same", a[(j++, i++)]]);
    else if (longest[(i + 1) * wide + j] >= longest[i * wide + j + 1]) found.push(["del", a[i++]]);
    else found.push(["ins", b[j++]]);
  }
  while (i < a.length) found.push(["del", a[i++]]);
  while (j < b.length) found.push(["ins", b[j++]]);
  return found;
}

export function drawn(before, after) {
  return parts(before, after).map(([kind, text]) => (kind === "same" ? text : el(kind, {}, text)));
}
