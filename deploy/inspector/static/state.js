// Everything a link should bring back is in the address's fragment, and nowhere else.

const DEFAULTS = { sort: "-step", page: "1", colour: "advantage" };
const listeners = [];

/** The state as an object of strings; what is not said has its default. */
export function current() {
  const said = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return { ...DEFAULTS, ...said };
}

/** The address of the present state with `changes`; null or "" takes a key out. */
export function address(changes) {
  const next = Object.entries({ ...current(), ...changes }).filter(
    ([key, value]) => value !== null && value !== "" && value !== DEFAULTS[key],
  );
  return `#${new URLSearchParams(next)}`;
}

/** Change the state: a new entry of the history, unless nothing changes. */
export function change(changes) {
  const next = address(changes);
  if (next !== (location.hash || "#")) {
    history.pushState(null, "", next);
    announce();
  }
}

/** Call `listener` after every change, also by the back and forward buttons. */
export function onChange(listener) {
  listeners.push(listener);
}

function announce() {
  for (const listener of listeners) {
    listener();
  }
}

window.addEventListener("popstate", announce); // links and edits of the address cause it too
