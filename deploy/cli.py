"""`grpo-lambda VERB`, the same as `python -m deploy.cli VERB`.

Heavy imports wait until a verb needs them, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import RunError, UserError

CONFIGS = Path(__file__).resolve().parent / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 the run failed, 2 wrong input, 130 stopped."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.verb == "eval" and not any(word.startswith("-") for word in rest):
        options.overrides = rest  # argparse takes positionals in one place only
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        verb = {"train": _train, "plan": _plan, "inspect": _inspect, "eval": _eval}[options.verb]
        return verb(options)
    except (UserError, RunError) as error:
        print(f"\nerror: {_message(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; the run directory can be resumed or read", file=sys.stderr)
        return 130
    except asyncio.CancelledError:
        print("\nstopped by SIGTERM; the run directory can be resumed or read", file=sys.stderr)
        return 143


def _message(error: Exception) -> str:
    """What the actor raised, without Ray's wrapping."""
    return str(getattr(error, "cause", None) or error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo-lambda",
        description="Reinforcement learning of language models with verifiable rewards.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (
        ("train", "train a model; resume=runs/NAME goes on with a run"),
        ("plan", "resolve and check a configuration, print what would run, start nothing"),
    ):
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument(
            "--config", type=Path, default=None, help="YAML file (default: the smollm2 preset)"
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
        if verb == "plan":
            sub.add_argument("--lengths", type=Path, help="a run whose lengths a prediction takes")
            sub.add_argument("--costs", type=Path, help="JSON of measured costs to predict with")
    text = "what became of every completion of a run; fails when the account does not close"
    sub = verbs.add_parser("inspect", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--ledger", action="store_true", required=True, help="print the account")
    _add_eval(verbs)
    return parser


def _add_eval(verbs: Any) -> None:  # the type is private to argparse
    text = "evaluate a model on suites; the same call again goes on where one was interrupted"
    usage = "grpo-lambda eval MODEL --suite NAME [--suite NAME ...] [options] [key=value ...]"
    sub = verbs.add_parser("eval", help=text, description=text, usage=usage)
    sub.add_argument("model", metavar="MODEL", help="folder, hub name, or builtin:NAME")
    sub.add_argument(
        "--suite", action="append", required=True, help="of deploy/configs/suites, or a YAML file"
    )
    sub.add_argument("--samples", type=int, help="a problem (default: the suite's; 1 is greedy)")
    sub.add_argument("--temperature", type=float, help="(default: the suite's)")
    sub.add_argument("--max-tokens", type=int, help="of an answer (default: the suite's)")
    sub.add_argument("--limit", type=int, help="only so many problems, the first ones")
    sub.add_argument("--data", help="a .jsonl or .parquet file in place of the hub's data set")
    sub.add_argument(
        "--out", type=Path, help="folder (default: runs/eval-MODEL-SUITE; of several, their parent)"
    )


def _load(options: argparse.Namespace) -> Config:
    from common.config_loader import load_config

    path: Path | None = options.config
    resumed = [o.partition("=")[2] for o in options.overrides if o.startswith("resume=")]
    resumed = [run for run in resumed if run != "auto"]  # goes with --config
    resolved = path is None and bool(resumed)
    if path is None and resumed:
        path = Path(resumed[-1]) / "config.yaml"
        if not path.is_file():
            raise UserError(f"resume={resumed[-1]}: there is no run in this folder")
    elif path is None:
        path = CONFIGS / "smollm2.yaml"
    config = load_config([path], options.overrides, CONFIGS / "recipes", resolved=resolved)
    from learner.recipe import check_recipe

    check_recipe(config.algorithm, config.correction_kind, config.generator.max_completion_tokens)
    return config


def _train(options: argparse.Namespace) -> int:
    config = _load(options)
    from deploy.launch import train

    train(config)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from deploy.plan import describe

    print(describe(_load(options), options.lengths, options.costs))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from deploy.account import inspect_ledger

    return inspect_ledger(options.run)


def _eval(options: argparse.Namespace) -> int:
    from deploy.eval.launch import evaluate
    from deploy.eval.settings import Options

    evaluate(
        Options(
            model=options.model,
            suites=options.suite,
            overrides=options.overrides,
            samples=options.samples,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            limit=options.limit,
            data=options.data,
            out=options.out,
        )
    )
    return 0


def entry_point() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
