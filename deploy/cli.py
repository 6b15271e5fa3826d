"""`grpo-lambda VERB`, the same as `python -m deploy.cli VERB`.

Heavy imports wait until a verb needs them, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import Config
from common.errors import RunError, UserError

CONFIGS = Path(__file__).resolve().parent / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 the run failed, 2 wrong input, 130 stopped."""
    options = _parse(arguments)
    try:
        verb = _VERBS[options.verb]
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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and `key=value` in any order, which argparse alone does not take."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if wrong := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


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
    _add_inspect(verbs)
    _add_replay(verbs)
    _add_eval(verbs)
    return parser


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "a page that shows a run down to the credit of every token; or its account"
    sub = verbs.add_parser("inspect", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument(
        "--ledger",
        action="store_true",
        help="print what became of every completion; fails when the account does not close",
    )
    sub.add_argument("--port", type=int, help="of the page, on loopback; 0 takes a free one")
    sub.add_argument(
        "--html", type=Path, metavar="FILE", help="write the page and a sample into one file"
    )
    sub.add_argument("--steps", type=int, help="with --html: of the newest N steps")
    sub.add_argument("--groups", type=int, help="with --html: at most N groups")


def _add_replay(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "compute a step of a run again from its log, and what another credit rule would do"
    sub = verbs.add_parser("replay", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--step", type=int, required=True, help="learner step, from 1")
    sub.add_argument(
        "overrides", nargs="*", metavar="recipe=NAME", help="another rule; algorithm. keys too"
    )


def _add_eval(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "evaluate a model on suites; the same call again goes on where one was interrupted"
    usage = "grpo-lambda eval MODEL --suite NAME [--suite NAME ...] [options] [key=value ...]"
    sub = verbs.add_parser("eval", help=text, description=text, usage=usage)
    sub.add_argument("model", metavar="MODEL", help="folder, hub name, or builtin:NAME")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
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
    given = {name for name in ("port", "html", "steps", "groups") if _is_given(options, name)}
    if options.ledger:
        _refuse(given, "--ledger")
        from deploy.account import inspect_ledger

        return inspect_ledger(options.run)
    if options.html is not None:
        _refuse(given & {"port"}, "--html")
        from deploy.inspector.single_file import GROUPS, STEPS, write_html

        steps = STEPS if options.steps is None else options.steps
        groups = GROUPS if options.groups is None else options.groups
        write_html(options.run, options.html, steps, groups)
        return 0
    _refuse(given & {"steps", "groups"}, "the page; they go with --html")
    from deploy.inspector.server import PORT, serve

    serve(options.run, PORT if options.port is None else options.port)
    return 0


def _is_given(options: argparse.Namespace, name: str) -> bool:
    return getattr(options, name) is not None


def _refuse(options: set[str], of: str) -> None:
    if options:
        raise UserError(f"--{' --'.join(sorted(options))}: no option of {of}")


def _replay(options: argparse.Namespace) -> int:
    from deploy.replay import other_rule, replay
    from deploy.replay_report import describe, name_of

    rule = options.overrides
    other = other_rule(options.run, rule, CONFIGS / "recipes") if rule else None
    found = replay(options.run, options.step, other)
    print(describe(found, name_of(options.run)))
    return int(bool(found.differences))


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


_VERBS = {
    "train": _train,
    "plan": _plan,
    "inspect": _inspect,
    "replay": _replay,
    "eval": _eval,
}


def entry_point() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
