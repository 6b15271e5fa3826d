"""Keys that other trainers have and this one has not, each with the reason."""

from __future__ import annotations

_OTHER_DISTRIBUTION = (
    "is no key: it samples from another distribution than the one that the learner scores, so "
    "every ratio of a token would be wrong. vLLM hands out which tokens it left out only on CUDA "
    "and for one kind of sampler. Take generator.temperature, of which the learner knows"
)
ABSENT = dict.fromkeys(
    (
        *("generator.top_p", "generator.top_k", "generator.min_p"),
        *("generator.repetition_penalty", "generator.presence_penalty"),
        "generator.frequency_penalty",
    ),
    _OTHER_DISTRIBUTION,
)
