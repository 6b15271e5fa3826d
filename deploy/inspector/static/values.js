// The measured value of a completion's prefixes, over its tokens.

import { ticks } from "./chart.js";
import { counted, el, short, svg } from "./dom.js";

const PICTURE = { width: 320, height: 110 };
const MARGIN = { top: 6, right: 8, bottom: 18, left: 36 };
const ERRORS = 2; // standard errors to both sides of a value

/** The value curve of `completion` as a figure; null where nothing was measured. */
export function valueCurve(completion) {
  if (!completion.measured) {
    return null;
  }
  const points = valuePoints(completion);
  return el("figure", { class: "values" },
    el("figcaption", {},
      el("span", {}, "Measured value"),
      el("span", { class: "readout" }, `by ${points.length - 1} ${points.length === 2 ? "branch" : "branches"}, band of ${ERRORS} standard errors`)),
    valuePicture(points, told(completion)));
}

/** What a turn was worth: what the value gained from its first token to the first of the next turn,
 * or to the end; null where one of the two was not measured. */
export function worthOfTurn({ measured, turns, reward }, place) {
  const branchAt = (at) => measured?.find(({ begin, value }) => begin === at && value !== null);
  const start = branchAt(turns[place].begin);
  const next = turns[place + 1];
  const end = next ? branchAt(next.begin) : { value: reward, value_error: 0 };
  return start && end
    ? withError(end.value - start.value, Math.hypot(end.value_error, start.value_error))
    : null;
}

/** Stretches of an episode that were given to the policy, as [first token, the one behind the last]. */
function told({ turns, measured }) {
  const ends = turns.map(({ end }) => end);
  return turns.length < 2 ? [] : [...turns.map(({ begin }, place) => [ends[place - 1] ?? 0, begin]),
    [ends.at(-1), measured.at(-1).end]].filter(([begin, end]) => begin < end);
}

/** The measured segment that token `i` is in; undefined where there is none. */
export function segmentOf(completion, i) {
  return completion.measured?.find(({ begin, end }) => begin <= i && i < end);
}

/** `0.25 ± 0.12`, the latter a standard error. */
export function withError(value, error) {
  return value === null ? "–" : `${short(value)} ± ${short(error)}`;
}

/** Tokens before each branch and its value, at last the reward at the end, which has no error. */
function valuePoints({ measured, reward }) {
  const branches = measured.map(({ begin, value, value_error: error, continuations }) =>
    ({ at: begin, value, error, said: `${withError(value, error)}, of ${counted(continuations, "continuation")}` }));
  return [...branches, { at: measured.at(-1).end, value: reward, error: 0, said: `${short(reward)}, the reward` }];
}

function valuePicture(points, given) {
  const known = points.filter(({ value }) => value !== null);
  const ends = known.flatMap(({ value, error }) => [value - ERRORS * error, value + ERRORS * error]);
  const grid = ticks(Math.min(0, ...ends), Math.max(1, ...ends));
  const last = points.at(-1).at || 1;
  const x = (at) => MARGIN.left + (at / last) * (PICTURE.width - MARGIN.left - MARGIN.right);
  const span = grid.at(-1) - grid[0];
  const y = (value) => PICTURE.height - MARGIN.bottom - ((value - grid[0]) / span) * (PICTURE.height - MARGIN.top - MARGIN.bottom);
  const picture = svg("svg", { viewBox: `0 0 ${PICTURE.width} ${PICTURE.height}`, role: "img", "aria-label": spokenValues(points) });
  for (const [begin, end] of given) {
    const place = { x: x(begin), width: x(end) - x(begin), y: MARGIN.top, height: PICTURE.height - MARGIN.top - MARGIN.bottom };
    picture.append(svg("rect", { ...place, class: "observed" }, svg("title", {}, "given to the policy")));
  }
  for (const tick of grid) {
    picture.append(
      svg("line", { x1: MARGIN.left, x2: PICTURE.width - MARGIN.right, y1: y(tick), y2: y(tick), class: "grid" }),
      svg("text", { x: MARGIN.left - 5, y: y(tick) + 3.5, "text-anchor": "end" }, short(tick)));
  }
  picture.append(
    svg("text", { x: MARGIN.left, y: PICTURE.height - 4 }, "token 1"),
    svg("text", { x: PICTURE.width - MARGIN.right, y: PICTURE.height - 4, "text-anchor": "end" }, String(last)));
  for (const run of measuredRuns(points)) {
    const upper = run.map(({ at, value, error }) => [x(at), y(value + ERRORS * error)]);
    const lower = run.map(({ at, value, error }) => [x(at), y(value - ERRORS * error)]).reverse();
    picture.append(
      svg("path", { d: `${outline([...upper, ...lower])}Z`, class: run.length === 1 ? "band alone" : "band" }),
      svg("path", { d: outline(run.map(({ at, value }) => [x(at), y(value)])), class: "curve" }));
  }
  for (const point of known) {
    const circle = svg("circle", { cx: x(point.at), cy: y(point.value), r: 3, class: "point" });
    circle.append(svg("title", {}, `${placeOf(point, last)}: ${point.said}`));
    picture.append(circle);
  }
  return picture;
}

/** Stretches of neighbours that were all measured: between others there is no line. */
function measuredRuns(points) {
  const found = [[]];
  for (const point of points) {
    if (point.value === null) {
      found.push([]);
    } else {
      found.at(-1).push(point);
    }
  }
  return found.filter((run) => run.length);
}

function outline(places) {
  return places.map(([px, py], place) => `${place ? "L" : "M"}${px.toFixed(1)},${py.toFixed(1)}`).join("");
}

function placeOf({ at }, last) {
  return at === last ? "at the end" : `before token ${at + 1}`;
}

/** What a screen reader says of the curve. */
function spokenValues(points) {
  const last = points.at(-1).at;
  const each = points.map((point) => `${placeOf(point, last)} ${point.value === null ? "not known" : point.said}`);
  return `Measured value ${each.join("; ")}`;
}
