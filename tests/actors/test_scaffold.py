"""Scaffolds: what each completion of a group is sampled behind, and how that is asked for."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizers import byte_tokenizer
from generator_batches import Engine, Tokenizer, batches_behind
from judged_groups import request

from actors.data.prompts import PromptSource, build_prompt_source
from actors.generation.generator import Generator
from actors.generation.texts import Texts
from common.config.load import load_config
from common.config.scaffold import ScaffoldConfig
from common.config.sections import DataConfig, GeneratorConfig, ModelConfig, VerifierSpec
from common.errors import UserError
from common.trajectory import Behind, GroupRequest

CRITERIA = [{"text": f"It has {letter}.", "pattern": letter} for letter in "abcd"]
RUBRIC = VerifierSpec(name="rubric", args={"criteria": CRITERIA})
PLAIN = "{rubric}|{prompt}"


def source(
    config: ScaffoldConfig,
    tmp_path: Path,
    rules: Sequence[VerifierSpec] = (RUBRIC,),
    *,
    limit: int = 900,
    steps: int = 10,
    rows: str = '{"prompt": "1 + 1", "answer": "2"}\n',
) -> PromptSource:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    data = DataConfig(source="file", path=str(path), max_bad_rows=0.9)
    return build_prompt_source(
        data, 0, 0, byte_tokenizer(), limit, rules, scaffold=config, steps=steps
    )


def shown(made: PromptSource, version: int, group_size: int) -> list[str]:
    """What each completion of the first prompt's group is sampled behind."""
    tokenizer = byte_tokenizer()
    behind = made.behind(made.first(), version, group_size)
    return [tokenizer.decode(list(each.token_ids)) for each in behind]


def test_the_share_falls_over_the_group_and_over_the_steps() -> None:
    """IANNXANG/RuscaRL: (n - 1 - i) / (n - 1) / (1 + exp((x - start) * steepness))."""
    config = ScaffoldConfig(kind="rubric")
    for x in (0.0, 0.1, 0.19, 0.2, 0.21, 0.3, 1.0):
        for i in range(8):
            wanted = (8 - 1 - i) / (8 - 1) / (1 + math.exp((x - 0.2) * 125))
            assert config.share_of(i, 8, x) == pytest.approx(wanted, rel=1e-12)
    constant = ScaffoldConfig(kind="rubric", decay="none", share=0.5)
    assert [constant.share_of(i, 3, 0.9) for i in range(3)] == [0.5, 0.25, 0.0]
    assert constant.share_of(0, 1, 0.9) == 0.5
    steep = ScaffoldConfig(kind="rubric", steepness=1e6)
    assert steep.share_of(0, 2, 1.0) == pytest.approx(0.0)


def test_each_completion_reads_its_share_of_the_rubric(tmp_path: Path) -> None:
    config = ScaffoldConfig(kind="rubric", decay="none", template=PLAIN)
    made = source(config, tmp_path)
    texts = shown(made, 0, 5)
    assert [text.count("- It has") for text in texts] == [4, 3, 2, 1, 0]
    assert "- It has a.\n- It has b.\n- It has c.\n- It has d.|1 + 1" in texts[0]
    assert texts[4] == ""
    letters = [[letter for letter in "abcd" if f"has {letter}" in text] for text in texts]
    assert all(one == sorted(one) for one in letters)  # in the order of the rubric
    assert texts == shown(made, 0, 5)  # the same whenever it is asked for
    drawn = {"".join(letters) for ticket in range(20) for letters in [_letters(made, ticket)]}
    assert len(drawn) > 3  # and others for another ticket


def _letters(made: PromptSource, ticket: int) -> list[str]:
    prompt = replace(made.first(), ticket=ticket)
    ids = made.behind(prompt, 0, 5)[2].token_ids
    text = byte_tokenizer().decode(list(ids))
    return [letter for letter in "abcd" if f"has {letter}" in text]


def test_the_rubric_goes_with_the_steps(tmp_path: Path) -> None:
    """At the middle of the decay half of it is left; the last steps are GRPO's."""
    made = source(ScaffoldConfig(kind="rubric", midpoint=0.5), tmp_path)
    counts = [shown(made, version, 2)[0].count("- It has") for version in (0, 3, 4, 5, 9)]
    assert counts == [4, 4, 2, 0, 0]  # step 5 of 10 is that of version 4


def test_no_share_is_grpo(tmp_path: Path) -> None:
    """The request is sampled in one piece, behind the prompt, under the seeds of GRPO."""
    made = source(ScaffoldConfig(kind="rubric", share=0.0), tmp_path)
    behind = made.behind(made.first(), 0, 4)
    assert behind == (Behind(),) * 4
    group = request(num_completions=4, behind=behind)
    assert group.apart() == [group]
    plain = sampled(request(num_completions=4, seed=100))
    assert sampled(request(num_completions=4, seed=100, behind=behind)) == plain
    none = source(ScaffoldConfig(), tmp_path)
    assert none.behind(none.first(), 0, 4) == ()


def sampled(group: GroupRequest) -> tuple[list[dict[str, Any]], list[tuple[list[int], int]]]:
    """Rows of a group without its time, and the prompts and seeds that the engine was asked for."""
    config = GeneratorConfig(max_staleness=0)
    generator = Generator("g", ModelConfig(path="x"), config, "object_store", 0, 0, None)
    engine = Engine()
    generator._engine = engine  # type: ignore[assignment]
    generator._texts = Texts(Tokenizer(), [], [])

    batches = asyncio.run(batches_behind(generator, generator.generate_group(group)))
    rows = [row for batch in batches for row in batch.to_pylist()]
    for row in rows:
        del row["finished_s"]
    return rows, [(prompt, sampling["seed"]) for prompt, sampling in engine.asked]


def test_completions_are_sampled_apart_and_trained_behind_the_prompt() -> None:
    behind = (Behind((7, 8, 9)), Behind((7, 8, 9)), Behind((7,)), Behind())
    rows, asked = sampled(request(num_completions=4, seed=100, behind=behind))
    assert asked == [([7, 8, 9], 100), ([7, 8, 9], 101), ([7], 102), ([1, 2], 103)]
    assert [row["completion_index"] for row in rows] == [0, 1, 2, 3]
    assert [row["sampled_behind"] for row in rows] == [[7, 8, 9], [7, 8, 9], [7], []]
    assert all((row["prompt_ids"], row["part"]) == ([1, 2], "") for row in rows)
    assert [row["token_ids"] for row in rows] == [[3, 3], [3, 3], [1, 1], [2, 2]]


def test_tags_are_drawn_for_each_completion_which_is_trained_with_its_own(tmp_path: Path) -> None:
    config = ScaffoldConfig(kind="tags", tags=["<high>", "<low>"], template="{prompt} {tag}")
    made = source(config, tmp_path, rules=())
    behind = made.behind(made.first(), 0, 200)
    texts = [each.text for each in behind]
    assert set(texts) == {"<user>1 + 1 <high><assistant>", "<user>1 + 1 <low><assistant>"}
    assert 70 < texts.count("<user>1 + 1 <high><assistant>") < 130
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(list(each.token_ids)) for each in behind] == texts
    two = [next(each for each in behind if each != behind[0]), behind[0]]
    rows, asked = sampled(request(num_completions=2, seed=100, behind=tuple(two)))
    assert [prompt for prompt, _ in asked] == [list(each.token_ids) for each in two]
    assert [row["prompt_ids"] for row in rows] == [list(each.token_ids) for each in two]
    assert [row["prompt_text"] for row in rows] == [each.text for each in two]
    assert all(row["sampled_behind"] == [] for row in rows)


def test_one_tag_is_grpo_on_that_prompt(tmp_path: Path) -> None:
    made = source(ScaffoldConfig(kind="tags", tags=["<high>"]), tmp_path, rules=())
    behind = made.behind(made.first(), 0, 3)
    tagged = request(num_completions=3, seed=100, behind=behind)
    ids, text = behind[0]
    plain = request(num_completions=3, seed=100, prompt_ids=list(ids), prompt_text=text)
    assert sampled(tagged) == sampled(plain)


def test_a_row_whose_rubric_may_not_fit_goes_to_quarantine(tmp_path: Path) -> None:
    longest = max(source(ScaffoldConfig(), tmp_path).lengths)
    lines = len("\n".join(f"- It has {letter}." for letter in "abcd")) + 1
    config = ScaffoldConfig(kind="rubric", template=PLAIN)
    assert source(config, tmp_path, limit=longest + lines).size == 1
    with pytest.raises(UserError, match=r"a prompt of algorithm\.rollout\.scaffold may have"):
        source(config, tmp_path, limit=longest + lines - 1)


def test_a_row_without_its_rubric_goes_to_quarantine(tmp_path: Path) -> None:
    rule = VerifierSpec(name="rubric", args={"column": "rubric"})
    row = {"prompt": "1 + 1", "answer": "2", "rubric": CRITERIA}
    bare = {"prompt": "2 + 2", "answer": "4"}
    rows = json.dumps(row) + "\n" + json.dumps(bare) + "\n"
    made = source(ScaffoldConfig(kind="rubric"), tmp_path, [rule], rows=rows)
    assert (made.size, made.first().question) == (1, "1 + 1")
    assert "- It has d." in shown(made, 0, 2)[0]


def test_a_scaffold_needs_a_rule_with_criteria(tmp_path: Path) -> None:
    judge = VerifierSpec(name="llm_judge", args={"criteria": {"It is polite.": 1}})
    made = source(ScaffoldConfig(kind="rubric"), tmp_path, [judge])
    assert "- It is polite." in shown(made, 0, 2)[0]
    for rules in ([], [VerifierSpec(name="math_answer")], [VerifierSpec(name="mine:score")]):
        with pytest.raises(UserError, match=r"shows criteria of verifier\.rules"):
            source(ScaffoldConfig(kind="rubric"), tmp_path, rules)


SCAFFOLD = "algorithm.rollout.scaffold"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((f"{SCAFFOLD}.kind=rubrics",), "rubric"),
        (
            (f"{SCAFFOLD}.kind=rubric", SCAFFOLD + ".template='{prompt} improve'"),
            r"\{rubric\} 0 times",
        ),
        ((f"{SCAFFOLD}.kind=rubric", f"{SCAFFOLD}.tags=[a]"), "no other kind has any"),
        ((f"{SCAFFOLD}.kind=tags",), "kind=tags needs some"),
        ((f"{SCAFFOLD}.kind=tags", f"{SCAFFOLD}.tags=['']"), "holds an empty"),
        ((f"{SCAFFOLD}.share=2",), "share"),
        ((f"{SCAFFOLD}.kind=rubric", "environment.name=guess"), "single answers"),
        ((f"{SCAFFOLD}.kind=rubric", "algorithm.rollout.greedy=true"), "do not go together"),
        (
            (f"{SCAFFOLD}.kind=rubric", "algorithm.rollout.follow_up.kind=refine"),
            "says what completions are sampled behind",
        ),
        (
            (
                f"{SCAFFOLD}.kind=tags",
                f"{SCAFFOLD}.tags=[a]",
                "algorithm.advantage.kind=prefix_values",
            ),
            "which compares completions of one prompt, do not go together",
        ),
        (
            (
                f"{SCAFFOLD}.kind=rubric",
                "algorithm.baseline.kind=disco",
                "algorithm.baseline.args={negatives: softmax}",
            ),
            "negatives=softmax do not go together",
        ),
        (
            (
                f"{SCAFFOLD}.kind=rubric",
                "algorithm.objective.kl=0.1",
                "algorithm.objective.kl_in=reward",
            ),
            "kl_in=reward do not go together",
        ),
    ],
)
def test_what_a_scaffold_cannot_do_is_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], ["model.path=none", *keys])
