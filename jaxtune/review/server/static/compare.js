// Comparing answers whose writers are not told: two by one key, more by ranking.
import { asked, choice, el } from "./dom.js";

export function compare(work) {
  const { item, stage } = work;
  stage.append(...asked(item.payload));
  const ids = item.payload.candidates.map((one) => one.id);
  const sides = item.payload.candidates.map((one, index) => {
    const head = el("h2", {}, `Answer ${index + 1} `);
    if (item.prelabel?.order?.[0]?.includes(one.id)) head.append(el("span", { class: "tag warn" }, "suggested as best"));
    return { id: one.id, box: el("section", { class: "block side", "aria-label": `Answer ${index + 1}` }, head, el("div", { class: "text" }, one.text)) };
  });
  stage.append(el("div", { class: "sides" }, ...sides.map((one) => one.box)));
  return ids.length === 2 ? two(work, ids, sides) : rank(work, ids, sides);
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function two(work, ids, sides) {
  const answers = [
    ["1", "Answer 1 is better", { order: [[ids[0]], [ids[1]]], bad: false }],
    ["2", "Answer 2 is better", { order: [[ids[1]], [ids[0]]], bad: false }],
    ["T", "Equally good", { order: [ids], bad: false }],
    ["B", "Both are bad", { order: [ids], bad: true }],
  ];
  const keys = {};
  for (const [key, name, answer] of answers) {
    const send = () => work.send("compare", answer);
    const mine = work.former && same(work.former.order, answer.order) && work.former.bad === answer.bad;
    work.answers.append(choice(key, name, send, { pressed: work.former ? mine : undefined }));
    keys[key.toLowerCase()] = send;
    if (mine && answer.order.length === 2) sides[ids.indexOf(answer.order[0][0])].box.dataset.chosen = "true";
  }
  return { keys, help: answers.map(([key, name]) => [key, name.toLowerCase()]) };
}

function rank(work, ids, sides) {
  let groups = (work.former?.bad ? [] : work.former?.order || []).map((group) => [...group]); // "none is good" is no tie
  let tie = false;
  const send = () => {
    const left = ids.filter((one) => !groups.flat().includes(one));
    if (left.length > 1) return work.say(`Place ${left.length - 1} more, the best first.`);
    work.send("compare", { order: left.length ? [...groups, left] : groups, bad: false });
  };
  const draw = () => {
    sides.forEach((side, index) => {
      const place = groups.findIndex((group) => group.includes(side.id));
      buttons[index].setAttribute("aria-pressed", String(place >= 0));
      buttons[index].querySelector(".label-text").textContent = place < 0 ? "Next place" : `Place ${place + 1}`;
    });
    equal.setAttribute("aria-pressed", String(tie));
    equal.disabled = !groups.length;
  };
  const pick = (index) => {
    const id = ids[index];
    if (groups.flat().includes(id)) return work.say(`Answer ${index + 1} has its place; ⌫ takes the last one back.`);
    if (tie && groups.length) groups[groups.length - 1].push(id);
    else groups.push([id]);
    tie = false;
    draw();
    work.draft({ order: groups });
    work.say(`Answer ${index + 1}: place ${groups.length}.`);
    if (ids.length - groups.flat().length === 0) work.say("All have their places: Enter sends.");
  };
  const back = () => {
    const last = groups.pop();
    if (last && last.length > 1) groups.push(last.slice(0, -1));
    tie = false;
    draw();
    work.draft({ order: groups });
    work.say(last ? "The last place is free again." : "Nothing has a place yet.");
  };
  const join = () => {
    tie = !tie && groups.length > 0;
    draw();
    if (tie) work.say("The next one stands beside the last one.");
  };
  const buttons = sides.map((side, index) => {
    const button = choice(String(index + 1), "Next place", () => pick(index), { pressed: false });
    button.setAttribute("aria-label", `Next place to answer ${index + 1}`);
    side.box.querySelector("h2").after(button);
    return button;
  });
  const equal = choice("=", "Next one equal", join, { pressed: false });
  const tied = () => work.send("compare", { order: [ids], bad: false });
  const bad = () => work.send("compare", { order: [ids], bad: true });
  work.answers.append(
    equal, choice("⌫", "Take back", back), choice("T", "All equal", tied),
    choice("B", "None is good", bad, { pressed: work.former ? Boolean(work.former.bad) : undefined }), choice("Enter", "Send", send, { cls: "primary" }),
  );
  draw();
  const keys = { "=": join, backspace: back, t: tied, b: bad, Enter: send };
  sides.forEach((_, index) => (keys[String(index + 1)] = () => pick(index)));
  return {
    keys,
    help: [[`1 – ${ids.length}`, "give the next place, the best first"], ["=", "the next one stands beside the last one"], ["⌫", "take the last place back"], ["T", "all are equal"], ["B", "none is good"], ["Enter", "send"]],
  };
}
