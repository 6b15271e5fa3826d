// A group: what is known of it, and its completions side by side.

import { shade } from "./colour.js";
import { byId, counted, el, exact, short } from "./dom.js";
import { QUANTITIES, givenBy, scaleOf } from "./quantities.js";
import { address, change, current } from "./state.js";
import { ENDED, neighbours } from "./table.js";
import { hideDetails, paint, tokenField } from "./tokens.js";
import { valueCurve } from "./values.js";

let group = null;
let rule = null; // whose credit stands beside the run's
let cards = []; // every field of tokens with what it shows

/** Draw `data`; the focus stays where it is when the same group is drawn anew. */
export function showGroup(data) {
  const focus = data.group === group?.group ? focusedToken() : null;
  group = data;
  rule = chosenRule();
  hideDetails();
  const articles = data.completions.map((completion) => article(completion, data.step));
  cards = articles.flatMap(({ fields }) => fields);
  byId("group").replaceChildren(
    header(data),
    ...(data.completions.length ? [toolbar()] : []),
    ...(data.note ? [el("p", { class: "note" }, sentence(data.note))] : []),
    el("div", { class: "completions" }, ...articles.map(({ element }) => element)),
  );
  colourGroup();
  if (focus) {
    cards[focus[0]]?.field.querySelectorAll(".token")[focus[1]]?.focus();
  }
}

function focusedToken() {
  const element = document.activeElement?.closest?.(".token");
  const place = cards.findIndex(({ field }) => field.contains(element));
  return element && place >= 0 ? [place, Number(element.dataset.index)] : null;
}

/** Colour the tokens by what the address says, with its legend. */
export function colourGroup() {
  if (!group?.completions.length) {
    return;
  }
  if (rule !== chosenRule()) {
    showGroup(group);
    return;
  }
  const name = current().colour in QUANTITIES ? current().colour : "advantage";
  const scale = scaleOf(name, cards.map(({ completion }) => completion));
  for (const { completion, field } of cards) {
    paint(field, completion, scale);
  }
  for (const input of byId("group").querySelectorAll("input[name=colour]")) {
    input.checked = input.value === name;
  }
  byId("legend").replaceChildren(...legend(scale));
}

function chosenRule() {
  return group.rules?.find((name) => name === current().rule) ?? null;
}

function header(data) {
  const [before, after] = neighbours(data.group);
  const facts = [
    ["step", exact(data.step)],
    ["ticket", exact(data.ticket)],
    ["state", data.again ? `${data.state}, served again` : (data.state ?? "–")],
    ["mean reward", short(data.reward)],
    ["reward spread", short(data.spread)],
    ["mean length", short(data.length)],
    ["staleness", exact(data.staleness)],
    ["dispatched at version", exact(data.dispatch_version)],
  ];
  const outcomes = Object.entries(data.outcomes).map(
    ([outcome, { completions }]) => `${completions} ${outcome}`,
  );
  return el("div", { class: "group-head" },
    el("nav", { class: "bar", "aria-label": "Groups" },
      el("a", { href: address({ group: null }), class: "back" }, "← All groups"),
      el("h2", { id: "group-title", tabindex: "-1" }, `Group ${data.group}`),
      step(before, "← Group"),
      step(after, "Group", " →")),
    el("dl", { class: "facts" },
      ...facts.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
      ...(outcomes.length ? [el("div", {}, el("dt", {}, "completions"), el("dd", {}, outcomes.join(", ")))] : []),
      ...(data.reason ? [el("div", {}, el("dt", {}, "reason"), el("dd", {}, data.reason))] : [])),
    ...(data.prompt_text === undefined ? [] : [
      el("h3", {}, "Prompt"),
      el("pre", { class: "prompt", tabindex: "0", "aria-label": "Prompt" }, data.prompt_text),
      el("details", {}, el("summary", {}, "Reference"), el("pre", { class: "prompt" }, data.reference)),
    ]));
}

function step(id, label, end = "") {
  return id === undefined ? null : el("a", { href: address({ group: String(id) }) }, `${label} ${id}${end}`);
}

function toolbar() {
  const has = ({ needs }) => !needs || group.completions.some(({ tokens }) => tokens[needs] !== null);
  const choices = Object.entries(QUANTITIES).filter(([, quantity]) => has(quantity)).map(([name, { label }]) =>
    el("label", {},
      el("input", { type: "radio", name: "colour", value: name, onchange: () => change({ colour: name }) }),
      label));
  return el("div", { class: "toolbar" },
    el("fieldset", { class: "choices" }, el("legend", {}, "Colour"), ...choices),
    ...(group.rules?.length ? [rules()] : []),
    el("div", { id: "legend", class: "legend" }));
}

function rules() {
  const choices = [["", "none"], ...group.rules.map((name) => [name, name])].map(([value, label]) =>
    el("label", {},
      el("input", {
        type: "radio", name: "rule", value, checked: value === (rule ?? ""),
        onchange: () => change({ rule: value }),
      }),
      label));
  return el("fieldset", { class: "choices" }, el("legend", {}, "Beside the run's credit that of"), ...choices);
}

function legend({ quantity, largest, signed, found, colour }) {
  if (quantity.kind === "category") {
    return found.map((value) => {
      const swatch = el("span", { class: "swatch" }, quantity.name(value));
      const { background, text } = colour(value);
      [swatch.style.backgroundColor, swatch.style.color] = [background, text];
      return swatch;
    });
  }
  if (!largest) {
    return [el("span", { class: "muted" }, `No token of this group has a ${quantity.label} other than 0.`)];
  }
  const ramp = el("span", { class: "ramp", "aria-hidden": "true" });
  const ends = (signed ? [-1, 0, 1] : [0, 1]).map((share) => shade(share).background);
  ramp.style.backgroundImage = `linear-gradient(to right, ${ends.join(", ")})`;
  const below = signed ? [-largest, -largest / 4] : [];
  const marks = [...below, 0, largest / 4, largest].map((value) => el("span", {}, short(value)));
  const unit = [QUANTITIES.log_ratio, QUANTITIES.scorer].includes(quantity) ? ", nats" : "";
  return [el("div", { class: "scale" }, ramp, el("div", { class: "marks" }, ...marks)),
    el("span", { class: "muted" }, `square-root scale${unit}`)];
}

/** A completion's card: its tokens under the run's rule, then under the one beside it. */
function article(completion, stepOfGroup) {
  const shown = rule === null ? [completion] : [{ ...completion, rule: "the run" }, under(completion, rule)];
  const drawn = shown.map((each) => ({ completion: each, parts: tokenField(each, stepOfGroup) }));
  const element = el("article", { class: "completion", "aria-label": `Completion ${completion.index}` },
    cardHead(completion),
    valueCurve(completion),
    ...drawn.flatMap(({ completion: each, parts }) => [...(each.rule ? [ruleHead(each)] : []), ...parts]));
  const fields = drawn.map(({ completion: each, parts: [field] }) => ({ completion: each, field }));
  for (const { field } of fields) {
    field.addEventListener("drawn", colourGroup);
  }
  const strongest = Math.max(...group.completions.map(({ advantage }) => Math.abs(advantage ?? 0))) || 1;
  element.style.borderTopColor = completion.advantage ? shade(completion.advantage / strongest).background : "";
  return { fields, element };
}

/** `completion` with the credit of another rule. */
function under(completion, name) {
  const other = completion.rules[name] ?? { advantage: null, trained: null, tokens: { advantage: null, trace_weight: null } };
  const { advantage, trained } = other;
  return { ...completion, rule: name, advantage, trained, tokens: { ...completion.tokens, ...other.tokens } };
}

function ruleHead({ rule: name, advantage }) {
  return el("h3", { class: "rule" }, `${name}: A ${withSign(advantage)}`);
}

function cardHead(completion) {
  const { tokens } = completion;
  const [oldest, newest] = [Math.min(...tokens.version), Math.max(...tokens.version)];
  const versions = oldest === newest ? `version ${oldest}` : `versions ${oldest} to ${newest}`;
  const ended = ENDED[completion.finish_reason];
  const { turns, environment_verdict: said, environment_s: seconds } = completion;
  const facts = [
    ended ?? completion.finish_reason,
    counted(tokens.id.length, "token"),
    ...(turns.length > 1 ? [counted(turns.length, "turn")] : []),
    ...(completion.segments.length > 1 ? [counted(completion.segments.length, "conversation")] : []),
    ...(seconds ? [`${short(seconds)} s in the environment`] : []),
    ...(completion.guidance_length ? [`${completion.guidance_length} of them ${givenBy(completion)}`] : []),
    completion.generator,
    ...(tokens.version.length ? [versions] : []),
    `${short(completion.seconds)} s`,
    ...(completion.token_weight === null ? [] : [`w ${short(completion.token_weight)}`]),
  ];
  return el("header", {},
    el("div", { class: "scores" },
      el("span", { class: "number" }, `#${completion.index}`),
      el("span", {}, "reward ", el("b", {}, short(completion.reward))),
      el("span", { title: `Advantage A: ${exact(completion.advantage)}` }, "A ", el("b", {}, withSign(completion.advantage))),
      ...(completion.suspicious ? [el("span", { class: "chip", title: "Walls of the sandbox that its program touched" }, `suspicious: ${completion.suspicious}`)] : []),
      ...(["error", "timeout"].includes(said) ? [el("span", { class: `chip ${said}`, title: completion.environment_reason }, `environment: ${said}`)] : []),
      ...(completion.feedback ? [el("span", { class: "chip", title: completion.feedback }, "lacks something")] : []),
      ...(completion.part ? [el("span", { class: "chip" }, completion.part)] : []),
      ...(completion.trained === false ? [el("span", { class: "chip" }, "not trained on")] : [])),
    el("div", { class: "verdicts" },
      ...Object.entries(completion.verdicts).map(([name, { reward, verdict }]) =>
        el("span", { class: `chip ${verdict}` }, `${name}: ${verdict}${reward === null ? "" : ` ${short(reward)}`}`))),
    el("p", { class: "muted" }, facts.join(" · ")),
    ...(completion.own_prompt ? [el("details", {}, el("summary", {}, "Its own prompt"), el("pre", { class: "prompt" }, completion.own_prompt))] : []));
}

function withSign(value) {
  return value === null ? "–" : `${value > 0 ? "+" : ""}${short(value)}`;
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}
