// Seconds an item took: of each pause one minute counts at most, and time in another window does not.
const LONGEST = 60_000;

export function clock() {
  let active = 0;
  let last = performance.now();
  let gone = document.hidden;
  const tick = () => {
    const now = performance.now();
    if (!gone) active += Math.min(now - last, LONGEST);
    last = now;
    gone = document.hidden;
  };
  const events = ["keydown", "pointerdown", "pointermove", "scroll", "visibilitychange"];
  for (const one of events) document.addEventListener(one, tick, { passive: true, capture: true });
  return {
    restart: () => {
      tick();
      active = 0;
    },
    seconds: () => {
      tick();
      return Math.round(active / 100) / 10;
    },
  };
}
