"""The generated parts of deploy/configs/recipes/README.md: `python tests/support/recipe_pages.py`.

Between the marks of a recipe stand its constants, as its YAML resolves to them, and its rows of the
tables in tests/bench/results/. A test holds that the page is up to date. The rest is by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from oracle_table import with_table  # noqa: E402

from common.config.load import load_config  # noqa: E402
from deploy.command.presets import RECIPES, config_files  # noqa: E402

PAGE = RECIPES / "README.md"
RESULTS = ROOT / "tests" / "bench" / "results"
ROWS = {
    "dapo": [("recipes", "DAPO"), ("updates", "DAPO, 8 updates")],
    "dr_grpo": [("recipes", "Dr. GRPO")],
    "g2rpo_a": [
        ("guidance", label) for label in ("GRPO", "G2RPO-A, 1/4 guided", "G2RPO-A, 3/4 guided")
    ],
    "grpo": [
        ("recipes", "GRPO"),
        ("recipes", "GRPO, advantages clamped"),
        ("recipes", "GRPO, twice the learning rate"),
        ("epochs", "GRPO, two epochs"),
        ("updates", "GRPO, 1 update"),
        ("updates", "GRPO, 4 updates"),
        ("updates", "GRPO, ratio to the sampler"),
        ("teachers", "GRPO"),
    ],
    "grpo_lambda_cut": [
        (table, f"{kind}, S = {staleness}")
        for table in ("staleness", "long")
        for staleness in (0, 2, 8)
        for kind in ("cut by the product", "cut by factors", "plain traces")
    ],
    **{
        recipe: [("updates", label) for label in labels]
        for recipe, labels in {
            "gspo": ["GSPO, 4 updates", "GSPO, ratio to the sampler"],
            "gmpo": ["GMPO, 8 updates"],
            "cispo": ["CISPO, 1 update", "CISPO, ratio to the sampler"],
            "sapo": ["SAPO, ratio to the sampler"],
            "dppo": ["DPPO, ratio to the sampler"],
            "vespo": ["VESPO, ratio to the sampler"],
            "s_trace_like": ["S-trace-like, 4 updates"],
        }.items()
    },
    "opd": [("teachers", "OPD, larger teacher")],
    "grpo_opd": [("teachers", "GRPO and OPD, larger teacher")],
    "rlsd": [("teachers", label) for label in ("RLSD", "RLSD, scorer follows the policy")],
    "sdpo": [("teachers", "SDPO")],
    "tempo": [("teachers", "TEMPO")],
    "vapo": [("teachers", "VAPO")],
    "ktae": [("teachers", "KTAE")],
    "grpo_lambda_entropy_mask": [("recipes", "selective traces")],
    "grpo_lambda_terminal": [("recipes", "terminal trace (ablation)")],
    "lambda_grpo": [("recipes", "λ-GRPO (2510.06870)")],
    "lambda_grpo_prefix": [("recipes", "λ-GRPO, prefix sets (2509.21154)")],
} | {
    f"grpo_lambda_{shape}{name}": [
        ("recipes", f"GRPO-λ {shape} {application}"),
        ("recipes", f"GRPO-λ {shape} {application}, no clamp"),
        ("epochs", f"GRPO-λ {shape} {application}, two epochs"),
        *(
            ("updates", f"GRPO-λ {shape} {application}, {what}")
            for what in ("4 updates", "ratio to the sampler", "normalised")
        ),
    ]
    for shape in ("recent", "both")
    for application, name in (("ε-trace", ""), ("ε-weight", "_weight"))
}
"""Rows of the tables of results, by recipe. Those that have not been measured are left out."""


def rows_of(name: str) -> list[tuple[str, str]]:
    """The rows of a recipe that there are: table and label."""
    there = [(table, label) for table, label in ROWS.get(name, []) if _is_there(table)]
    return [(table, label) for table, label in there if label in results(table)[1]]


def _is_there(table: str) -> bool:
    return (RESULTS / f"{table}.md").is_file()


RUBRIC = (
    "verifier.rules='[{name: rubric, args: {criteria: "
    '[{text: "It is {answer}.", pattern: "[= ]{answer}$"}, '
    """{text: It has steps., pattern: ";"}]}}]'"""
)
OVERRIDES = {
    "guide": " algorithm.rollout.follow_up.hint=answer",
    "rgr_grpo": " model.max_length=256 \\\n"
    f"        algorithm.rollout.follow_up.feedback_tokens=64 \\\n        {RUBRIC}",
    "ruscarl": f" \\\n        {RUBRIC}",
    "sgpo": " \\\n        verifier.rules='[{name: reasoning_gym, weight: 0}, "
    "{name: right_prefix, args: {first_wrong: sums}}]'",
    "spo_tree": " algorithm.rollout.follow_up.tree.every=6 \\\n"
    "        algorithm.rollout.follow_up.tree.children='[2, 2]'",
    "g2rpo_a": " data.source=file data.path=FILE \\\n        data.solution_column=solution "
    "algorithm.rollout.guidance.max_tokens=8 verifier.rules='[{name: math_answer}]'",
}
"""What a recipe needs besides on the tiny preset."""


def begin(name: str) -> str:
    return f"<!-- {name}: made by tests/support/recipe_pages.py -->\n"


END = "<!-- end -->\n"


def constants(name: str) -> Iterator[tuple[str, object]]:
    """The keys that the recipe's file sets, with what they resolve to."""
    config = load_config([], ["model.path=none", f"recipe={name}"], RECIPES)
    resolved = OmegaConf.structured(config)

    def leaves(node: object, prefix: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix

    written = OmegaConf.to_container(OmegaConf.load(RECIPES / f"{name}.yaml"))
    for key in leaves(written, ""):
        yield key, OmegaConf.select(resolved, key)


def results(table: str) -> tuple[str, dict[str, list[str]]]:
    """(the command that made a table, its cells by label)."""
    text = (RESULTS / f"{table}.md").read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 7:
            rows[cells[0]] = cells
    return text.splitlines()[0].strip("`"), rows


def shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, ListConfig):
        return json.dumps(OmegaConf.to_container(value))
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def part(name: str) -> str:
    """The generated part of a recipe's section."""
    lines = ["| constant | value |", "|---|---|"]
    lines += [f"| `{key}` | {shown(value)} |" for key, value in constants(name)]
    by_table: dict[str, list[str]] = {}
    for table, label in rows_of(name):
        by_table.setdefault(table, []).append(label)
    for table, labels in by_table.items():
        command, rows = results(table)
        lines += [
            "",
            f"Measured by `{command}` (`tests/bench/results/{table}.md`):",
            "",
            "| row | seeds | held-out accuracy, % | area under the training curve, % |",
            "|---|---|---|---|",
            *("| " + " | ".join(rows[label][:4]) + " |" for label in labels),
        ]
    if not by_table:
        lines += ["", "Not compared here: `make test-recipes` trains it for ten steps."]
    command = f"train --config deploy/configs/tiny.yaml recipe={name}{OVERRIDES.get(name, '')}"
    lines += ["", f"    .venv/bin/grpo-lambda {command}"]
    return "\n".join(lines) + "\n"


def with_parts(text: str) -> str:
    """`text` with every generated part between its marks."""
    for entry in config_files(RECIPES):
        pattern = re.escape(begin(entry.name)) + ".*?" + re.escape(END)
        filled = f"{begin(entry.name)}{part(entry.name)}{END}"
        text = re.sub(pattern, lambda _, filled=filled: filled, text, flags=re.DOTALL)
    return with_table(text)


if __name__ == "__main__":
    PAGE.write_text(with_parts(PAGE.read_text()))
