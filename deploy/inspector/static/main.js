// The page: what the address says, drawn; and, while the run goes on, looked after every few seconds.

import { chosenMetrics, redrawCurves, showCurves, showMenu } from "./curves.js";
import { byId, counted, el } from "./dom.js";
import { colourGroup, showGroup } from "./group.js";
import { openSource } from "./source.js";
import { current, onChange } from "./state.js";
import { buildTable, showControls, showEpisodes, showRows, tableQuery } from "./table.js";
import { hideDetails } from "./tokens.js";

const POLL_MS = 3000;
const SHARE = 10; // a look may take this part of the time between two

const source = openSource();
let facts = null;
let paused = false;
let asked = 0; // counts drawings, so that a late answer does not overwrite a newer one
let shownGroup = null; // JSON of the group on the page

/** Draw what the address says. `fresh`: the data changed, not only the address. */
async function draw(fresh) {
  asked += 1;
  const mine = asked;
  const id = current().group;
  const isLate = () => mine !== asked;
  byId("table").setAttribute("aria-busy", "true");
  try {
    await (id === undefined ? drawOverview(isLate) : drawGroup(id, fresh, isLate));
    fail(null);
  } catch (error) {
    if (!isLate()) {
      fail(error);
    }
  } finally {
    if (!isLate()) {
      byId("table").setAttribute("aria-busy", "false"); // its rows are those of its headings
    }
  }
}

function fail(error) {
  byId("failure").hidden = error === null;
  byId("failure").textContent = error === null ? "" : `This cannot be shown: ${error.message}`;
}

async function drawOverview(isLate) {
  const keys = chosenMetrics(facts.metrics);
  showMenu(facts.metrics);
  showControls();
  const [series, page] = await Promise.all([source.series(keys), source.groups(tableQuery())]);
  if (isLate()) {
    return;
  }
  const left = shownGroup === null ? null : JSON.parse(shownGroup).group;
  shownGroup = null;
  show("overview");
  showCurves(keys, series);
  showRows(page);
  if (left !== null) {
    byId("rows").querySelector(`[data-group="${left}"]`)?.focus();
  }
  if (page.searched < 1) {
    await draw(true); // goes on where the search stopped
  }
}

async function drawGroup(id, fresh, isLate) {
  if (!fresh && shownGroup !== null && String(JSON.parse(shownGroup).group) === id) {
    colourGroup();
    return;
  }
  const [data, page] = await Promise.all([source.group(id), source.groups(tableQuery())]);
  if (isLate()) {
    return;
  }
  const other = shownGroup === null || String(JSON.parse(shownGroup).group) !== id;
  show("group");
  showRows(page); // the groups before and after this one are the table's
  if (JSON.stringify(data) !== shownGroup) {
    shownGroup = JSON.stringify(data);
    showGroup(data);
  }
  if (other) {
    window.scrollTo(0, 0);
    byId("group-title").focus(); // what had the focus is not on the page any more
  }
}

function show(view) {
  byId("overview").hidden = view !== "overview";
  byId("group").hidden = view !== "group";
  if (view === "overview") {
    hideDetails();
  }
}

function showFacts() {
  document.title = `${facts.name} · grpo-lambda inspect`;
  byId("name").textContent = facts.name;
  byId("facts").textContent = [
    counted(facts.steps, "step"),
    counted(facts.groups, "group"),
    counted(facts.completions, "completion"),
    `credit of ${counted(facts.credit_steps, "step")}`,
  ].join(" · ");
  byId("config-text").textContent = facts.config;
  showEpisodes(facts.episodes);
  byId("notes").replaceChildren(...facts.notes.map((note) => el("li", {}, note)));
}

function showStatus(reached) {
  const time = new Date().toLocaleTimeString("en-GB");
  const run = facts?.live ? "The run goes on" : "The run has ended";
  const texts = { true: `${run} · looked at ${time}`, false: `No answer since ${time}` };
  byId("status").textContent = source.live ? (paused ? "Paused" : texts[reached]) : "A sample in one file";
  byId("status").className = facts?.live && reached && !paused ? "going" : "";
}

/** Look whether something changed; draw if so. Says how long that took, in ms. */
async function look() {
  const started = performance.now();
  try {
    const found = await source.facts();
    if (found !== null) {
      facts = found;
      showFacts();
      await draw(true);
    }
    showStatus(true);
  } catch (error) {
    showStatus(false);
    if (facts === null) {
      fail(error);
    }
  }
  return performance.now() - started;
}

async function keepLooking() {
  const took = paused || document.hidden ? 0 : await look();
  if (source.live) {
    setTimeout(keepLooking, Math.max(POLL_MS, took * SHARE));
  }
}

function togglePause() {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Go on" : "Pause";
  showStatus(true);
  if (!paused) {
    look();
  }
}

buildTable();
byId("pause").hidden = !source.live;
byId("pause").addEventListener("click", togglePause);
onChange(() => facts && draw(false));
window.addEventListener("resize", () => facts && !byId("overview").hidden && redrawCurves());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => colourGroup());
keepLooking();
