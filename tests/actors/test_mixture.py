"""Several data sets in one run: whose turn it is, and what each of them holds out and serves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizers import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.data.mixture import Mixture
from actors.data.prompts import Prompt, PromptSource, build_prompt_source
from common.config.sections import DataConfig, DataSource, VerifierSpec
from common.errors import UserError


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), start=st.integers(0, 10**12))
def test_a_ticket_knows_how_many_of_its_data_set_came_before(
    weights: list[float], start: int
) -> None:
    mixture = Mixture(weights)
    total = sum(mixture.counts)
    first = [mixture.at(ticket) for ticket in range(2 * total)]
    seen: Counter[int] = Counter()
    for ticket, (which, before) in enumerate(first):
        assert before == seen[which]
        seen[which] += 1
        for one, count in enumerate(mixture.counts):  # never far from its share
            assert abs(seen[one] - (ticket + 1) * count / total) <= len(weights)
    which, before = mixture.at(start)
    rounds, place = divmod(start, total)
    assert (which, before - rounds * mixture.counts[which]) == first[place]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], [1]),
        ([5.0], [1]),
        ([1.0, 1.0], [1, 1]),
        ([2.0, 1.0], [2, 1]),
        ([0.7, 0.3], [7, 3]),
        ([0.5, 0.25, 0.25], [2, 1, 1]),
        ([1.0, 1e-9], [1000, 1]),
    ],
)
def test_weights_are_proportions(weights: list[float], counts: list[int]) -> None:
    assert Mixture(weights).counts == counts


def test_a_data_set_is_spread_evenly_over_a_round() -> None:
    mixture = Mixture([3.0, 1.0])
    assert [mixture.at(ticket)[0] for ticket in range(8)] == [0, 0, 1, 0] * 2


def mixed(folder: Path, **changes: Any) -> PromptSource:
    """`sums` has 5 rows to train on and `words` 3, two of three prompts are sums."""
    for name, count in (("sums", 7), ("words", 5)):
        rows = [{"prompt": f"{name} {n}", "answer": n, "data_set": "x"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        sources=[
            DataSource(name="sums", path=str(folder / "sums.jsonl"), weight=2.0),
            DataSource(name="words", path=str(folder / "words.jsonl")),
        ],
        **changes,
    )
    rules = [
        VerifierSpec(name="math_answer", sources=["sums"]),
        VerifierSpec(name="hostile_verifiers:obedient", sources=["words"]),
    ]
    return build_prompt_source(config, 4, 0, byte_tokenizer(), 500, rules)


def identities(prompts: list[Prompt]) -> list[tuple[str, int, str]]:
    return [(prompt.source, prompt.epoch, prompt.question) for prompt in prompts]


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_each_data_set_has_epochs_of_its_own(tmp_path: Path, order: Any) -> None:
    source = mixed(tmp_path, order=order)
    assert (source.size, source.rows.removed) == (8, 0)
    prompts = [source.next() for _ in range(45)]
    served = Counter(prompt.source for prompt in prompts)
    assert served == {"sums": 30, "words": 15}
    for name, size in (("sums", 5), ("words", 3)):
        own = [prompt for prompt in prompts if prompt.source == name]
        for epoch in range(len(own) // size):
            some = own[epoch * size : (epoch + 1) * size]
            assert {prompt.epoch for prompt in some} == {epoch}
            assert len({prompt.question for prompt in some}) == size
    assert {json.loads(prompt.reference)["data_set"] for prompt in prompts} == {"sums", "words"}
    assert len({prompt.prompt_id for prompt in prompts}) == 8


def test_a_run_that_goes_on_serves_what_it_would_have_served(tmp_path: Path) -> None:
    first, second = mixed(tmp_path), mixed(tmp_path)
    whole = [first.next() for _ in range(30)]
    second.seek(17, [4, 2])
    assert identities([second.next() for _ in range(2)]) == identities([whole[4], whole[2]])
    assert identities([second.next() for _ in range(13)]) == identities(whole[17:])
    assert second.first() == whole[0]
    assert second.identity == first.identity


def test_held_out_questions_come_from_each_data_set(tmp_path: Path) -> None:
    held_out = mixed(tmp_path).eval_prompts(4)
    assert Counter(prompt.source for prompt in held_out) == {"sums": 2, "words": 2}
    assert {prompt.question for prompt in held_out} == {"sums 5", "sums 6", "words 3", "words 4"}


def test_what_one_data_set_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "answer": n} for n in range(6)]
    for name, own in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    sets = [DataSource(name=name, path=str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    source = build_prompt_source(DataConfig(sources=sets), 2, 0, byte_tokenizer(), 500)
    held_out = {prompt.question for prompt in source.eval_prompts(2)}
    assert held_out == {"q 5", "q 0"}
    assert not held_out & {source.next().question for _ in range(20)}
    assert (source.size, source.removed) == (8, 2)
    with pytest.raises(UserError, match="no training question is left of a"):
        build_prompt_source(DataConfig(sources=sets), 10, 0, byte_tokenizer(), 500)


def test_another_mixture_is_another_order(tmp_path: Path) -> None:
    one, other = mixed(tmp_path), mixed(tmp_path)
    assert one.identity == other.identity and "mixed 2:1" in one.identity
    weights = {"sums": 1.0, "words": 1.0}
    even = PromptSource(one.rows, one._template, 0, weights=weights)
    assert even.identity != one.identity


def test_rules_look_at_the_rows_of_their_data_set_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "1", "answer": "\\\\frac{1}{2"}\n' * 2)
    (tmp_path / "b.jsonl").write_text('{"prompt": "2", "answer": "3"}\n' * 2)
    sets = [DataSource(name=name, path=str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    config = DataConfig(sources=sets)
    for judged, fits in (("b", True), ("a", False)):
        rules = [VerifierSpec(name="math_answer", sources=[judged])]
        if fits:
            assert build_prompt_source(config, 0, 0, byte_tokenizer(), 500, rules).size == 4
        else:
            with pytest.raises(UserError, match="not right when it is given back"):
                build_prompt_source(config, 0, 0, byte_tokenizer(), 500, rules)
