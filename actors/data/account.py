"""What was found in the data of a run, in words: for `plan` and for a run's first lines.

counted    rows, what was left out and why, what repeats or contradicts itself, lengths
example    the first prompt exactly as the policy and the verifiers get it
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from actors.data.prompts import Prompt, PromptSource
from common.config.contexts import HOLE

_LONGEST_VALUE = 300
"""Characters of a value in a reference, beyond which its length is said instead."""
_LATER = "[what is known after sampling]"


def counted(source: PromptSource) -> list[str]:
    """Lines on the rows of a prompt source, the first one on all of them."""
    rows, bad = source.rows, source.quarantine
    lines = [
        f"{source.size} questions to train on, {len(rows.held_out)} held out; {len(bad.rows)} of "
        f"{bad.seen} rows cannot be used"
    ]
    lines += [f"  {line}" for line in _by_source(source)]
    lines += [f"  {line}" for line in bad.kinds()]
    if rows.removed:
        lines.append(f"  {rows.removed} more rows are left out: they ask what is held out")
    if rows.repeated:
        lines.append(f"  {rows.repeated} rows repeat the question of another row")
    if rows.contradicted:
        lines.append(f"  {rows.contradicted} questions are stored with more than one answer")
    if source.lengths:
        lines.append(f"  tokens of a prompt: {percentiles(source.lengths)}")
    return lines


def percentiles(lengths: Sequence[int]) -> str:
    """The median, two high percentiles and the largest of some lengths, in words."""
    ordered = sorted(lengths)
    at = {share: ordered[(len(ordered) - 1) * share // 100] for share in (50, 90, 99)}
    parts = [f"{share} % have at most {length}" for share, length in at.items()]
    return f"{', '.join(parts)}, the longest has {ordered[-1]}"


def _by_source(source: PromptSource) -> Iterator[str]:
    """What each data set is read as, and how much of it there is."""
    sizes = Counter(row.source for row in source.rows.train)
    held_out = Counter(row.source for row in source.rows.held_out)
    schemas: dict[str, Counter[str]] = {}
    for row in source.rows.train:
        schemas.setdefault(row.source, Counter())[row.schema] += 1
    for name, size in sizes.items():
        found = [f"{schema} ({n} rows)" for schema, n in schemas[name].items() if schema]
        what = "; ".join(found) if len(found) > 1 else next(iter(schemas[name]))
        if name:
            yield f"{name}: {size} to train on, {held_out[name]} held out" + (
                f"; {what}" if what else ""
            )
        elif what:
            yield what


def example(source: PromptSource, tokenizer: Any) -> list[str]:
    """The prompt of the first ticket as the policy reads it, and what the verifiers are told."""
    prompt = source.first()
    text = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    reference = {name: _short(value) for name, value in json.loads(prompt.reference).items()}
    lines = [f"the policy reads, in {len(prompt.token_ids)} tokens: {text!r}"]
    if prompt.context_ids:
        lines.append(
            f"the scorer reads, in {len(prompt.context_ids)} tokens: {_around(prompt, tokenizer)!r}"
        )
    lines += ["the verifiers are told"]
    return lines + [f"  {name}: {value}" for name, value in reference.items()]


def _around(prompt: Prompt, tokenizer: Any) -> str:
    """The context of a prompt as text, with a mark where what comes later will stand."""
    parts = [
        _LATER if hole else tokenizer.decode(list(ids), skip_special_tokens=False)
        for hole, ids in itertools.groupby(prompt.context_ids, lambda token: token == HOLE)
    ]
    return "".join(parts)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[:_LONGEST_VALUE]} ... ({len(text)} characters)"
