"""Where a completion stops thinking and begins to answer.

`answer_part` gives what stands behind the thoughts, and nothing where they do not end. A template
may write the opening tag itself: then it stands at the end of the prompt, and `whole_answer` puts
it before the completion.
"""

from __future__ import annotations

import re

_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Opening and closing tags as published models write them."""
_CLOSING = {opening.lower(): closing.lower() for opening, closing in _TAGS}
_ANY = re.compile("|".join(re.escape(tag) for pair in _TAGS for tag in pair), re.IGNORECASE)
_WHOLE = re.compile(
    "|".join(f"{re.escape(opening)}.*?{re.escape(closing)}" for opening, closing in _TAGS),
    re.IGNORECASE | re.DOTALL,
)
_OPENED = re.compile(
    rf"(?:{'|'.join(re.escape(opening) for opening, _ in _TAGS)})\s*\Z", re.IGNORECASE
)


def answer_part(text: str, prompt: str = "") -> str:
    """What `text` says behind its thoughts; empty where a thought has begun and not ended.

    Args:
        prompt: the text before the completion. When it ends with an opening tag, the completion
            begins inside a thought.
    """
    begins, waits_for = 0, ""
    for tag in _ANY.finditer(whole_answer(text, prompt)):
        found = tag[0].lower()
        if found in _CLOSING:
            waits_for = _CLOSING[found]
        elif not waits_for or found == waits_for:
            begins, waits_for = tag.end(), ""
    return "" if waits_for else whole_answer(text, prompt)[begins:]


def thought_and_answer(text: str, prompt: str = "") -> tuple[str, str]:
    """What `text` thinks, without its tags, and what it says behind that (`answer_part`)."""
    answer = answer_part(text, prompt)
    whole = whole_answer(text, prompt)
    return _ANY.sub("", whole[: len(whole) - len(answer)]).strip(), answer


def without_thoughts(text: str) -> str:
    """`text` less its thoughts that end, empty ones too, and less the tags of others."""
    return _ANY.sub("", _WHOLE.sub("", text))


def thought_tags(text: str) -> list[tuple[str, str]]:
    """Opening and closing tags of which `text` spells the closing one."""
    lowered = text.lower()
    return [(opening, closing) for opening, closing in _TAGS if closing.lower() in lowered]


def whole_answer(text: str, prompt: str = "") -> str:
    """`text` behind the opening tag with which the prompt ends, where it does."""
    opened = _OPENED.search(prompt[-200:])
    return opened[0] + text if opened else text
