"""`grpo-lambda VERB`, the same as `python -m deploy.cli VERB`.

Heavy imports wait until a verb needs them, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import RunError, UserError
from deploy.command.arguments import parse, parser
from deploy.command.output import NobodyReadsError, Output

if TYPE_CHECKING:
    from common.config.sections import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 the run failed, 2 wrong input, 130 stopped."""
    options = parse(arguments)
    with contextlib.redirect_stdout(output := Output(sys.stdout)):
        output.goes_on = options.verb in ("train", "credit", "eval", "values")
        return _status(options)


def _status(options: argparse.Namespace) -> int:
    try:
        status = _VERBS[options.verb](options)
        sys.stdout.flush()
        return status
    except NobodyReadsError as error:
        return error.exit_code
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

    return load(options.config, options.overrides, trust_code=options.trust_code)


def _train(options: argparse.Namespace) -> int:
    if options.config is None and not options.overrides:
        _pick_preset(options)
    from common.supervision.garbage import nothing_collected

    config = _load(options)
    with nothing_collected():
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
    from deploy.command.presets import CONFIGS, FOR_DEVICES, load_with_origins
    from deploy.predict.plan import describe, describe_proposal

    trusted = options.trust_code
    if options.devices is None:
        loaded = load_with_origins(options.config, options.overrides, trust_code=trusted)
        print(describe(loaded, options.lengths, options.costs))
    else:
        config = options.config or CONFIGS / f"{FOR_DEVICES}.yaml"
        loaded = load_with_origins(config, options.overrides, trust_code=trusted)
        print(describe_proposal(loaded, options.devices, config))
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
    from deploy.command.trust import check_code
    from deploy.inspector.replay import other_rule, replay, run_config
    from deploy.inspector.replay_report import describe, name_of

    rule = options.overrides
    if options.episode is not None:
        return _replay_episode(options)
    if not options.trust_code:
        # A step needs no environment: what it said is in the log.
        check_code(run_config(options.run), options.run, rule, ignored=("environment",))
    others = [other_rule(options.run, rule, RECIPES)] if rule else []
    found = replay(options.run, options.step, *others)
    print(describe(found, name_of(options.run)))
    return int(bool(found.differences))


def _replay_episode(options: argparse.Namespace) -> int:
    from deploy.command.trust import check_code
    from deploy.inspector.replay import run_config
    from deploy.inspector.replay_episode import describe_episode, replay_episode

    if options.overrides:
        raise UserError(f"{options.overrides[0]}: another rule goes with --step")
    if not options.trust_code:
        check_code(run_config(options.run), options.run, [])
    found = replay_episode(options.run, options.episode)
    print(describe_episode(found))
    return int(found.parting is not None)


def _prune(options: argparse.Namespace) -> int:
    from deploy.run.pruning import describe, prune

    found, size = prune(options.run, options.keep_steps, options.dry_run, print)
    print(describe(found, size, options.dry_run))
    return 0


def _credit(options: argparse.Namespace) -> int:
    from deploy.command.trust import check_code
    from deploy.credit.launch import Options, measure
    from deploy.inspector.replay import run_config

    if not options.trust_code:
        config = run_config(options.run)
        refused = ("environment",) if config.environment.command is not None else ()
        check_code(config, options.run, options.recipe, ignored=refused)
    chosen = {} if options.at is None else {"at": options.at}
    if options.seconds is not None:
        chosen["seconds"] = options.seconds
    measure(
        Options(
            run=options.run,
            step=options.step,
            points=options.points,
            completions=options.completions,
            continuations=options.continuations,
            samples=options.samples,
            recipes=options.recipe,
            out=options.out,
            **chosen,
        )
    )
    return 0


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


def _values(options: argparse.Namespace) -> int:
    from deploy.eval.values import ValueOptions, make_values

    make_values(
        ValueOptions(
            _load(options),
            out=options.out,
            samples=options.samples,
            beta=options.beta,
            column=options.column,
            dry_run=options.dry_run,
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
    "prune": _prune,
    "credit": _credit,
    "eval": _eval,
    "values": _values,
}


def entry_point() -> None:
    """The console script. Rules of the user's own are found where it is started, as by `-m`."""
    sys.path.append(str(Path.cwd()))
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
