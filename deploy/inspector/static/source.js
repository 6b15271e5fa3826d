// Where the data come from: the server, or the sample that a single file embeds. Both answer the
// same four questions: facts(), series(keys), groups(query), group(id).

export const RANGES = ["reward", "length", "turns", "tool_errors", "staleness", "step"];
export const ENDS = ["stop", "length", "turns", "context", "error", "timeout"];
export const PAGE_SIZE = 50;

/** The source of this page. */
export function openSource() {
  const embedded = document.getElementById("embedded");
  return embedded ? new EmbeddedSource(JSON.parse(embedded.textContent)) : new ServerSource();
}

class ServerSource {
  live = true;
  #version = null;

  /** Facts of the run, or null when nothing changed since the last call. */
  async facts() {
    const headers = this.#version ? { "If-None-Match": this.#version } : {};
    // A cache of the browser's own would answer 200 for the server's 304.
    const response = await fetch("api/run", { headers, cache: "no-store" });
    if (response.status === 304) {
      return null;
    }
    const facts = await answer(response);
    this.#version = response.headers.get("ETag");
    return facts;
  }

  async series(keys) {
    const query = new URLSearchParams(keys.map((key) => ["key", key]));
    return keys.length ? answer(await fetch(`api/metrics?${query}`)) : {};
  }

  async groups(query) {
    return answer(await fetch(`api/groups?${new URLSearchParams(query)}`));
  }

  async group(id) {
    return answer(await fetch(`api/groups/${encodeURIComponent(id)}`));
  }
}

async function answer(response) {
  const body = await response.json();
  if (!response.ok) {
    throw new Error(body.error);
  }
  return body;
}

class EmbeddedSource {
  live = false;
  #data;
  #told = false;

  constructor(data) {
    this.#data = data;
  }

  async facts() {
    const first = !this.#told;
    this.#told = true;
    return first ? this.#data.facts : null;
  }

  async series(keys) {
    return Object.fromEntries(keys.map((key) => [key, this.#data.series[key] ?? []]));
  }

  async groups(query) {
    const texts = new Map(this.#data.details.map((group) => [group.group, textsOf(group)]));
    const needle = (query.text ?? "").toLowerCase();
    const found = this.#data.rows.filter(
      (row) => inRanges(row, query) && (!query.end || row.ends.includes(query.end)) && texts.get(row.group).some((text) => text.includes(needle)),
    );
    found.sort((a, b) => compared(a, b, query.sort, query.descending === "true"));
    const first = (Number(query.page) - 1) * PAGE_SIZE;
    const rows = found.slice(first, first + PAGE_SIZE);
    return { total: found.length, searched: 1, rows };
  }

  async group(id) {
    const found = this.#data.details.find((group) => String(group.group) === String(id));
    if (!found) {
      throw new Error(`group ${id} is not in this file`);
    }
    return found;
  }
}

function textsOf(group) {
  const completions = group.completions.map((completion) => completion.text.toLowerCase());
  return [group.prompt_text.toLowerCase(), ...completions];
}

function inRanges(row, query) {
  return RANGES.every((name) => {
    const low = query[`${name}_min`];
    const high = query[`${name}_max`];
    const bounded = low !== undefined || high !== undefined;
    return (
      !(bounded && row[name] === null) &&
      !(low !== undefined && row[name] < Number(low)) &&
      !(high !== undefined && row[name] > Number(high))
    );
  });
}

/** As the server sorts: missing values last either way, ties by group. */
function compared(a, b, name, descending) {
  const [x, y] = [a[name], b[name]];
  if (x === y) {
    return name === "group" ? 0 : a.group - b.group;
  }
  if (x === null || y === null) {
    return x === null ? 1 : -1;
  }
  return (x < y ? -1 : 1) * (descending ? -1 : 1);
}
