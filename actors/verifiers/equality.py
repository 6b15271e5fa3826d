"""Whether two mathematical expressions are the same answer.

`same` looks, in this order, at spelling, at words, at lists member by member, at numbers as exact
fractions, at values at some points, and last at what math-verify makes of both. What none of them
can read is equal to its own spelling alone. math-verify is never asked about text: it would take
words for products of letters and drop what it does not know.

The work is bounded by processor time, through SIGPROF: so it runs on a process's main thread only,
and a verdict does not depend on what else the machine does.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from actors.verifiers.mathematics import has_words, same_mathematics
from actors.verifiers.quantity import quantity, same_quantity
from actors.verifiers.spelling import key, without_thousands

SECONDS = 4.0
"""Processor time of one comparison; below the verifiers' usual deadline."""
_MOST_MEMBERS = 64

_TEXT_ONLY = re.compile(
    r"\\ldots|(?<![\w^.])\d+\s+\d"  # a sequence, numbers one behind the other
    r"|(?<![\w^])\d+(?:-\d+)+(?![\w^])\Z"  # a date, a telephone number, a score
    r"|\A\d{1,2}:\d\d(?::\d\d)?(?:\s*[ap]m)?\Z|[ap]m\Z"  # a clock time
)
_NO_VALUE = re.compile(r"\\ldots|(?<![\w^.])\d+\s+\d")
_NAMES_MORE = re.compile(r"\\(?:pm|mp|cup|cap|in|le|ge|ne)(?![A-Za-z])|[<>]")
_PLAIN_WORDS = re.compile(r"[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_BASED = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{?(\d+|[a-z]+)\}?")
_RATIO = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")
_ASSIGNED = re.compile(
    r"[A-Za-z](?:_\{?\w+\}?)?'*(?:\([a-z](?:,\s*[a-z])*\))?"
    r"\s*(?:=|\\approx|\\in)\s*"
)
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in|approx)(?![A-Za-z])")
_SYMBOLS = frozenset({"e", "i", "pi"})


class TooLongError(Exception):
    """The comparison did not end within `SECONDS` of processor time."""


class _Interrupt(BaseException):
    """As above, from inside libraries that catch every `Exception`."""


def same(stored: str, given: str) -> bool:
    """Whether two `spelled` expressions are the same answer.

    Raises: `TooLongError` when that cannot be said in time.
    """
    if key(stored) == key(given):
        return True
    if words_of(stored) is not None or words_of(given) is not None:
        return words_of(stored) == words_of(given)
    with _limited(SECONDS):
        return _same(stored, given)


def readable(stored: str) -> bool:
    """Whether `stored` has any content at all that can be compared."""
    return bool(re.search(r"\w|\\[a-z]", stored))


def words_of(expression: str) -> str | None:
    """The words of an expression made of nothing else, in lower case; None for mathematics."""
    plain = expression.strip("() .").lower()
    if not _PLAIN_WORDS.fullmatch(plain) or plain in _SYMBOLS:
        return None
    return " ".join(plain.split())


def _same(stored: str, given: str) -> bool:
    if key(stored) == key(given):
        return True
    mine, other = members(stored), members(given)
    if mine is not None and other is not None:
        together = _same_members(mine, other)
        if together is not None:
            return together
    elif (mine is not None or other is not None) and not (
        _NAMES_MORE.search(stored) or _NAMES_MORE.search(given)
    ):
        return False  # one thing is no list of things
    return _same_single(stored, given)


def _same_members(mine: tuple[str, list[str]], other: tuple[str, list[str]]) -> bool | None:
    """Lists member by member; None where a member may stand for several."""
    (form, stored), (shape, given) = mine, other
    if any(_NAMES_MORE.search(member) for member in (*stored, *given)):
        return None
    if len(stored) != len(given) or len(stored) > _MOST_MEMBERS:
        return False
    if form in ("", "{}") and shape in ("", "{}"):
        return _matched(stored, given)
    if "{}" in (form, shape):
        return False
    if form and shape and form != shape and (len(stored) == 2 or {form, shape} - {"()", "[]"}):
        return False  # two members in brackets may be an interval, and its ends count
    return all(map(_same, stored, given))


def _matched(stored: Sequence[str], given: Sequence[str]) -> bool:
    """Whether the members can be paired so that all pairs are equal, in whatever order.

    Equality to six decimals is not transitive, but nearly so: the first partner will do.
    """
    left = list(given)
    for member in stored:
        partner = next((other for other in left if _same(member, other)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def members(expression: str) -> tuple[str, list[str]] | None:
    """The brackets of a list, and its members; None where `expression` is a single thing.

    Brackets are `()`, `[]`, `(]`, `[)`, `{}` for a set, or empty for members one after the other,
    with commas, semicolons, `and` or `or` between them.
    """
    text = expression.strip()
    inside, brackets = text, ""
    opening = re.match(r"\\\{|\\langle|[(\[]", text)
    closing = re.search(r"(?:\\\}|\\rangle|[)\]])\Z", text)
    if opening and closing and _closes_at_end(text):
        brackets = opening[0].strip("\\")[0] + closing[0].strip("\\")[0]
        brackets = "()" if brackets == "lr" else brackets
        inside = text[opening.end() : closing.start()]
    else:
        inside = without_thousands(text)
    parts = _split(inside, linked=not brackets)
    if len(parts) < 2 and brackets != "{}":
        return None
    if not all(parts):
        return None
    return brackets, parts


def _closes_at_end(text: str) -> bool:
    """Whether the bracket at the start is the one that the last character closes."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0 and place > 0:
            return place == len(text) - 1
    return r"\langle" in text


def _split(text: str, linked: bool) -> list[str]:
    """`text` between the commas that stand in no bracket; with `linked` also between `and`s."""
    if r"\begin" in text:
        return [text]
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    parts.append(text[begin:])
    if linked:
        parts = [some for part in parts for some in re.split(r"(?:^|\s+)(?:and|or)\s+", part)]
        parts = [part for part in parts if part.strip()] if len(parts) > 1 else parts
    return [part.strip() for part in parts]


def _same_single(stored: str, given: str) -> bool:
    stored, given = without_thousands(stored), without_thousands(given)
    stored, given = _without_assignment(stored, given)
    if key(stored) == key(given):
        return True
    if _is_text(stored, given):
        return False
    based = _same_based(stored, given)
    if based is not None:
        return based
    mine, other = quantity(stored), quantity(given)
    if mine is not None and other is not None:
        return same_quantity(mine, other)
    return same_mathematics(stored, given)


def _is_text(stored: str, given: str) -> bool:
    """Whether one of two single answers is no mathematics, and so equal to its spelling alone."""
    if _TEXT_ONLY.search(stored) or _NO_VALUE.search(given):
        return True
    if _RATIO.fullmatch(stored) and not (_RATIO.fullmatch(given) or quantity(given)):
        return True
    return (has_words(stored) and not quantity(stored)) or (
        has_words(given) and not quantity(given)
    )


def _without_assignment(stored: str, given: str) -> tuple[str, str]:
    """Both without `x =` where only one has it; of a chain of equations its end."""
    assigned, said = _ASSIGNED.match(stored), _ASSIGNED.match(given)
    if assigned and not said and not _RELATION.search(given):
        stored = stored[assigned.end() :]
    if not _RELATION.search(stored) and _RELATION.search(given):
        tail = re.split(r"=|\\approx", given)[-1].strip()
        if tail and not re.search(r"[<>]|\\(?:le|ge|ne|in)(?![A-Za-z])", given):
            given = tail
    if assigned and said and key(assigned[0]) == key(said[0]):
        return stored[assigned.end() :], given[said.end() :]
    return stored, given


def _same_based(stored: str, given: str) -> bool | None:
    """Numbers in a base, which math-verify drops: base and digits; None for other expressions."""
    mine, other = _BASED.fullmatch(stored), _BASED.fullmatch(given)
    if mine is None and other is None:
        return None
    if mine is not None and other is not None:
        return mine.groups() == other.groups()
    found, rest = (mine, given) if mine is not None else (other, stored)
    assert found is not None
    return found[1] == rest.strip()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` when the block takes more processor time."""

    def interrupt(*_: object) -> None:
        raise _Interrupt

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except _Interrupt:
        raise TooLongError(f"no result within {seconds:g} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
