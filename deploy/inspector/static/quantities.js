// What a token can be coloured by, and every number there is of it.

import { category, shade } from "./colour.js";
import { exact } from "./dom.js";
import { segmentOf, withError } from "./values.js";

const diverging = (label, value, needs = null) => ({ label, value, kind: "diverging", needs });
const kinds = (label, value, name) => ({ label, value, kind: "category", name });

/** By name in the address: its label, its value for token i, the sort of its scale, and the list of
 * tokens without which a group does not offer it. */
export const QUANTITIES = {
  advantage: diverging("λ-advantage", (tokens, i) => at(tokens.advantage, i)),
  trace_weight: diverging("trace weight", (tokens, i) => at(tokens.trace_weight, i)),
  log_ratio: diverging("log-probability ratio", logRatio),
  scorer: diverging("scorer's log-ratio", scorersRatio, "score"),
  value: diverging("critic's value", (tokens, i) => at(tokens.value, i), "value"),
  version: kinds("weight version", (tokens, i) => tokens.version[i], (value) => `version ${value}`),
  in_loss: kinds("loss mask", (tokens, i) => tokens.in_loss[i], (value) => (value ? "in the loss" : "not in the loss")),
};

function at(list, i) {
  return list === null ? null : list[i];
}

/** log π of the learner before the step less that of the sampler, nats. */
function logRatio(tokens, i) {
  const [learner, behaviour] = [at(tokens.logprob, i), tokens.behaviour_logprob[i]];
  return learner === null || behaviour === null ? null : learner - behaviour;
}

/** log π of the scorer less that of the sampler, nats. */
function scorersRatio(tokens, i) {
  const [scorer, behaviour] = [at(tokens.score, i), tokens.behaviour_logprob[i]];
  return scorer === null || behaviour === null ? null : scorer - behaviour;
}

/**
 * One scale for all completions of a group, so that a colour means the same in each.
 *
 * Diverging ones reach their full colour at the largest absolute value in the group, and go with
 * the square root of the value: one completion's large credit does not make the others' invisible.
 */
export function scaleOf(name, completions) {
  const quantity = QUANTITIES[name] ?? QUANTITIES.advantage;
  const values = completions.flatMap(({ tokens }) =>
    tokens.id.map((_, i) => quantity.value(tokens, i)).filter((value) => value !== null),
  );
  if (quantity.kind === "diverging") {
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const share = (value) => (largest ? Math.sign(value) * Math.sqrt(Math.abs(value) / largest) : 0);
    const signed = values.some((value) => value < 0);
    return { quantity, largest, signed, colour: (value) => shade(share(value)) };
  }
  const found = [...new Set(values)].sort((a, b) => a - b);
  const places = new Map(found.map((value, place) => [value, place]));
  return { quantity, found, colour: (value) => category(places.get(value)) };
}

/** Every value of token `i` as [name, text, title], in the digits it was logged with. */
export function valuesOf(completion, i, step) {
  const { tokens } = completion;
  const ratio = logRatio(tokens, i);
  const rounded = (value) => (value === null ? "–" : String(Number(value.toPrecision(7))));
  const version = tokens.version[i];
  const measured = segmentOf(completion, i);
  const staleness = step === null ? "" : ` (staleness ${step - 1 - version})`;
  return [
    ["token", `${i + 1} of ${tokens.id.length}`, `completion ${completion.index}`],
    ...(completion.rule ? [["credit of", completion.rule]] : []),
    ["id", String(tokens.id[i])],
    ["text", tokens.text === null ? "–" : quoted(tokens.text[i])],
    ["λ-advantage", exact(at(tokens.advantage, i)), "A times the trace weight"],
    ["trace weight", exact(at(tokens.trace_weight, i)), "c, the credit the token gets"],
    ...(measured ? [["measured", withError(measured.advantage, measured.advantage_error), "what the token's segment was worth, by branches, with its standard error"]] : []),
    ["log π learner", exact(at(tokens.logprob, i)), "nats, before the step"],
    ["log π sampler", exact(tokens.behaviour_logprob[i]), "nats, when it was sampled"],
    ...(tokens.score === null ? [] : [["log π scorer", exact(at(tokens.score, i)), "nats"]]),
    ...(tokens.value === null ? [] : [["critic's value", exact(at(tokens.value, i)), "of the state before the token"]]),
    ["log ratio", rounded(ratio), "learner less sampler, nats"],
    ["ratio", ratio === null ? "–" : rounded(Math.exp(ratio)), "exp of the log ratio"],
    ["weight version", `${version}${staleness}`],
    ["in the loss", inLoss(completion, i)],
  ];
}

function inLoss(completion, i) {
  const answer = completion.tokens.in_loss[i] ? "yes" : "no";
  return i < completion.guidance_length ? `${answer}, ${givenBy(completion)}` : answer;
}

/** What the first tokens are that a completion was given: of another completion, or guidance. */
export function givenBy({ continues }) {
  return continues >= 0 ? `of #${continues}` : "guidance";
}

/** Text with what cannot be seen spelt out. */
function quoted(text) {
  return text === "" ? "(part of the character before)" : JSON.stringify(text);
}
