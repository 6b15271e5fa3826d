"""Follow-ups: what rules ask for after the verdicts, and how a generator samples it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from byte_tokenizers import byte_tokenizer
from generator_batches import Engine, Tokenizer, batches_behind
from judged_groups import judged, request, said

from actors.data.contexts import filled_in
from actors.data.prompts import PromptSource, build_prompt_source
from actors.generation.follow_ups import (
    Said,
    Texts,
    follow_up_texts,
    follow_ups,
    points_of,
)
from actors.generation.follow_ups import said as read
from actors.generation.generator import Generator
from actors.generation.texts import Texts as Decoder
from common.config.contexts import HOLE
from common.config.follow_up import BranchConfig, FollowUpConfig, TreeConfig
from common.config.load import load_config
from common.config.sections import (
    DataConfig,
    GeneratorConfig,
    ModelConfig,
    ReasoningGymConfig,
    VerifierSpec,
)
from common.errors import UserError
from common.record.parts import JOINS, PROBE, REPLACES
from common.trajectory import GroupRequest

TEXTS = Texts(
    lambda said: [50, *map(ord, "".join(said.values())), 51],
    lambda ids: ",".join(map(str, ids)),
)


def drafts(*rewards: float | None) -> list[Said]:
    return [
        Said(i, f"d{i}", [i, i, i], [-0.1] * 3, reward, reward) for i, reward in enumerate(rewards)
    ]


def refining(**changes: Any) -> GroupRequest:
    config = FollowUpConfig(kind="refine", **changes)
    return request(follow_up=config, follow_up_ids=(50, HOLE, 51), num_follow_up=3)


@pytest.mark.parametrize(
    ("rewards", "best"),
    [((0.0, 1.0), "d1"), ((1.0, 1.0), "d0"), ((None, 0.0), "d1"), ((0.0, 0.0), "d0")],
)
def test_the_best_draft_is_refined_and_the_first_of_equals(
    rewards: tuple[float | None, ...], best: str
) -> None:
    (asked,) = follow_ups(refining(), drafts(*rewards), TEXTS)
    assert (asked.part, asked.num_completions, asked.first_index) == (REPLACES, 3, 2)
    assert asked.prompt_ids == [50, *map(ord, best), 51]
    assert asked.prompt_text == TEXTS.decode(asked.prompt_ids)
    assert asked.sampled_behind == ()
    assert asked.follow_up is None


def test_what_is_trained_behind_the_plain_prompt_is_only_sampled_behind_the_other() -> None:
    (asked,) = follow_ups(refining(train_behind="prompt"), drafts(0.0, 1.0), TEXTS)
    assert asked.prompt_ids == [1, 2]
    assert list(asked.sampled_behind) == [50, *map(ord, "d1"), 51]


def test_drafts_that_nobody_could_judge_are_not_refined() -> None:
    assert follow_ups(refining(), drafts(None, None), TEXTS) == []


def test_a_first_part_that_was_cut_short_has_no_follow_up() -> None:
    assert follow_ups(refining(), drafts(1.0), TEXTS) == []


def judged_drafts(*said: tuple[float | None, str]) -> list[Said]:
    return [
        replace(one, feedback=feedback)
        for one, (_, feedback) in zip(drafts(*(reward for reward, _ in said)), said, strict=True)
    ]


def criticised(size: int = 3, **changes: Any) -> GroupRequest:
    config = FollowUpConfig(kind="critique", **changes)
    return request(
        follow_up=config,
        follow_up_ids=(50, HOLE, HOLE, 51),
        num_completions=config.first_of(size),
        num_follow_up=size,
    )


def test_the_last_completion_reads_the_best_of_the_others_and_what_it_lacks() -> None:
    first = judged_drafts((0.0, "- all"), (0.5, "- why"))
    (asked,) = follow_ups(criticised(), first, TEXTS)
    assert (asked.part, asked.num_completions, asked.first_index) == (JOINS, 1, 2)
    assert list(asked.sampled_behind) == [50, *map(ord, "d1- why"), 51]
    assert (asked.prompt_ids, asked.prompt_text) == ([1, 2], "2 + 2 =")
    (asked,) = follow_ups(criticised(train_behind="own"), first, TEXTS)
    assert asked.sampled_behind == ()
    assert asked.prompt_ids == [50, *map(ord, "d1- why"), 51]


def test_where_nothing_is_lacking_the_group_is_that_of_grpo() -> None:
    """The last completion is asked for as it would have been with the others, seed and all."""
    (asked,) = follow_ups(criticised(), judged_drafts((1.0, ""), (0.0, "- all")), TEXTS)
    plain = request(num_completions=3, num_follow_up=3, follow_up_ids=(50, HOLE, HOLE, 51))
    later = replace(plain, num_completions=1, first_index=2, part=JOINS)
    assert asked == later
    # Of reward 1, and yet not as it should be: what is factual holds, something else does not.
    (asked,) = follow_ups(criticised(), judged_drafts((1.0, "- why"), (0.0, "")), TEXTS)
    assert list(asked.sampled_behind) == [50, *map(ord, "d0- why"), 51]


def test_completions_that_nobody_could_judge_are_not_criticised() -> None:
    assert follow_ups(criticised(), judged_drafts((None, ""), (None, "")), TEXTS) == []


def test_a_critique_has_draft_and_feedback_in_their_places_and_within_their_room() -> None:
    tokenizer = byte_tokenizer()
    for template in ("{draft}>{feedback}|{prompt}", "{feedback}<{draft}|{prompt}"):
        config = FollowUpConfig(kind="critique", template=template, feedback_tokens=5)
        ids = tokenizer(template.replace("{draft}", "\0").replace("{feedback}", "\0")).input_ids
        hole = tokenizer("\0", add_special_tokens=False).input_ids[0]
        ids = tuple(HOLE if i == hole else i for i in ids)
        group = request(follow_up=config, follow_up_ids=ids, max_tokens=3)
        filled = follow_up_texts(group, tokenizer).fill({"draft": "draft", "feedback": "- all!"})
        said = tokenizer.decode(filled, skip_special_tokens=True)
        wanted = template.replace("{draft}", "dra").replace("{feedback}", "- all")
        assert said.replace(" ", "") == wanted.replace(" ", "")


@pytest.mark.parametrize(
    ("rewards", "hint_ids", "asks"),
    [
        ((0.0, 0.0), (50, 51), True),
        ((0.0, 1.0), (50, 51), False),
        ((0.0, None), (50, 51), False),
        ((0.0, 0.0), (HOLE,), False),
    ],
)
def test_a_hint_is_given_where_all_have_failed_and_there_is_one(
    rewards: tuple[float | None, ...], hint_ids: tuple[int, ...], asks: bool
) -> None:
    config = FollowUpConfig(kind="hint")
    group = request(follow_up=config, follow_up_ids=hint_ids, num_follow_up=2)
    found = follow_ups(group, drafts(*rewards), TEXTS)
    assert [(each.part, each.sampled_behind, each.prompt_ids) for each in found] == (
        [(REPLACES, (50, 51), [1, 2])] if asks else []
    )


def test_branches_are_at_the_start_and_inside_and_begin_as_their_completion() -> None:
    config = FollowUpConfig(kind="branches", branch=BranchConfig(at="every", every=2, samples=4))
    first = [
        Said(0, "10,11,12,13", [10, 11, 12, 13], [-1.0] * 4, 1.0, 1.0),
        Said(1, "20", [20], [-1.0], 0.0, 0.0),
    ]
    found = follow_ups(request(follow_up=config), first, TEXTS)
    assert [(each.continues, each.guidance_ids, each.num_guided) for each in found] == [
        (0, (), 0),
        (0, (10, 11), 4),
        (1, (), 0),
    ]
    assert all(each.part == PROBE and each.num_completions == 4 for each in found)
    assert [each.first_index for each in found] == [2, 6, 10]


LIKELY = [math.log(p) for p in (0.5, 0.95, 0.5, 0.95, 0.5, 0.5)]


@pytest.mark.parametrize(
    ("config", "points"),
    [
        (BranchConfig(at="every", every=2), [0, 2, 4]),
        (BranchConfig(at="probability", every=1), [0, 2, 4, 5]),
        (BranchConfig(at="probability", every=2), [0, 2, 5]),
        (BranchConfig(at="separator", separator="3"), [0, 4]),
        (BranchConfig(at="every", every=1, most=3), [0, 2, 5]),
        (BranchConfig(at="every", every=1, most=1), [0]),
    ],
)
def test_where_branches_are(config: BranchConfig, points: list[int]) -> None:
    one = Said(0, "0,1,2,3,4,5", [0, 1, 2, 3, 4, 5], LIKELY, 1.0, 1.0)
    assert points_of(one, config, TEXTS.decode) == points


def test_no_branch_is_inside_of_what_ended_the_completion() -> None:
    """The text ends before a stop text, whose tokens are there all the same."""
    one = Said(0, "0,1,2", [0, 1, 2, 3, 4, 5], LIKELY, 1.0, 1.0)
    assert points_of(one, BranchConfig(at="every", every=1), TEXTS.decode) == [0, 1, 2, 3]


def test_a_completion_without_tokens_has_no_branch() -> None:
    assert points_of(Said(0, "", [], [], 1.0, 1.0), BranchConfig(), TEXTS.decode) == []


def sampled(group: GroupRequest, first: pa.RecordBatch) -> tuple[int, list[Any], Engine]:
    """How many completions were said to come, their rows, and what the engine was asked."""
    generator = Generator("g", ModelConfig(path="x"), GeneratorConfig(), "object_store", 0, 0, None)
    engine = Engine()
    generator._engine = engine  # type: ignore[assignment]
    generator._tokenizer = Tokenizer()
    generator._texts = Decoder(Tokenizer(), [], [])

    async def collect() -> tuple[int, list[Any]]:
        count, number = await generator.follow_up(group, first)
        assert not engine.asked, "sampled before the ledger could know"
        batches = await batches_behind(generator, generator.more_of(number)) if count else []
        return count, [row for batch in batches for row in batch.to_pylist()]

    return *asyncio.run(collect()), engine


def test_a_generator_samples_probes_behind_what_they_continue_under_seeds_of_their_own() -> None:
    config = FollowUpConfig(kind="branches", branch=BranchConfig(at="every", every=2, samples=2))
    group = request(follow_up=config, seed=100)
    first = judged(group, {0: said([10, 11, 12]), 1: said([20])}, [1.0, 0.0])
    count, rows, engine = sampled(group, first)
    assert count == len(rows) == 6
    assert [row["completion_index"] for row in rows] == [0, 0, 0, 0, 1, 1]
    assert [row["guidance_length"] for row in rows] == [0, 0, 2, 2, 0, 0]
    assert [row["token_ids"] for row in rows][:3] == [[2, 2], [2, 2], [10, 11, 4, 4]]
    assert all(row["part"] == PROBE for row in rows)
    assert [prompt for prompt, _ in engine.asked][2] == [1, 2, 10, 11]
    assert [sampling["max_tokens"] for _, sampling in engine.asked] == [8, 8, 6, 6, 8, 8]
    assert "seed" not in engine.asked[0][1]  # asynchronous: nobody seeds


def test_a_generator_that_has_nothing_to_ask_says_so() -> None:
    group = request(follow_up=FollowUpConfig(kind="hint"), follow_up_ids=(50, 51), num_follow_up=2)
    first = judged(group, {0: said([10]), 1: said([20])}, [1.0, 0.0])
    assert sampled(group, first)[:2] == (0, [])


def test_hinted_completions_carry_both_prompts() -> None:
    group = request(
        follow_up=FollowUpConfig(kind="hint"), follow_up_ids=(50, 51, 52), num_follow_up=2
    )
    first = judged(group, {0: said([10]), 1: said([20])}, [0.0, 0.0])
    count, rows, engine = sampled(group, first)
    assert count == 2
    assert [prompt for prompt, _ in engine.asked] == [[50, 51, 52]] * 2
    assert [(row["prompt_ids"], row["sampled_behind"]) for row in rows] == [
        ([1, 2], [50, 51, 52])
    ] * 2
    assert [row["completion_index"] for row in rows] == [2, 3]


GROWING = FollowUpConfig(kind="tree", tree=TreeConfig(every=2, children=[3, 2]))


def one(index: int, ids: list[int], given: int = 0, continues: int = -1) -> Said:
    text = ",".join(map(str, ids))
    logprobs = [-0.1] * len(ids)
    return Said(index, text, ids, logprobs, 0.0, 0.0, given=given, continues=continues)


def asked_for(first: list[Said]) -> list[tuple[int | None, tuple[int, ...], int, int]]:
    found = follow_ups(request(follow_up=GROWING, num_completions=len(first)), first, TEXTS)
    assert all(each.part == JOINS and each.mask_guidance for each in found)
    assert all(each.num_guided == each.num_completions for each in found)
    return [
        (each.continues, each.guidance_ids, each.num_completions, each.first_index)
        for each in found
    ]


def test_a_tree_grows_level_by_level_and_then_no_more() -> None:
    """Every node gets its other children once; one that has ended before gets none."""
    first = [one(0, [10, 11, 12, 13, 14]), one(1, [20, 21]), one(2, [30, 31, 32])]
    found = asked_for(first)
    assert found == [
        (0, (10, 11), 2, 3),
        (0, (10, 11, 12, 13), 1, 5),
        (2, (30, 31), 2, 6),
    ]
    second = [
        *first,
        one(3, [10, 11, 15, 16, 17], 2, 0),
        one(4, [10, 11, 18], 2, 0),
        one(5, [10, 11, 12, 13, 19, 1, 1, 1, 1], 4, 0),
        one(6, [30, 31, 33, 34, 35], 2, 2),
        one(7, [30, 31, 36, 37], 2, 2),
    ]
    found = asked_for(second)
    assert found == [(3, (10, 11, 15, 16), 1, 8), (6, (30, 31, 33, 34), 1, 9)]
    third = [*second, one(8, [10, 11, 15, 16, 38], 4, 3), one(9, [30, 31, 33, 34, 39], 4, 6)]
    assert asked_for(third) == []
    leaves = len(third)
    assert leaves == 10 <= GROWING.most_of(3) == GROWING.most_learnt(3) == 18


def test_a_whole_tree_has_as_many_leaves_as_its_children_multiply_to() -> None:
    known, count = [one(i, [i, 1, 2, 3, 4, 5]) for i in range(3)], 0
    for _ in range(GROWING.stages):
        asked = follow_ups(request(follow_up=GROWING, num_completions=len(known)), known, TEXTS)
        for each in asked:
            for place in range(each.num_completions):
                count += 1
                ids = [*each.guidance_ids, *([50 + count] * (6 - len(each.guidance_ids)))]
                at, of = len(each.guidance_ids), each.continues
                assert of is not None
                known.append(one(each.first_index + place, ids, at, of))
    assert [each.index for each in known] == list(range(18))
    second = sorted(tuple(each.token_ids[:4]) for each in known)
    assert all(second.count(prefix) == 2 for prefix in second)  # two leaves under each node


def test_no_node_ends_inside_of_what_ended_the_completion() -> None:
    first = [Said(0, "0,1,2", [0, 1, 2, 3, 4, 5], [-0.1] * 6, 1.0, 1.0)]
    assert [ids for _, ids, _, _ in asked_for(first)] == [(0, 1)]


def test_a_generator_samples_the_nodes_of_a_tree_behind_what_they_are_given() -> None:
    config = FollowUpConfig(kind="tree", tree=TreeConfig(every=2, children=[3]))
    first = judged(request(), {0: said([10, 11, 12]), 1: said([20])}, [1.0, 0.0])
    count, rows, engine = sampled(request(follow_up=config, seed=100), first)
    assert count == len(rows) == 2
    assert [prompt for prompt, _ in engine.asked] == [[1, 2, 10, 11]] * 2
    assert [row["completion_index"] for row in rows] == [2, 3]
    assert all(row["continues"] == 0 and row["part"] == JOINS for row in rows)
    assert all(row["guidance_length"] == 2 for row in rows)
    assert [row["token_ids"] for row in rows] == [[10, 11, 4, 4]] * 2
    assert [row["loss_mask"] for row in rows] == [[False, False, True, True]] * 2
    assert [row["continues"] for row in first.to_pylist()] == [-1, -1]


def test_judged_batches_are_read_in_the_order_of_the_group() -> None:
    group = request()
    one = judged(group, {1: said([20])}, [0.5])
    other = judged(replace(group), {0: said([10, 11])}, [None])
    found = read([one, other])
    assert [(each.index, each.token_ids, each.reward) for each in found] == [
        (0, [10, 11], None),
        (1, [20], 0.5),
    ]


FOLLOW = "algorithm.rollout.follow_up"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((f"{FOLLOW}.kind=refine", f"{FOLLOW}.template=improve"), r"\{prompt\} 0 times"),
        ((f"{FOLLOW}.kind=hint", FOLLOW + ".template='{prompt} {draft}'"), r"\{hint\} 0 times"),
        (
            (f"{FOLLOW}.kind=critique", FOLLOW + ".template='{prompt} {draft}'"),
            "{feedback} 0 times",
        ),
        ((f"{FOLLOW}.kind=critique", "batch.group_size=1"), "group_size"),
        ((f"{FOLLOW}.kind=critique", "environment.name=guess"), "single answers"),
        ((f"{FOLLOW}.kind=refined",), "did you mean refine"),
        ((f"{FOLLOW}.kind=branches", "algorithm.rollout.greedy=true"), "do not go together"),
        (
            (
                f"{FOLLOW}.kind=branches",
                "data.solution_column=s",
                "data.source=file",
                "data.path=x",
                "algorithm.rollout.guidance.ratio=0.5",
            ),
            "do not go together",
        ),
        ((f"{FOLLOW}.kind=branches", "environment.name=guess"), "single answers"),
        (("algorithm.advantage.kind=branch_values",), "set it to branches"),
        (("algorithm.advantage.kind=tree_values",), "set it to tree"),
        ((f"{FOLLOW}.tree.children=[2,1]",), r"children\[1\]=1 must be at least 2"),
        ((f"{FOLLOW}.kind=tree", f"{FOLLOW}.tree.children=[]"), "has no level"),
        (
            (
                f"{FOLLOW}.kind=tree",
                f"{FOLLOW}.tree.every=24",
                "generator.max_completion_tokens=24",
            ),
            "leaves no completion to branch",
        ),
        ((f"{FOLLOW}.kind=tree", "environment.name=guess"), "single answers"),
        ((f"{FOLLOW}.kind=tree", "algorithm.rollout.greedy=true"), "do not go together"),
        (
            (
                f"{FOLLOW}.kind=hint",
                "algorithm.objective.kl=0.1",
                "algorithm.objective.kl_in=reward",
            ),
            "kl_in=reward do not go together",
        ),
        (
            (
                f"{FOLLOW}.kind=hint",
                "algorithm.advantage.kind=distill",
                "algorithm.advantage.scorer=reference",
            ),
            "against the sampler do not go together",
        ),
        ((f"{FOLLOW}.branch.samples=0", f"{FOLLOW}.kind=branches"), "branch.samples"),
    ],
)
def test_what_follow_ups_cannot_do_is_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], ["model.path=none", *keys])


def test_a_rule_of_the_users_own_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from dataclasses import replace\n"
        "def again(request, config, first, texts):\n"
        "    return [replace(request, part='joins', num_completions=len(first))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    group = request(follow_up=FollowUpConfig(kind="my_parts:again"))
    (asked,) = follow_ups(group, drafts(0.0, 1.0), TEXTS)
    assert (asked.part, asked.first_index, asked.num_completions) == ("joins", 2, 2)


RUBRIC = VerifierSpec(
    name="rubric", args={"criteria": [{"text": "It says why.", "pattern": "because"}]}
)


def prompts(
    config: FollowUpConfig,
    limit: int,
    rows: str,
    tmp_path: Path,
    rules: Any = (RUBRIC,),
    held_out: int = 0,
    **keys: Any,
) -> PromptSource:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    usual = {"path": str(path), "solution_column": "solution", "max_bad_rows": 0.9}
    data = DataConfig(source="file", **(usual | keys))
    return build_prompt_source(
        data, held_out, 0, byte_tokenizer(), limit, rules, follow_up=config, draft_tokens=10
    )


ROW = '{"prompt": "%s", "answer": "2", "solution": "count"}\n'


def test_a_prompt_has_that_of_its_follow_up_beside_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = FollowUpConfig(kind="hint", template="{prompt}|{hint}")
    first = prompts(config, 500, ROW % "1 + 1", tmp_path).next()
    assert "1 + 1|count" in tokenizer.decode(list(first.follow_up_ids))
    config = FollowUpConfig(kind="refine", template="{prompt}|{draft}!")
    first = prompts(config, 500, ROW % "1 + 1", tmp_path).next()
    filled = filled_in(first.follow_up_ids, "a draft", tokenizer)
    assert "1 + 1|a draft!" in tokenizer.decode(filled)
    cut = filled_in(first.follow_up_ids, "a draft", tokenizer, most=3)
    assert "1 + 1|a d!" in tokenizer.decode(cut)


def test_a_critique_needs_room_for_draft_and_feedback(tmp_path: Path) -> None:
    config = FollowUpConfig(
        kind="critique", template="{feedback}|{draft}|{prompt}", feedback_tokens=7
    )
    longest = max(prompts(FollowUpConfig(), 500, ROW % "1 + 1", tmp_path).lengths)
    assert prompts(config, longest + 10 + 7 + 2, ROW % "1 + 1", tmp_path).size == 1
    with pytest.raises(UserError, match=r"a prompt of algorithm\.rollout\.follow_up may have"):
        prompts(config, longest + 10 + 7 + 1, ROW % "1 + 1", tmp_path)


def test_a_critique_needs_a_rule_that_says_what_is_lacking(tmp_path: Path) -> None:
    config = FollowUpConfig(kind="critique")
    own, silent = VerifierSpec(name="mine:score"), VerifierSpec(name="math_answer")
    judge = VerifierSpec(name="llm_judge", args={"criteria": {"It says why.": 1}})
    for rules in ([own], [silent, judge]):
        assert prompts(config, 900, ROW % "1 + 1", tmp_path, rules).size == 1
    for rules in ([], [silent], [VerifierSpec(name="llm_judge")]):
        with pytest.raises(UserError, match="none of verifier.rules does"):
            prompts(config, 900, ROW % "1 + 1", tmp_path, rules)


def test_a_row_whose_follow_up_may_not_fit_goes_to_quarantine(tmp_path: Path) -> None:
    config = FollowUpConfig(kind="refine", template="{prompt}|{draft}")
    rows = ROW % "1 + 1" + ROW % ("9" * 20)
    plain = len(prompts(config, 500, rows, tmp_path).next().token_ids)
    longest = max(prompts(FollowUpConfig(), 500, rows, tmp_path).lengths)
    kept = prompts(config, longest + 10, rows, tmp_path)  # one token less than it needs
    assert kept.size == 1
    assert kept.lengths == [min(plain, longest)]
    assert prompts(config, longest + 11, rows, tmp_path).size == 2


@pytest.mark.parametrize("apart", [False, True])
def test_rows_are_held_out_by_their_own_prompts_alone(apart: bool, tmp_path: Path) -> None:
    """A follow-up changes what is trained on, never what is evaluated."""
    rows = [ROW % question for question in ("1 + 1", "9" * 20, "2 + 2", "8" * 20, "7" * 99)]
    others = tmp_path / "others.jsonl"
    others.write_text("".join([ROW % ("6" * 20), ROW % ("5" * 99), ROW % "3 + 3"]))
    keys = {"eval_path": str(others)} if apart else {}
    held_out = ["6" * 20, "3 + 3"] if apart else ["2 + 2", "8" * 20]  # 99 digits are too many
    refine = FollowUpConfig(kind="refine", template="{prompt}|{draft}")
    longest = max(prompts(FollowUpConfig(), 500, "".join(rows[:2]), tmp_path).lengths)
    for config, size in ((FollowUpConfig(), 4 if apart else 2), (refine, 2 if apart else 1)):
        source = prompts(config, longest + 10, "".join(rows), tmp_path, held_out=2, **keys)
        assert [prompt.question for prompt in source.eval_prompts(2)] == held_out
        assert source.size == size == len(source.lengths)
        again = {source.next().question for _ in range(size)}
        assert again == {row.question for row in source.rows.train}
        assert ("9" * 20 in again) is (config is not refine)


def test_a_follow_up_takes_no_question_from_those_that_a_task_holds_out() -> None:
    gym = ReasoningGymConfig(task="chain_sum", size=20)
    data = DataConfig(reasoning_gym=gym, max_bad_rows=0.9)
    config = FollowUpConfig(kind="refine", template="{prompt}|{draft}")
    plain = build_prompt_source(data, 8, 0, byte_tokenizer(), 500)
    held_out = [prompt.question for prompt in plain.eval_prompts(8)]
    limit = max(*plain.lengths, *(len(prompt.token_ids) for prompt in plain.eval_prompts(8)))
    source = build_prompt_source(
        data, 8, 0, byte_tokenizer(), limit, follow_up=config, draft_tokens=1
    )
    assert source.size < plain.size
    assert [prompt.question for prompt in source.eval_prompts(8)] == held_out


def test_a_row_without_a_solution_has_no_hint_and_its_answer_is_none(tmp_path: Path) -> None:
    config = FollowUpConfig(kind="hint", template="{prompt}|{hint}")
    rows = '{"prompt": "1 + 1", "answer": "2", "solution": ""}\n' + ROW % "2 + 2"
    source = prompts(config, 500, rows, tmp_path)
    found = {p.question: p.follow_up_ids for p in (source.next(), source.next())}
    assert found["1 + 1"] == (HOLE,)
    assert len(found["2 + 2"]) > 1
    with pytest.raises(UserError, match=r"set data\.solution_column, or another"):
        prompts(config, 500, '{"prompt": "1 + 1", "answer": "2", "solution": ""}\n', tmp_path)
