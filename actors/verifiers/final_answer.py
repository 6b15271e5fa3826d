"""The answer that a text commits itself to.

`final_answer` takes what is marked as the answer before what merely stands at the end. A value
that the text only mentions, doubts or asks about is none, nor is one at which it was cut off.
"""

from __future__ import annotations

import re

from actors.verifiers.braces import without_unopened
from actors.verifiers.extract import NUMBER, last_boxes, last_tagged

_SAID = re.compile(
    r"\banswers?\b[\"']?(?:\s+(?:to|of|for|in)\b[^.:\n$\\]{0,80}?)?"
    r"(?:\s*(?:is|are|be|equals|was)\b\s*:?|\s*\**\s*[:=](?!=)\s*\**)[\s}]*"
    r"|答案\s*(?:[是为為]\s*[:：]?|[:：])\s*|答え\s*[は:：]\s*|정답\s*[은:：]\s*",
    re.IGNORECASE,
)
_HASHES = re.compile(r"^\s*#{4}\s*([^\n]*)$", re.MULTILINE)
_DISPLAYED = r"\$\$([^$]+)\$\$"
_INLINE = r"(?<!\\)\$((?![\s\d.,]+[A-Za-z ,]*\s\$\d)(?:\\\$|[^$\n])+)\$(?!\d)"  # no $5 and $6
_PARENTHESES = r"\\\(((?:(?!\\\)).)+)\\\)"
_BRACKETS = r"\\\[((?:(?!\\\]).)+)\\\]"
_FORMULA = re.compile(f"{_DISPLAYED}|{_INLINE}|{_PARENTHESES}|{_BRACKETS}", re.DOTALL)
_FORMULA_AT_END = re.compile(rf"(?:{_DISPLAYED}|{_BRACKETS})[.\s*]*\Z", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])[*_`\"')]*\s+|(?<=[。！？])|\n")
_ASIDE = re.compile(
    r"(?:[,;:]?\s+(?:because|since|as|which|where|for example|i\.e\.)|[,;]\s+not)\s.*\Z"
    r"|\s+\([^()]*[A-Za-z]{3}[^()]*\)\Z",
    re.DOTALL | re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[,;]\s+(?=(?:so|but|and\s+(?:so|then|thus)|thus|hence|then|therefore|or\s+rather|no)\b)",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:not|never|cannot|wrong|incorrect|false|neither|impossible|instead of|rather than)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"\b(?:wait\s*(?:[,.!…—]|-)|scratch that|correction\s*:|actually\s*,"
    r"|(?:that|this|which)(?:['’]s|\s+is|\s+was)\s+(?:wrong|incorrect|not\s+(?:right|correct))\b"
    r"|(?:made|is)\s+an?\s+(?:mistake|error)\b)",
    re.IGNORECASE,
)
_PROSE = re.compile(
    r"(?<![\\A-Za-z])[^\W\d_]{2,}\W+[^\W\d_]{2,}"
    r"|[^\W\d_\u0000-\u024f\u0370-\u03ff\u1d00-\u214f]"  # neither Latin nor Greek, nor a sign
)
_MARKUP = re.compile(r"</?(?:b|i|u|p|em|strong|span|div|center|code|br)\b[^<>]*>", re.IGNORECASE)
_BULLET = re.compile(r"(?:[*•>]|#{1,6}|\d{1,2}[.)])\s+")
_CELL = re.compile(r"\|.*\|\s*([^|]+?)\s*\|")
_MATH_WORDS = re.compile(r"\\[A-Za-z]+(?:\{[A-Za-z]+\})?")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|it|we|is|get|got|have|no|yes)\b[\s,:]{0,3}){1,4}", re.IGNORECASE
)
_SAYS = re.compile(r"\w")
_LABEL = re.compile(r"[^\W\d_]{2}")
_VALUE = re.compile(rf"(?:[$£€¥]\s*)?{NUMBER.pattern}(?:\s*/\s*\d+)?(?:\s*\\?%)?")
_LINKED = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s+\Z")
_MOST_WORDS_BEHIND = 3
_SEARCHED = 2000
"""Characters at the end of a text in which an answer without a box or a tag is looked for."""


def final_answer(text: str, complete: bool = True) -> str | None:
    """The answer of `text`, its parts behind commas; None where it gives none.

    In this order: the last box, the last `<answer>` tag, the last line of `####`, what is said
    last behind `the answer is`, and what the last sentence comes to.

    Args:
        complete: the model ended the text by itself. Of one that was cut at its limit only what is
            closed counts, and what is said before the place where it was cut.
    """
    boxes = last_boxes(text)
    if boxes:
        return ", ".join(box.rstrip(". ") for box in boxes)
    tagged = last_tagged(text)
    if tagged is not None:
        return (_said(tagged) or _last_words(tagged) or tagged) if tagged else None
    text = _MARKUP.sub("", text.rstrip()[-_SEARCHED:])
    if not complete:
        text = _before_the_cut(text)
    hashes = [line.strip() for line in _HASHES.findall(text)]
    if hashes and hashes[-1] and not _PROSE.match(hashes[-1]):
        return _value_of(hashes[-1]) if _has_prose(hashes[-1]) else hashes[-1]
    said = _said(text)
    if said is not None:
        return said
    return _last_words(text) if complete else None


def whole_answers(text: str) -> list[str]:
    """What is an answer as it stands, where the stored one is a sentence: the content of the last
    tag, else the last line and the whole text; none of them where there is a box."""
    if last_boxes(text):
        return []
    tagged = last_tagged(text)
    text = text.strip()
    whole = [text.rpartition("\n")[2], text] if tagged is None else [tagged]
    return [part for part in whole if len(part) <= _SEARCHED]


def _before_the_cut(text: str) -> str:
    """`text` up to the end of its last whole sentence or line: a number at a cut is half of one."""
    ends = [found.start() for found in _SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends else ""


def _said(text: str) -> str | None:
    """What stands behind the last `answer is` that gives anything, and is not taken back."""
    for found in reversed(list(_SAID.finditer(text))):
        if _RETRACTED.search(text, found.end()):
            return None
        rest = text[found.end() : found.end() + _SEARCHED].lstrip()
        formula = _FORMULA.match(rest.lstrip("*_ "))
        if formula:
            return _formulas(rest)
        sentence = _SENTENCE.split(rest.strip("*_` \"'"), maxsplit=1)[0]
        sentence = without_unopened(sentence).rstrip("\"' ")  # of {"answer": "42"}
        if _DOUBT.match(sentence) or sentence.endswith("?"):
            continue
        sentence = _CLAUSE.split(_ASIDE.sub("", sentence))[0].strip()
        if not sentence:
            continue
        answer = _value_of(sentence) if _has_prose(sentence) else sentence
        return answer or sentence
    return None


def _last_words(text: str) -> str | None:
    """What the last line comes to: all of it where it is an expression, else its last value."""
    stripped = text.strip()
    ending = _FORMULA_AT_END.search(stripped[-_SEARCHED:])
    if ending:
        return _formulas(ending[0])
    lines = [line.strip() for line in stripped.splitlines() if _SAYS.search(line)]
    line = lines[-1][-_SEARCHED:] if lines else ""
    if not line or line.endswith(("?", "？")):
        return None
    cell = _CELL.fullmatch(line)
    line = cell[1] if cell else _without_bullet(line)
    if not _has_prose(line) and not _FORMULA.search(line):
        return _without_lead(line)
    sentences = [sentence for sentence in _SENTENCE.split(line) if sentence.strip()]
    return _value_of(sentences[-1]) if sentences else None


def _without_bullet(line: str) -> str:
    bullet = _BULLET.match(line)
    return line[bullet.end() :] if bullet else line


def _without_lead(line: str) -> str:
    """A line without a label before a colon, or `so we get` at its beginning."""
    if len(line.split()) == 1:
        return line
    label, colon, rest = line.partition(": ")
    if colon and rest.strip() and _LABEL.search(label) and not set(label) & set("$\\"):
        return rest.strip()
    lead = _LEAD.match(line)
    return line[lead.end() :] or line if lead else line


def _value_of(sentence: str) -> str | None:
    """The value with which a sentence ends, at most a few words behind it; None without one."""
    retracted = list(_RETRACTED.finditer(sentence))
    if retracted:
        sentence = sentence[retracted[-1].end() :].lstrip(" ,.:!—-")
    sentence = _ASIDE.sub("", sentence.strip())
    clause = _CLAUSE.split(sentence)[-1]
    if clause.rstrip().endswith(("?", "？")) or _DOUBT.search(clause):
        return None
    formulas = list(_FORMULA.finditer(clause))
    if formulas:
        behind = clause[formulas[-1].end() :]
        return _formulas(clause) if _is_ending(behind) else None
    values = list(_VALUE.finditer(clause))
    if not values or not _is_ending(clause[values[-1].end() :]):
        return None
    answer = values[-1][0].strip()
    for place in range(len(values) - 1, 0, -1):
        if not _LINKED.fullmatch(clause[values[place - 1].end() : values[place].start()]):
            break
        answer = f"{values[place - 1][0].strip()}, {answer}"
    unit = re.match(r"\s*[A-Za-z°/^\d²³]+", clause[values[-1].end() :])
    return answer + (unit[0] if unit and "," not in answer else "")


def _is_ending(behind: str) -> bool:
    """Whether what stands behind a value only closes the sentence: a unit, `in total`."""
    return len(re.findall(r"[\w']+", behind)) <= _MOST_WORDS_BEHIND and not re.search(
        r"[,;:=]\s*\w", behind
    )


def _formulas(text: str) -> str:
    """The last formula of `text`, and those before it that are linked with it."""
    found = list(_FORMULA.finditer(text))
    if re.match(
        r"[*_\s]*[$\\]", text
    ):  # an answer begins here: the first, and what it is linked to
        last = 0
        while last + 1 < len(found) and _is_link(text[found[last].end() : found[last + 1].start()]):
            last += 1
        found = found[: last + 1]
    first = len(found) - 1
    while first > 0 and _is_link(text[found[first - 1].end() : found[first].start()]):
        first -= 1
    return ", ".join("".join(filter(None, part.groups())).strip() for part in found[first:])


def _is_link(between: str) -> bool:
    return bool(re.fullmatch(r"\s*(?:,|;|and|or|,\s*and|,\s*or)\s*", between))


def _has_prose(text: str) -> bool:
    return bool(_PROSE.search(_MATH_WORDS.sub(" ", text)))
