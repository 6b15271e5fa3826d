// One curve as SVG. All charts share the step under the pointer, and a click chooses a step.

import { short, svg } from "./dom.js";

const HEIGHT = 120;
const EDGE = { top: 8, right: 10, bottom: 18, left: 44 };

/** Round numbers from at or below `low` to at or above `high`, three to five of them. */
export function ticks(low, high) {
  const rough = (high - low) / 3 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * (1 - 1e-9));
  const first = Math.floor(low / step + 1e-9);
  const count = Math.ceil(high / step - 1e-9) - first;
  return Array.from({ length: count + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

/** Draw `points` ([[step, value], ...]; null values leave a gap) into an SVG `width` wide. */
export function drawChart(points, width) {
  const known = points.filter(([, value]) => value !== null);
  const steps = points.map(([step]) => step);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const values = known.map(([, value]) => value);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) {
    [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  }
  const grid = ticks(low, high);
  const x = scaled(first, last, EDGE.left, width - EDGE.right);
  const y = scaled(grid[0], grid.at(-1), HEIGHT - EDGE.bottom, EDGE.top);
  const picture = svg("svg", {
    width,
    height: HEIGHT,
    viewBox: `0 0 ${width} ${HEIGHT}`,
    "aria-hidden": "true",
  });
  for (const tick of grid) {
    const line = { x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick), class: "grid" };
    const label = { x: EDGE.left - 6, y: y(tick) + 3.5, "text-anchor": "end" };
    picture.append(svg("line", line), svg("text", label, short(tick)));
  }
  for (const [step, anchor] of first === last ? [[first, "start"]] : [[first, "start"], [last, "end"]]) {
    picture.append(svg("text", { x: x(step), y: HEIGHT - 4, "text-anchor": anchor }, String(step)));
  }
  picture.append(svg("path", { d: path(points, x, y), class: "curve" }));
  for (const [step, value] of alone(points)) {
    picture.append(svg("circle", { cx: x(step), cy: y(value), r: 2.5, class: "point" }));
  }
  const cursor = svg("g", { class: "cursor", visibility: "hidden" });
  picture.append(cursor);
  return { picture, steps, point: (step) => mark(cursor, points, step, x, y), stepAt: nearest(steps, x) };
}

function scaled(from, to, start, end) {
  const span = to - from || 1;
  return (value) => start + ((value - from) / span) * (end - start);
}

function path(points, x, y) {
  let joined = false;
  const parts = [];
  for (const [step, value] of points) {
    if (value !== null) {
      parts.push(`${joined ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`);
    }
    joined = value !== null;
  }
  return parts.join("");
}

/** Points without neighbours, which a line would not show. */
function alone(points) {
  const known = (index) => points[index] !== undefined && points[index][1] !== null;
  return points.filter((_, index) => known(index) && !known(index - 1) && !known(index + 1));
}

function nearest(steps, x) {
  return (pixel) =>
    steps.reduce((best, step) =>
      Math.abs(x(step) - pixel) < Math.abs(x(best) - pixel) ? step : best,
    );
}

/** Mark `step`, or nothing when it is null; its value. */
function mark(cursor, points, step, x, y) {
  const found = points.find(([at]) => at === step);
  cursor.replaceChildren();
  cursor.setAttribute("visibility", found ? "visible" : "hidden");
  if (found) {
    const at = x(step);
    cursor.append(svg("line", { x1: at, x2: at, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    if (found[1] !== null) {
      cursor.append(svg("circle", { cx: at, cy: y(found[1]), r: 3.5 }));
    }
  }
  return found ? found[1] : null;
}
