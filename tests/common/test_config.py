"""Configuration: every YAML loads, every mistake is refused with the key and the remedy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from common.config.load import dump_config, load_config, load_with_origins
from common.config.sections import Config
from common.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"
PRESETS = sorted(CONFIGS.glob("*.yaml"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
MODEL = "model.path=somewhere"


def load(*overrides: str) -> Config:
    return load_config([], [MODEL, *overrides], CONFIGS / "recipes")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config([path], [], CONFIGS / "recipes")
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config))
    assert load_config([dumped], [], resolved=True) == config


def test_what_was_overridden_stays_so_when_a_run_is_resumed(tmp_path: Path) -> None:
    started = load("recipe=grpo_lambda_recent", "algorithm.credit.lambda_=0.7")
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(started))
    resumed = load_config([dumped], ["steps=99"], CONFIGS / "recipes", resolved=True)
    assert resumed.algorithm.credit.lambda_ == 0.7
    changed = load_config([dumped], ["recipe=grpo"], CONFIGS / "recipes", resolved=True)
    assert changed.algorithm.credit.kind == "broadcast"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_is_short_and_names_its_paper(path: Path) -> None:
    load(f"recipe={path.stem}")
    text = path.read_text()
    assert len(text.splitlines()) < 30
    assert "arXiv" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lerning_rate=1", "learner.lerning_rate.*did you mean learning_rate"),
        ("lerner.ranks=1", "lerner.*did you mean learner"),
        ("steps=many", "steps.*many"),
        ("steps=0", "steps=0 must be at least 1"),
        ("generator.max_staleness=-1", "generator.max_staleness=-1"),
        ("algorithm.credit.kind=magic", "algorithm.credit.kind.*lambda_trace"),
        ("verifier.rules=[{nme: x}]", "nme.*name"),
        ("verifier.rules=[{name: x, weight: 0}]", "every rule a weight of 0"),
        ("eval.max_completion_tokens=600", "eval.max_completion_tokens=600 leaves no room"),
        ("generator.min_count=2", "min_count=2 must be at most generator.count=1"),
        ("weights.publish=adapter", "adapter.rank=0 trains all weights: set a rank, or weights.pu"),
        ("model=3", "model=3 must be a mapping"),
        ("batch.group_size=1", "batch.group_size=1.*at least 2"),
        ("generator.max_completion_tokens=512", "leaves no room"),
        ("generator.temperature=0", "generator.temperature=0"),
        ("generator.temperature=0.001", "generator.temperature=0.001 must be in"),
        ("generator.temperature=2.5", "generator.temperature=2.5 must be in"),
        ('generator.stop=[""]', "generator.stop holds '': give texts that are not empty"),
        ("generator.stop=[-1]", "generator.stop holds -1"),
        ("generator.stop=[true]", "generator.stop holds True"),
        ("generator.top_p=0.9", "top_p is no key.*another distribution.*generator.temperature"),
        ("generator.repetition_penalty=1.1", "repetition_penalty is no key"),
        ("generator.group_cap_s=0", "generator.group_cap_s=0.0 must be greater than 0, or null"),
        ("learner.max_grad_norm=0", "learner.max_grad_norm=0.*greater than 0"),
        ("learner.max_grad_norm=.nan", "learner.max_grad_norm=nan.*greater than 0"),
        ("learner.weight_decay=.nan", "learner.weight_decay=nan must be at least 0"),
        ("weights.canary_tokens=0", "weights.canary_tokens=0 must be at least 1"),
        ("eval.prompts=5000", "eval.prompts=5000 leaves no training prompts"),
        ("data.source=file", "data.source=file needs data.path"),
        ("data.sources=[{path: a.jsonl}]", "data.sources.*name.*set it"),
        ("data.sources=[{name: a/b}]", "the name 'a/b': use letters"),
        ("data.sources=[{name: a}, {name: a}]", "two data sets of the name 'a'"),
        ("data.sources=[{name: a, weight: 0}]", r"data.sources\[0\].weight=0.0 must be greater"),
        ("data.sources=[{name: a, source: hub}]", "data.source=hub needs data.path"),
        ("verifier.rules=[{name: choice, sources: [maths]}]", "'maths', which is none of"),
        ("algorithm.rollout.refill=true", "set algorithm.rollout.prune_rate above 0"),
        ("recipe=grpo_lamda", "recipe=grpo_lamda.*did you mean grpo_lambda"),
        ("steps", "'steps' is not an override"),
        ("verifier.rules[0].weight=2", "a list is given whole, e.g. verifier.rules="),
        ("data.plain_template=${prompt} x", "data.plain_template.*interpolation"),
        ("algorithm.baseline.epsilon=0", "algorithm.baseline.epsilon=0.*greater than 0"),
        ("algorithm.rollout.prune_rate=0.9", "leaves nothing to learn of a group"),
        ("algorithm.rollout.max_variance_share=0.1", "leaves nothing to compare of a group"),
        ("verifier.timeout_s=.inf", "verifier.timeout_s=inf must be greater than 0 and finite"),
        ("generator.memory_fraction=90", r"generator.memory_fraction=90.*must be in \(0, 1\]"),
        ("verifier.rules=[{name: llm_judge}]", "llm_judge.*set verifier.network=true"),
        ("environment.name=calculater", "did you mean calculator"),
        ("environment.args={a: 1}", "environment.args are those of environment.name"),
        ("environment={name: guess, step_timeout_s: 200}", "step_timeout_s=200 is longer than"),
        ("environment.placement=actors", "is that of environment.name, which is null"),
        ("environment={name: guess, labels: {kind: cpu}}", "set environment.placement=actors"),
        ("environment={name: guess, episode_timeout_s: 600}", "must be shorter than generator.gr"),
        ("environment={name: guess, command: [python, a.py]}", "one of the two"),
        ("environment.command=[]", "environment.command is a list of words"),
        ("environment.command=['']", "environment.command is a list of words"),
        ("environment={command: [python], args: {a: 1}}", "environment.args are those of"),
        ("environment={command: [python], episode_timeout_s: 600}", "must be shorter than gener"),
        ("environment.forks=many", "environment.forks"),
        ("environment.max_turns=0", "environment.max_turns=0 must be at least 1"),
        ("environment.cut_turns=stop", "environment.cut_turns"),
        ("placement.gpus_per_node=0", "placement.gpus_per_node=0 must be at least 1"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        load(override)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (r"Q: {prompt}\nA:", "Q: {prompt}\nA:"),
        ("Q: {prompt}\nA:", "Q: {prompt}\nA:"),
        (r'"Q: {prompt}\tA:"', "Q: {prompt}\tA:"),
        ("Question {prompt} # now", "Question {prompt} # now"),
        ("Yes", "Yes"),
        ("007", "007"),
        ("1e3", "1e3"),
        ("2025_06_01", "2025_06_01"),
        ("[a", "[a"),
        ("null", None),
    ],
)
def test_text_is_taken_as_it_stands(value: str, found: str | None, tmp_path: Path) -> None:
    loaded = load(f"data.system_prompt={value}")
    assert loaded.data.system_prompt == found
    (tmp_path / "config.yaml").write_text(dump_config(loaded))
    again = load_config([tmp_path / "config.yaml"], [], resolved=True)
    assert again.data.system_prompt == found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.path=a.jsonl"], "takes the place of data.source and data.path"),
        (["verifier.rules=[{name: choice, sources: [maths]}]"], "did you mean math"),
        (["verifier.rules=[{name: choice, sources: [math]}]"], "no rule of .* judges .* 'code'"),
        (["verifier.rules=[{name: reasoning_gym}]"], "a/b comes from a hub: use math_answer"),
        (["data.source=reasoning_gym"], "takes the place of"),
    ],
)
def test_mistakes_about_several_data_sets(keys: list[str], message: str) -> None:
    sets = "data.sources=[{name: math, path: a/b}, {name: code, path: b.jsonl, weight: 2}]"
    with pytest.raises(UserError, match=message):
        load(sets, *keys)
    loaded = load(sets)
    assert [one.kind for one in loaded.data.each] == ["hub", "file"]
    assert loaded.data.held_out(5) == [3, 2]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ([], "reasoning_gym"),
        (["data.path=train.jsonl"], "file"),
        (["data.path=data/train.parquet"], "file"),
        (["data.path=data/train-*.parquet"], "file"),
        (["data.path=data/a.jsonl.gz"], "file"),
        (["data.path=/data/train"], "file"),
        (["data.path=./data"], "file"),
        (["data.path=openai/gsm8k"], "hub"),
        (["data.path=openai/gsm8k", "data.source=file"], "file"),
        (["data.path=a/b/c"], "file"),
        (["data.path=tests/common"], "file"),  # a folder that is here
    ],
)
def test_a_path_says_where_data_come_from(keys: list[str], kind: str) -> None:
    assert load(*keys).data.kind == kind


def test_stops_are_texts_and_tokens() -> None:
    stop = load(r'generator.stop=["\n\n", "Question:", 7]').generator.stop
    assert stop == ["\n\n", "Question:", 7]


def test_the_last_word_on_the_recipe_may_be_none(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("model: {path: none}\nrecipe: grpo_lambda_recent\n")
    folder = CONFIGS / "recipes"
    assert load_config([preset], [], folder).algorithm.credit.kind == "lambda_trace"
    plain = load_config([preset], ["recipe=null"], folder)
    assert (plain.recipe, plain.algorithm) == (None, load().algorithm)


def test_a_mandatory_key_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"model\.path.*set it"):
        load_config([], [])


MINE = """
model: {path: x}
recipe: dapo
algorithm: {objective: {clip_high: 0.5}, credit: {lambda_: 0.8}}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of a user's own that names a recipe and says more."""
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def test_a_file_wins_over_the_recipe_and_the_command_line_over_both(mine: Path) -> None:
    config = load_config([mine], [], CONFIGS / "recipes")
    assert config.algorithm.objective.clip_high == 0.5  # the file's; dapo says 0.28
    assert config.algorithm.aggregation.kind == "token_mean"  # dapo's
    above = load_config([mine], ["algorithm.objective.clip_high=0.3"], CONFIGS / "recipes")
    assert above.algorithm.objective.clip_high == 0.3


def test_a_recipe_on_the_command_line_takes_the_place_of_the_file_s(mine: Path) -> None:
    config = load_config([mine], ["recipe=grpo_lambda_recent"], CONFIGS / "recipes")
    assert config.recipe == "grpo_lambda_recent"
    assert config.algorithm.aggregation.kind == "sequence_mean"  # nothing of dapo is left
    assert not config.algorithm.rollout.dynamic_sampling
    assert config.algorithm.credit.kind == "lambda_trace"
    assert config.algorithm.credit.lambda_ == 0.8  # the file's; the recipe says 0.99
    assert config.algorithm.objective.clip_high == 0.5


def test_a_recipe_named_on_a_resume_takes_the_place_of_the_run_s(
    mine: Path, tmp_path: Path
) -> None:
    """As if the run had begun with it."""
    folder = CONFIGS / "recipes"
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(load_config([mine], ["steps=7"], folder)))
    changed = load_config([resolved], ["recipe=raft"], folder, resolved=True)
    assert changed == load_config([mine], ["recipe=raft", "steps=7"], folder)


def test_every_value_says_where_it_came_from(mine: Path) -> None:
    loaded = load_with_origins([mine], ["steps=7", "seed=0"], CONFIGS / "recipes")
    expected = {
        "model.path": f"file {mine}",
        "recipe": f"file {mine}",
        "algorithm.objective.clip_high": f"file {mine}",
        "algorithm.aggregation.kind": "recipe dapo",
        "steps": "command line",
    }
    assert {key: loaded.origins.get(key) for key in expected} == expected
    assert "seed" not in loaded.origins  # said, but the default
    defaults = load_config([], ["model.path=x"])
    assert loaded.config.algorithm.rollout.dynamic_sampling
    assert not defaults.algorithm.rollout.dynamic_sampling


def test_what_is_set_back_to_the_default_is_marked_too(mine: Path) -> None:
    keys = ["algorithm.rollout.dynamic_sampling=false"]
    loaded = load_with_origins([mine], keys, CONFIGS / "recipes")
    assert loaded.origins["algorithm.rollout.dynamic_sampling"] == "command line"


def test_a_missing_or_malformed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_config([tmp_path / "nowhere.yaml"], [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [unclosed")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_config([broken], [])


def test_derived_values() -> None:
    config = load("batch.prompts_per_step=3", "batch.group_size=5", "generator.max_staleness=2")
    assert config.completions_per_step == 15
    assert config.max_groups_in_flight == 9
    assert config.correction_kind == "tis"
    assert load("generator.max_staleness=0").correction_kind == "none"
    # A kind that is named also mends where sampler and learner round apart.
    named = "algorithm.correction.kind=sequence_mask"
    assert load("generator.max_staleness=0", named).correction_kind == "sequence_mask"
    assert load("model.dtype=float32").canary_tolerance < load().canary_tolerance


def test_eight_bits_widen_the_canary_and_turn_the_correction_on() -> None:
    int8 = ("generator.quantization=int8", "generator.max_staleness=0")
    assert load(*int8).canary_tolerance > load().canary_tolerance
    assert load(*int8, "weights.canary_tolerance=0.1").canary_tolerance == 0.1
    assert load(*int8).correction_kind == "tis"
    assert load(*int8, "algorithm.correction.kind=none").correction_kind == "none"
    # The ratio to the sampler is the objective's own there.
    assert load(*int8, "algorithm.objective.anchor=behaviour").correction_kind == "none"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["quantization=fp8", "model.dtype=float32"], "set model.dtype=bfloat16"),
        (["quantization=int8", "generator.tensor_parallel=2"], "in one process on a CPU"),
        (["quantization=int8", "weights.transport=nccl"], "use generator.quantization=fp8"),
        (["quantization=int4"], "generator.quantization"),
        (
            ["quantization=int8", "weights.publish=adapter", "model.adapter.rank=8"],
            "was not tried. Set weights.publish=merged",
        ),
    ],
)
def test_eight_bits_where_they_cannot_work_are_refused(keys: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config([], ["model.path=x", f"generator.{keys[0]}", *keys[1:]])


@pytest.mark.parametrize("shards", [3, 8])
def test_copies_of_the_learner_are_whole(shards: int) -> None:
    load_config([], ["model.path=x", "learner.ranks=4", "learner.shard_ranks=2"])
    with pytest.raises(UserError, match=f"learner.shard_ranks={shards} must divide"):
        load_config([], ["model.path=x", "learner.ranks=4", f"learner.shard_ranks={shards}"])


def keys(cls: type, prefix: str = "") -> list[str]:
    found = []
    for field in fields(cls):
        default = field.default_factory() if callable(field.default_factory) else None  # type: ignore[misc]
        name = f"{prefix}{field.name}"
        if is_dataclass(default):
            found += keys(type(default), f"{name}.")
        else:
            found.append(name)
    return found


def test_there_are_three_batch_knobs_and_no_more() -> None:
    batch = [key for key in keys(Config) if key.startswith("batch.")]
    assert batch == [
        "batch.prompts_per_step",
        "batch.group_size",
        "batch.tokens_per_microbatch",
    ]


def test_cppo_refills_the_places_that_pruning_frees() -> None:
    config = load("recipe=cppo", "batch.prompts_per_step=6")
    assert config.groups_per_step == 12
    assert config.max_groups_in_flight == 24
    assert load("batch.prompts_per_step=6").groups_per_step == 6


def test_a_reasoning_gym_scorer_needs_reasoning_gym_prompts() -> None:
    with pytest.raises(UserError, match="verifier.rules names reasoning_gym"):
        load("data.path=some.jsonl", "verifier.rules=[{name: reasoning_gym}]")


def test_a_command_needs_messages_and_judges_its_episodes() -> None:
    command = "environment.command=[python,agent.py]"
    assert [rule.name for rule in load(command).verifier.rules] == ["environment"]
    load(command, "environment.step_timeout_s=300")  # a command has no steps
    for key, message in (
        ("data.template=plain", "only data.template=chat renders"),
        ("algorithm.advantage.kind=prefix_values", "have prompts of their own"),
    ):
        with pytest.raises(UserError, match=message):
            load(command, key)


def test_an_environment_judges_its_episodes_where_no_rule_is_given() -> None:
    names = [rule.name for rule in load("environment.name=guess").verifier.rules]
    assert names == ["environment"]
    own = load("environment.name=guess", "verifier.rules=[{name: choice}]")
    assert [rule.name for rule in own.verifier.rules] == ["choice"]
    with pytest.raises(UserError, match=r"environment.name is null"):
        load("verifier.rules=[{name: environment}]")
