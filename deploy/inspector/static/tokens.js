// The tokens of a completion: one element each, coloured, with all numbers on hover and on focus.

import { byId, counted, el, short } from "./dom.js";
import { givenBy, valuesOf } from "./quantities.js";
import { worthOfTurn } from "./values.js";

const FIRST = 3000; // tokens of a completion that are drawn before someone asks for the rest

/** The tokens of `completion` as an element; `step` is the learner step it belongs to. */
export function tokenField(completion, step) {
  const count = completion.tokens.id.length;
  const field = el("div", {
    class: "tokens", role: "group",
    "aria-label": `Tokens of completion ${completion.index}; arrow keys go from token to token`,
  });
  const drawn = (upTo) => {
    const from = field.querySelectorAll(".token").length;
    for (let i = from; i < upTo; i += 1) {
      field.append(...conversation(completion, i));
      place(field, completion, i).append(...token(completion, i));
    }
  };
  drawn(Math.min(count, FIRST));
  field.querySelector(".token")?.setAttribute("tabindex", "0");
  const say = (event) => {
    const found = event.target.closest?.(".token");
    if (found) {
      showDetails(completion, Number(found.dataset.index), step);
    }
  };
  field.addEventListener("pointerover", say);
  field.addEventListener("focusin", say);
  field.addEventListener("keydown", (event) => move(event, field));
  field.addEventListener("click", (event) => focusOn(event.target.closest(".token"), field));
  if (count <= FIRST) {
    return [field];
  }
  const more = el("button", { type: "button", class: "more" }, `Show ${counted(count - FIRST, "more token")}`);
  more.addEventListener("click", () => {
    drawn(count);
    more.remove();
    field.dispatchEvent(new CustomEvent("drawn", { bubbles: true }));
  });
  return [field, more];
}

/** What stands before the first token of a conversation: its place, and the prompt behind it. */
function conversation(completion, i) {
  const place = completion.segments.findIndex(({ begin }) => begin === i);
  if (place < 0) {
    return [];
  }
  const title = `conversation ${place + 1} of ${completion.segments.length}`;
  return [el("details", { class: "conversation" },
    el("summary", {}, title),
    el("pre", { class: "prompt" }, completion.segments[place].prompt))];
}

/** What token `i` is put into: the field, or its part of a conversation, which it may begin. */
function place(field, completion, i) {
  if (completion.turns.length < 2) {
    return field;
  }
  const turn = turnOf(completion, i);
  const begins = completion.segments.some(({ begin }) => begin === i);
  if (i === 0 || begins || turn !== turnOf(completion, i - 1)) {
    const head = el("div", { class: "mark" }, turn < 0 ? "given" : turnName(completion, turn));
    field.append(el("section", { class: turn < 0 ? "told" : "said" }, head, el("div", {})));
  }
  return field.lastElementChild.lastElementChild;
}

function token(completion, i) {
  const { tokens, guidance_length: guided } = completion;
  const turn = turnOf(completion, i);
  const classes = ["token"];
  if (!tokens.in_loss[i]) {
    classes.push("masked");
  }
  if (i < guided) {
    classes.push("guided");
  } else if (turn < 0) {
    classes.push("given");
  }
  const element = el("span", { class: classes.join(" "), "data-index": i, tabindex: "-1" }, visible(tokens, i));
  const mark = (text) => el("span", { class: "mark" }, text);
  return [
    ...(i === 0 && guided > 0 ? [mark(`${givenBy(completion)} `)] : []),
    element,
    ...(guided > 0 && i === guided - 1 ? [mark(" sampled ")] : []),
  ];
}

/** Place of the turn that token `i` was sampled in; -1 where it was given. */
function turnOf(completion, i) {
  return completion.turns.findIndex(({ begin, end }) => begin <= i && i < end);
}

/** What stands above a turn: its place, its reward, the credit of its tokens in all, and what it was
 * worth where that was measured. */
function turnName(completion, turn) {
  const { begin, end, reward, finish, calls, failed } = completion.turns[turn];
  const credit = completion.tokens.advantage?.slice(begin, end).reduce((sum, value) => sum + (value ?? 0), 0);
  const worth = worthOfTurn(completion, turn);
  const facts = [
    ...(calls ? [counted(calls, "tool call")] : []),
    ...(failed ? [`${failed} failed`] : []),
    ...(finish === "length" ? ["cut"] : []),
    ...(reward === null ? [] : [`reward ${short(reward)}`]),
    ...(credit === undefined ? [] : [`credit ${credit > 0 ? "+" : ""}${short(credit)}`]),
    ...(worth === null ? [] : [`measured ${worth}`]),
  ];
  return [`turn ${turn + 1}`, ...facts].join(" · ");
}

/** What is drawn for a token: its text, line ends marked, or its id where there is no text. */
function visible(tokens, i) {
  if (tokens.text === null) {
    return `${tokens.id[i]} `;
  }
  const text = tokens.text[i];
  return text === "" ? "·" : text.replaceAll("\r", "␍").replaceAll("\n", "↵\n").replaceAll("\t", "→\t");
}

/** Colour every token in `field` by `scale`; those without a value stay plain. */
export function paint(field, completion, scale) {
  for (const element of field.querySelectorAll(".token")) {
    const value = scale.quantity.value(completion.tokens, Number(element.dataset.index));
    const colour = value === null ? null : scale.colour(value);
    element.style.backgroundColor = colour?.background ?? "";
    element.style.color = colour?.text ?? "";
  }
}

function move(event, field) {
  const all = [...field.querySelectorAll(".token")];
  const here = all.indexOf(document.activeElement);
  const targets = {
    ArrowLeft: () => all[here - 1],
    ArrowRight: () => all[here + 1],
    ArrowUp: () => inLine(all.slice(0, here).reverse(), all[here]),
    ArrowDown: () => inLine(all.slice(here + 1), all[here]),
    Home: () => all[0],
    End: () => all.at(-1),
  };
  if (here >= 0 && event.key in targets) {
    event.preventDefault();
    focusOn(targets[event.key](), field);
  }
}

/** Of the first other line among `others`, the token nearest to `from` sideways. */
function inLine(others, from) {
  const top = others.find((other) => other.offsetTop !== from.offsetTop)?.offsetTop;
  const line = others.filter((other) => other.offsetTop === top);
  const away = (other) => Math.abs(other.offsetLeft - from.offsetLeft);
  return line.reduce((best, other) => (best && away(best) <= away(other) ? best : other), undefined);
}

/** One token of a field is in the order of Tab: the one that had the focus last. */
function focusOn(element, field) {
  if (element) {
    field.querySelector('.token[tabindex="0"]')?.setAttribute("tabindex", "-1");
    element.setAttribute("tabindex", "0");
    element.focus();
  }
}

function showDetails(completion, i, step) {
  const line = byId("token-details");
  const items = valuesOf(completion, i, step).map(([name, text, title]) =>
    el("div", { title }, el("dt", {}, name), el("dd", { "data-value": name }, text)),
  );
  line.replaceChildren(el("dl", {}, ...items));
  line.hidden = false;
}

/** Take the details away: no token is chosen. */
export function hideDetails() {
  byId("token-details").hidden = true;
}
