// The curves of a run: a menu of all metrics, a chart for each chosen one.

import { drawChart } from "./chart.js";
import { byId, el, exact, short } from "./dom.js";
import { change, current } from "./state.js";

const PREFERRED = [
  "reward/mean", "eval/accuracy", "completion_length/mean", "staleness/mean", "logprob_gap/mean",
  "grad_norm",
];
const DEFAULT_COUNT = 4;

let charts = [];
let pointed = null; // the step under the pointer or the arrow keys
let drawn = { keys: [], series: {} };

/** The chosen metrics: the address's, else the first preferred ones that the run has. */
export function chosenMetrics(available) {
  const said = current().curves;
  if (said !== undefined) {
    return said.split(",").filter((key) => available.includes(key));
  }
  const liked = PREFERRED.filter((key) => available.includes(key));
  return (liked.length ? liked : available).slice(0, DEFAULT_COUNT);
}

/** Fill the menu; what is open or has the focus stays so. */
export function showMenu(available) {
  const chosen = chosenMetrics(available);
  const menu = byId("menu-items");
  const focused = document.activeElement?.closest("#menu-items") ? document.activeElement.value : null;
  const items = available.map((key) => {
    const box = el("input", { type: "checkbox", value: key, onchange: choose });
    box.checked = chosen.includes(key);
    return el("label", {}, box, key);
  });
  menu.replaceChildren(...items);
  [...menu.querySelectorAll("input")].find((box) => box.value === focused)?.focus();
}

function choose() {
  const boxes = [...byId("menu-items").querySelectorAll("input")];
  change({ curves: boxes.filter((box) => box.checked).map((box) => box.value).join(",") || "none" });
}

/** Draw the charts of `keys`, in place of those before. */
export function showCurves(keys, series) {
  drawn = { keys, series };
  const focused = document.activeElement?.dataset?.metric;
  charts = keys.map((key) => chart(key, series[key].filter(([step]) => step >= 0)));
  byId("charts").replaceChildren(...charts.map(({ figure }) => figure));
  charts.forEach((one) => one.draw());
  charts.find(({ key }) => key === focused)?.area.focus();
}

/** After the window's width changed. */
export function redrawCurves() {
  showCurves(drawn.keys, drawn.series);
}

function chart(key, points) {
  const readout = el("output", { class: "readout" });
  const area = el("div", {
    class: "area", tabindex: "0", role: "application", "data-metric": key,
    "aria-label": `${key}: arrow keys go from step to step, Enter shows the groups of a step`,
  });
  const figure = el("figure", {}, el("figcaption", {}, el("span", {}, key), readout), area);
  const one = { key, figure, area, point: () => null };
  one.say = (step) => {
    const last = points.at(-1);
    const [at, value] = step === null ? (last ?? [null, null]) : [step, one.point(step)];
    readout.textContent = at === null ? "" : `step ${at}: ${step === null ? short(value) : exact(value)}`;
  };
  one.draw = () => {
    if (!points.some(([, value]) => value !== null)) {
      area.replaceChildren(el("p", { class: "muted" }, "no values"));
      return;
    }
    const { picture, steps, point, stepAt } = drawChart(points, Math.max(200, area.clientWidth));
    one.point = point;
    area.replaceChildren(picture);
    listen(area, steps, (event) => stepAt(event.clientX - picture.getBoundingClientRect().left));
    one.say(null);
  };
  return one;
}

function listen(area, steps, stepOf) {
  area.onpointermove = (event) => pointAt(stepOf(event));
  area.onpointerleave = () => pointAt(null);
  area.onblur = () => pointAt(null);
  area.onclick = (event) => showStep(stepOf(event));
  area.onkeydown = (event) => {
    const index = pointed === null ? steps.length - 1 : steps.indexOf(pointed);
    const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: steps.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      pointAt(steps[Math.min(steps.length - 1, Math.max(0, moves[event.key]))]);
    } else if (event.key === "Enter" && pointed !== null) {
      showStep(pointed);
    }
  };
}

function pointAt(step) {
  pointed = step;
  for (const one of charts) {
    one.point(step);
    one.say(step);
  }
}

function showStep(step) {
  change({ step_min: String(step), step_max: String(step), page: null });
}
