// The table of groups: sort, filters, pages. What it shows is always the state of the address.

import { byId, counted, el, short } from "./dom.js";
import { ENDS, PAGE_SIZE, RANGES } from "./source.js";
import { address, change, current } from "./state.js";

const COLUMNS = [
  ["group", "Group", "number"],
  ["step", "Step", "number"],
  ["question", "Question", "text"],
  ["reward", "Mean reward", "number"],
  ["spread", "Reward spread", "number"],
  ["length", "Mean length", "number"],
  ["turns", "Mean turns", "number"],
  ["tool_errors", "Tool errors", "number"],
  ["staleness", "Staleness", "number"],
  ["completions", "Completions", "number"],
  ["state", "State", "text"],
];
const TITLES = {
  reward: "Mean over the completions that have a reward",
  spread: "Standard deviation over the completions that have a reward",
  length: "Mean of the sampled tokens of a completion",
  turns: "Mean over the completions",
  tool_errors: "Tool calls of all completions that could not be made",
  staleness: "Versions between the group's dispatch and the step that trained on it",
  state: "What the ledger says became of the group",
};

const OF_EPISODES = ["turns", "tool_errors", "end"];
export const ENDED = {
  stop: "ended itself", length: "cut at the limit", turns: "out of turns", context: "context full",
  error: "environment failed", timeout: "environment too slow",
};

let episodes = false; // whether the run has any of several turns
let shown = [];
let total = 0;

/** The query of the present address, as the sources take it. */
export function tableQuery() {
  const state = current();
  const descending = state.sort.startsWith("-");
  const query = { sort: state.sort.replace(/^-/, ""), descending: String(descending), page: state.page };
  for (const key of ["text", "end", ...RANGES.flatMap((name) => [`${name}_min`, `${name}_max`])]) {
    if (state[key]) {
      query[key] = state[key];
    }
  }
  return query;
}

/** The groups before and after `id` in the table, where they are on its page. */
export function neighbours(id) {
  const index = shown.findIndex((row) => String(row.group) === String(id));
  return index < 0 ? [] : [shown[index - 1]?.group, shown[index + 1]?.group];
}

/** Build the filters and the pager, once. */
export function buildTable() {
  const form = byId("filters");
  form.append(
    el("label", { class: "wide" }, "Text in prompt or completion",
      el("input", { type: "search", name: "text", maxlength: "200", autocomplete: "off" })),
    ...RANGES.map(range),
    el("label", { class: "choice", "data-of": "end" }, "An episode",
      el("select", { name: "end" }, el("option", { value: "" }, "any"),
        ...ENDS.map((end) => el("option", { value: end }, ENDED[end])))),
    el("button", { type: "button", id: "clear", onclick: clear }, "Clear"),
  );
  form.addEventListener("change", (event) => change({ [event.target.name]: event.target.value, page: null }));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("previous-page").addEventListener("click", () => turn(-1));
  byId("next-page").addEventListener("click", () => turn(1));
}

function range(name) {
  const bound = (end) =>
    el("input", {
      type: "number", step: "any", name: `${name}_${end}`, placeholder: end,
      "aria-label": `${name.replaceAll("_", " ")}, ${end === "min" ? "at least" : "at most"}`,
    });
  const words = name.replaceAll("_", " ");
  const legend = el("legend", {}, words[0].toUpperCase() + words.slice(1));
  return el("fieldset", { "data-of": name }, legend, bound("min"), el("span", { "aria-hidden": "true" }, "–"), bound("max"));
}

function clear() {
  const names = [...byId("filters").elements].map((field) => field.name).filter(Boolean);
  change({ ...Object.fromEntries(names.map((name) => [name, null])), page: null });
}

function turn(by) {
  change({ page: String(Number(current().page) + by) });
}

/** What only episodes of several turns have is shown where the run has any. */
export function showEpisodes(any) {
  episodes = any;
  for (const filter of byId("filters").querySelectorAll("[data-of]")) {
    filter.hidden = !any && OF_EPISODES.includes(filter.dataset.of);
  }
}

function columns() {
  return COLUMNS.filter(([name]) => episodes || !OF_EPISODES.includes(name));
}

/** Put the address's filters and sort into the controls. */
export function showControls() {
  const state = current();
  for (const field of byId("filters").elements) {
    if (field.name && field !== document.activeElement) {
      field.value = state[field.name] ?? "";
    }
  }
  const focused = document.activeElement?.dataset?.column;
  byId("columns").replaceChildren(...columns().map((column) => heading(column, state.sort)));
  byId("columns").querySelector(`[data-column="${focused}"]`)?.focus();
}

function heading([name, label, kind], sort) {
  const sorted = { [name]: "ascending", [`-${name}`]: "descending" }[sort];
  const next = sort === `-${name}` || (kind === "text" && sort !== name) ? name : `-${name}`;
  const mark = { ascending: " ↑", descending: " ↓" }[sorted] ?? "";
  const button = el("button", {
    type: "button", "data-column": name, title: TITLES[name],
    onclick: () => change({ sort: next, page: null }),
  }, label, el("span", { "aria-hidden": "true" }, mark));
  return el("th", { scope: "col", class: kind, "aria-sort": sorted }, button);
}

/** Show a page of the table; the focus stays on its row. */
export function showRows({ rows, total: all, searched }) {
  [shown, total] = [rows, all];
  const focused = document.activeElement?.dataset?.group;
  byId("rows").replaceChildren(...rows.map(line));
  byId("rows").querySelector(`[data-group="${focused}"]`)?.focus();
  const share = searched < 1 ? `, ${Math.floor(searched * 100)} % of the log searched so far` : "";
  byId("count").textContent = counted(all, "group") + share;
  const [page, pages] = [Number(current().page), Math.max(1, Math.ceil(total / PAGE_SIZE))];
  byId("page-number").textContent = `Page ${page.toLocaleString("en")} of ${pages.toLocaleString("en")}`;
  byId("previous-page").disabled = page <= 1;
  byId("next-page").disabled = page >= pages;
}

function line(row) {
  const href = address({ group: String(row.group) });
  const link = el("a", { href, "data-group": row.group }, String(row.group));
  const cells = columns().map(([name, , kind]) => {
    if (name === "group") {
      return el("td", { class: kind }, link);
    }
    if (name === "state") {
      return el("td", { class: kind }, el("span", { class: `state ${row.state ?? ""}` }, row.state ?? "–"));
    }
    const text = kind === "text" ? (row[name] ?? "–") : short(row[name]);
    const [shown, title] = name === "question" ? [ends(text), text] : [text, null];
    return el("td", { class: `${kind} column-${name}`, title }, shown);
  });
  return el("tr", { onclick: (event) => event.target.closest("a") ?? change({ group: String(row.group) }) }, ...cells);
}

/** Where questions differ is seldom their beginning. */
function ends(text) {
  return text.length > 60 ? `${text.slice(0, 14).trimEnd()} … ${text.slice(-32).trimStart()}` : text;
}
