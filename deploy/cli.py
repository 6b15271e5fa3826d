"""`grpo-lambda VERB`, the same as `python -m deploy.cli VERB`.

Heavy imports wait until a verb needs them, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import RunError, UserError

if TYPE_CHECKING:
    from common.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 the run failed, 2 wrong input, 130 stopped."""
    options = _parser().parse_args(arguments)
    try:
        verb = {
            "train": _train,
            "plan": _plan,
            "recipes": _recipes,
            "inspect": _inspect,
            "completion": _completion,
        }[options.verb]
        return verb(options)
    except (UserError, RunError) as error:
        print(f"\nerror: {_message(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; the run directory can be resumed or read", file=sys.stderr)
        return 130
    except BaseException as error:
        from asyncio import CancelledError  # slow to import, and only a run raises it

        if not isinstance(error, CancelledError):
            raise
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
    text = "list the recipes and presets, a line each"
    verbs.add_parser("recipes", help=text, description=text)
    text = "print a completion script; in bash: source <(grpo-lambda completion bash)"
    sub = verbs.add_parser("completion", help=text, description=text)
    sub.add_argument("shell", choices=("bash", "zsh", "fish"))
    text = "what became of every completion of a run; fails when the account does not close"
    sub = verbs.add_parser("inspect", help=text, description=text)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--ledger", action="store_true", required=True, help="print the account")
    return parser


def _load(options: argparse.Namespace) -> Config:
    from deploy.presets import load

    return load(options.config, options.overrides)


def _train(options: argparse.Namespace) -> int:
    if options.config is None and not options.overrides:
        _pick_preset(options)
    config = _load(options)
    from deploy.launch import train

    train(config)
    return 0


def _pick_preset(options: argparse.Namespace) -> None:
    """A person is asked; a script gets the default, and is told so."""
    from deploy.presets import DEFAULT, choose

    if sys.stdin.isatty() and sys.stdout.isatty():
        options.config = choose()
    else:
        print(f"no --config: training the preset {DEFAULT}", flush=True)


def _plan(options: argparse.Namespace) -> int:
    from deploy.plan import describe

    print(describe(_load(options), options.lengths, options.costs))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from deploy.presets import listing

    print(listing())
    return 0


def _completion(options: argparse.Namespace) -> int:
    from deploy.completion import script

    print(script(options.shell, _parser()), end="")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from deploy.account import inspect_ledger

    return inspect_ledger(options.run)


def entry_point() -> None:
    """The console script. Rules of the user's own are found where it is started, as by `-m`."""
    sys.path.append(str(Path.cwd()))
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
