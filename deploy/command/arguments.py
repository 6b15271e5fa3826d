"""The words of the command line: verbs, options and `key=value`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the words of a command line: options and `key=value`, in any order.

    argparse alone does not take the two mixed.
    """
    every = parser()
    options, rest = every.parse_known_args(arguments)
    if wrong := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        every.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    made = argparse.ArgumentParser(
        prog="grpo-lambda",
        description="Reinforcement learning of language models with verifiable rewards.",
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (
        ("train", "train a model; resume=runs/NAME goes on with a run"),
        ("plan", "resolve and check a configuration, print what would run, start nothing"),
    ):
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument(
            "--config", type=Path, default=None, help="YAML file (default: the smollm2 preset)"
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
        _add_trust(sub)
        if verb == "plan":
            sub.add_argument(
                "--devices",
                metavar="NxNAME",
                help="propose what fits these, as 1xRTX4090, 8xH100 or 2x8xH100 (two nodes)",
            )
            sub.add_argument(
                "--lengths", type=Path, help="run whose lengths of completions the prediction takes"
            )
            sub.add_argument(
                "--costs", type=Path, help="JSON file with measured costs to predict with"
            )
    _add_inspect(verbs)
    _add_replay(verbs)
    _add_prune(verbs)
    _add_credit(verbs)
    _add_eval(verbs)
    _add_values(verbs)
    text = "list the recipes and presets, a line each"
    verbs.add_parser("recipes", help=text, description=text)
    text = "print a completion script; in bash: source <(grpo-lambda completion bash)"
    sub = verbs.add_parser("completion", help=text, description=text)
    sub.add_argument("shell", choices=("bash", "zsh", "fish"))
    return made


def _add_inspect(verbs: Verbs) -> None:
    text = "a page that shows a run down to the credit of every token; or its account"
    sub = verbs.add_parser("inspect", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument(
        "--ledger",
        action="store_true",
        help="print what became of every completion; fails when the account does not close",
    )
    sub.add_argument("--port", type=int, help="port of the page, on loopback; 0 takes a free one")
    sub.add_argument(
        "--html", type=Path, metavar="FILE", help="write the page and a sample into one file"
    )
    sub.add_argument("--steps", type=int, help="with --html: take the newest N steps")
    sub.add_argument("--groups", type=int, help="with --html: take at most N groups")


def _add_replay(verbs: Verbs) -> None:
    text = "compute a step again from a run's log, and what another rule would do; or an episode"
    sub = verbs.add_parser("replay", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, help="learner step, from 1")
    what.add_argument(
        "--episode",
        metavar="GROUP/INDEX",
        help="tell the environment again what the policy said, and compare what it answers",
    )
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="recipe=NAME",
        help="with --step: another rule; algorithm. keys too",
    )
    _add_trust(sub)


def _add_prune(verbs: Verbs) -> None:
    text = "remove log and credit that no resume needs; the account still closes"
    sub = verbs.add_parser("prune", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory, of a run that is not going on")
    sub.add_argument(
        "--keep-steps",
        type=int,
        default=0,
        metavar="N",
        help="keep those of the last N steps before the newest checkpoint too (default: 0)",
    )
    sub.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")


def _add_credit(verbs: Verbs) -> None:
    text = "measure what segments of a step's answers were worth, by branches; whose credit agrees"
    sub = verbs.add_parser("credit", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--step", type=int, required=True, help="learner step, from 1")
    sub.add_argument(
        "--at",
        action="append",
        metavar="RULE",
        help="branch behind turns or sentences, at every:N-th token, at tokens below:P in "
        "probability, or at the start alone; several add up (default: turns, sentences, every:4)",
    )
    for name, default, text in (
        ("points", 12, "branches of a completion at most"),
        ("completions", 16, "completions at most, spread over the groups"),
        ("continuations", 8, "samples of each branch"),
        ("samples", 4000, "samples at most, in all"),
    ):
        sub.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    sub.add_argument("--seconds", type=float, help="begin no sample after so many")
    sub.add_argument(
        "--recipe",
        action="append",
        default=[],
        help="compare credit and gradient of this rule, beside those of the run: NAME, or "
        "NAME,key=value for keys of its own; may be repeated",
    )
    sub.add_argument("--out", type=Path, help="folder for results (default: in the run directory)")
    _add_trust(sub)


def _add_trust(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--trust-code",
        action="store_true",
        help="run the code that a run's own configuration names: rules by import path, a model's",
    )


def _add_eval(verbs: Verbs) -> None:
    text = "evaluate a model on suites; the same call again goes on where one was interrupted"
    usage = "grpo-lambda eval MODEL --suite NAME [--suite NAME ...] [options] [key=value ...]"
    sub = verbs.add_parser("eval", help=text, description=text, usage=usage)
    sub.add_argument("model", metavar="MODEL", help="folder, hub name, or builtin:NAME")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    sub.add_argument(
        "--suite",
        action="append",
        required=True,
        help="name in deploy/configs/suites, or a YAML file",
    )
    sub.add_argument(
        "--samples", type=int, help="samples of each problem (default: the suite's; 1 is greedy)"
    )
    sub.add_argument("--temperature", type=float, help="of sampling (default: the suite's)")
    sub.add_argument("--max-tokens", type=int, help="longest answer (default: the suite's)")
    sub.add_argument("--limit", type=int, help="take the first N problems only")
    sub.add_argument("--data", help="a .jsonl or .parquet file in place of the hub's data set")
    sub.add_argument(
        "--out",
        type=Path,
        help="folder for results (default: runs/eval-MODEL-SUITE; of several suites, their parent)",
    )


def _add_values(verbs: Verbs) -> None:
    text = "ask the untrained model and write each prompt's value into a data file (A*-PO)"
    usage = "grpo-lambda values --config FILE --out FOLDER [options] [key=value ...]"
    sub = verbs.add_parser("values", help=text, description=text, usage=usage)
    sub.add_argument(
        "--config", type=Path, default=None, help="that of the training (default: smollm2)"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    _add_trust(sub)
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="for data.jsonl; the same call again goes on where one was interrupted",
    )
    sub.add_argument("--samples", type=int, default=8, help="answers of each prompt (default: 8)")
    sub.add_argument("--beta", type=float, default=0.5, help="in beta log mean exp(reward / beta)")
    sub.add_argument("--column", default="v", help="name of the column (default: v)")
    sub.add_argument("--dry-run", action="store_true", help="print what it costs, start nothing")
