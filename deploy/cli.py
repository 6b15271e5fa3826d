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
from deploy.command.arguments import parse, parser

if TYPE_CHECKING:
    from common.config.sections import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 the run failed, 2 wrong input, 130 stopped."""
    options = parse(arguments)
    try:
        verb = _VERBS[options.verb]
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


def _load(options: argparse.Namespace) -> Config:
    from deploy.command.presets import load

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
    from deploy.command.presets import DEFAULT, choose

    if sys.stdin.isatty() and sys.stdout.isatty():
        options.config = choose()
    else:
        print(f"no --config: training the preset {DEFAULT}", flush=True)


def _plan(options: argparse.Namespace) -> int:
    from deploy.command.presets import load_with_origins
    from deploy.predict.plan import describe

    loaded = load_with_origins(options.config, options.overrides)
    print(describe(loaded, options.lengths, options.costs))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from deploy.command.presets import listing

    print(listing())
    return 0


def _completion(options: argparse.Namespace) -> int:
    from deploy.command.completion import script

    print(script(options.shell, parser()), end="")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    given = {
        name for name in ("port", "html", "steps", "groups") if vars(options)[name] is not None
    }
    if options.ledger:
        _refuse(given, "--ledger")
        from deploy.inspector.account import inspect_ledger

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


def _refuse(options: set[str], of: str) -> None:
    if options:
        raise UserError(f"--{' --'.join(sorted(options))}: no option of {of}")


def _replay(options: argparse.Namespace) -> int:
    from deploy.command.presets import RECIPES
    from deploy.inspector.replay import other_rule, replay
    from deploy.inspector.replay_report import describe, name_of

    rule = options.overrides
    other = other_rule(options.run, rule, RECIPES) if rule else None
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
    "recipes": _recipes,
    "completion": _completion,
    "inspect": _inspect,
    "replay": _replay,
    "eval": _eval,
}


def entry_point() -> None:
    """The console script. Rules of the user's own are found where it is started, as by `-m`."""
    sys.path.append(str(Path.cwd()))
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
