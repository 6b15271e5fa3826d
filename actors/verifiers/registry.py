"""From a rule in the configuration to something that can be called.

`verifier_names`: the column names of the rules. `resolve`: the callable, its arguments checked.
`Rule.judge`: one verdict, whatever the callable does short of ending the process. `voter`: what a
rule takes for the answer of a completion.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.sandbox.blame import completion_is_to_blame
from actors.verifiers.base import ReferenceCheck, Verdict, as_verdict
from common.config.environment import ENVIRONMENT_RULE
from common.config.names import misfit
from common.errors import RunError, UserError
from common.record.schema import ERROR

if TYPE_CHECKING:
    from common.config.sections import VerifierConfig, VerifierSpec

BUILTIN = (
    *(
        "reasoning_gym",
        "math_answer",
        "format_rules",
        "choice",
        "code_tests",
        "llm_judge",
        "rubric",
        "right_prefix",
        "column",
    ),
)
TOLD = ("finish_reason", "prompt")
"""What a rule is told beside text and reference, when it has parameters of these names."""
_VOTING = ("reasoning_gym", "math_answer", "choice")


def verifier_names(config: VerifierConfig) -> list[str]:
    """One column name a rule, in order: the name, or the callable's; the second is `name_2`."""
    names: list[str] = []
    for spec in config.rules:
        base = spec.name.rpartition(":")[2]
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


@dataclass(frozen=True)
class Rule:
    """A resolved rule: its column name, its callable and the arguments it is given."""

    name: str
    score: Callable[..., object]
    args: dict[str, Any]
    told: tuple[str, ...] = ()
    """Those of `TOLD` that the callable asks for."""

    def judge(
        self, text: str, reference: dict[str, Any], finish_reason: str = "", prompt: str = ""
    ) -> Verdict:
        """The verdict on one completion.

        Whatever the callable raises is an `error`; a wrong answer once it has blamed the completion
        (`actors.sandbox.blame`).
        """
        known = {"finish_reason": finish_reason, "prompt": prompt}
        try:
            args = self.args | {name: known[name] for name in self.told}
            return as_verdict(self.score(text, reference, **args), self.name)
        except BaseException as error:  # SystemExit too: a rule may not end the child
            reason = f"{self.name}: {type(error).__name__}: {error}"[:500]
            if completion_is_to_blame() and not isinstance(error, RunError | UserError):
                return Verdict.scored(0.0, reason)
            return Verdict(ERROR, None, reason)


JUDGE = f"{__name__}:prepare"
"""What the child of `actors.sandbox.sandbox.Sandbox` is told to make rules with."""


def prepare(specs: Sequence[dict[str, Any]]) -> list[Callable[..., Verdict]]:
    """Rules, ready to judge, of `RuleSpec`s as dictionaries. Raises: as `resolve`."""
    return [resolve(**spec).judge for spec in specs]


def resolve(name: str, target: str, args: dict[str, Any]) -> Rule:
    """The rule called `name` from `target`, a built-in or `package.module:callable`.

    Raises: `UserError` when it cannot be imported, is not callable, or does not take `args`.
    """
    if target in BUILTIN:
        module = importlib.import_module(f"actors.verifiers.{target}")
        _check_signature(target, module.check_args, (), args)
        module.check_args(**args)
        module.warm_up() if hasattr(module, "warm_up") else None
        return Rule(name, module.score, args, _told(module.score, args))
    score = _import_callable(target)
    told = _told(score, args)
    _check_signature(target, score, ("", {}), args | dict.fromkeys(told, ""))
    return Rule(name, score, args, told)


def voter(target: str) -> Callable[..., str | None] | None:
    """`vote(text, reference, **args)` of a built-in rule: a key that equal answers share, or None
    where a text gives none. It only looks at text, so any process may call it.

    None for rules without a notion of an answer: programs, forms, your own.
    """
    if target not in _VOTING:
        return None
    vote: Callable[..., str | None] = importlib.import_module(f"actors.verifiers.{target}").vote
    return vote


def reference_checks(rules: Sequence[VerifierSpec]) -> list[ReferenceCheck]:
    """What built-in rules ask of a reference; your own are not run outside the sandbox."""
    found: list[ReferenceCheck] = []
    for rule in rules:
        if rule.name not in BUILTIN:
            continue
        module = importlib.import_module(f"actors.verifiers.{rule.name}")
        if hasattr(module, "check_reference"):
            found.append(module.check_reference)
        if hasattr(module, "reference_check"):  # it goes by the arguments
            _check_signature(rule.name, module.check_args, (), dict(rule.args))
            found.append(module.reference_check(**rule.args))
    return found


def _told(score: Callable[..., object], args: dict[str, Any]) -> tuple[str, ...]:
    """What a rule asks to be told by naming a parameter so; its own args come first."""
    try:
        parameters = inspect.signature(score).parameters
    except ValueError:  # a builtin without a signature
        return ()
    return tuple(name for name in TOLD if name in parameters and name not in args)


def _import_callable(target: str) -> Callable[..., object]:
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        near = difflib.get_close_matches(target, BUILTIN, 1)
        raise UserError(
            f"verifier {target!r} is unknown"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Give one of {', '.join((*BUILTIN, ENVIRONMENT_RULE))}, or your own as "
            "package.module:callable"
        )
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"verifier {target!r} cannot be imported: {error}. "
            "The module must be importable from the directory the run was started in"
        ) from error
    if not callable(found):
        raise UserError(f"verifier {target!r} is a {type(found).__name__}: name a function")
    score: Callable[..., object] = found
    return score


def _check_signature(
    target: str, function: Callable[..., object], head: tuple[object, ...], args: dict[str, Any]
) -> None:
    if (wrong := misfit(function, head, args)) is not None:
        error, signature = wrong
        raise UserError(
            f"verifier {target!r} does not take the args {args}: {error}; "
            f"it is called as score{signature}"
            if head
            else f"verifier {target!r} does not take the args {args}: {error}; "
            f"it takes {', '.join(signature.parameters)}"
        ) from error
