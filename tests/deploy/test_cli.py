"""The command line: exit status and one clear message for every mistake, before anything starts."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_runs import write_model

from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError
from deploy import launch
from deploy.cli import main
from deploy.command.presets import CONFIGS, RECIPES, choose
from deploy.placement.options import plan_cores
from deploy.predict.plan import _batches
from deploy.run import actors as cluster

ROOT = Path(__file__).resolve().parents[2]
DESCRIBED = sorted([*CONFIGS.glob("*.yaml"), *RECIPES.glob("*.yaml")])
RULE = "verifier.rules=[{name: math_answer}]"
IN_RATIO = "algorithm.credit.application=trace"
GUIDED = ("data.source=file", "data.path=x.jsonl", "algorithm.rollout.guidance.ratio=0.5")


def test_plan_prints_everything_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(ROOT / "deploy/configs/tiny.yaml"), "steps=7"]) == 0
    printed = capsys.readouterr().out
    for part in ("steps: 7", "# Placement", "generator-0", "learner rank 0", "# Batch arithmetic"):
        assert part in printed
    assert "8 prompts x 8 completions = 64" in printed
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset's model without its warm start."""
    folder = tmp_path_factory.mktemp("untrained")
    write_model(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["plan", "learner.lerning_rate=1"], 2, "learning_rate"),
        (["plan", "--config", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
        (["train", "resume=nowhere"], 2, "there is no run in this folder"),
        (["train", "model.path=/nowhere"], 2, "there is no such folder"),
        (["train", "ray.address=127.0.0.1:1"], 2, "nothing answers at ray.address"),
        (["train", "weights.transport=nccl", "learner.device=cpu"], 2, "object_store"),
        (
            ["train", "generator.quantization=fp8", "model.dtype=bfloat16", "learner.device=cpu"],
            2,
            "quantization=fp8 does not run on a CPU: set it to int8",
        ),
        (["train", "data.source=file", "data.path=no.jsonl", RULE], 2, "no.jsonl does not"),
        (["train", "ray.address=ray://127.0.0.1:1"], 2, "submit the run as a job"),
        (["plan", "recipe=grpo_lambda_cut", IN_RATIO], 2, "application=weight"),
        (["train", "algorithm.credit.lambda_=1.5"], 2, "must be in [0, 1]"),
        (["plan", "algorithm.rollout.guidance.ratio=1.5"], 2, "must be in [0, 1]"),
        (["plan", *GUIDED, RULE], 2, "needs data.solution_column"),
    ],
)
def test_mistakes_end_with_a_status_and_a_message(
    arguments: list[str],
    status: int,
    message: str,
    untrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [f"runs_dir={tmp_path}", "name=wrong"] if arguments[0] == "train" else []
    if not any(word.startswith(("model.path=", "resume=")) for word in arguments):
        arguments = [*arguments, f"model.path={untrained}"]
    preset = [] if "--config" in arguments or "resume=nowhere" in arguments else ["--config"]
    config = [str(ROOT / "deploy/configs/tiny.yaml")] if preset else []
    assert main([arguments[0], *preset, *config, *arguments[1:], *overrides]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()  # the name is free for the next try


HEAVY = ("torch", "ray", "vllm", "transformers", "pyarrow", "omegaconf", "numpy", "asyncio", "rich")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["recipes"]])
def test_what_needs_nothing_imports_nothing(words: list[str]) -> None:
    """The imports decide how long it takes; a busy machine decides the rest."""
    program = f"""
import sys
from deploy.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert end.code == 0
print("LOADED", [name for name in {HEAVY!r} if name in sys.modules])
"""
    took = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=30
        )
        took.append(time.monotonic() - started)
        assert done.stdout.decode().splitlines()[-1] == "LOADED []"
        assert b"grpo" in done.stdout
    assert min(took) < 0.5


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for path in DESCRIBED:
        (line,) = [row for row in printed.splitlines() if row.split()[:1] == [path.stem]]
        assert line.endswith(path.read_text().splitlines()[0].lstrip("# "))


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda path: path.stem)
def test_a_preset_or_recipe_says_in_its_first_line_what_it_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first) <= 112


class Terminal:
    """Standard input or output of a person."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What `train` was called with; nothing is trained."""
    found: list[Config] = []
    monkeypatch.setattr(launch, "train", found.append)
    return found


def test_a_person_without_a_configuration_chooses_one_by_number(
    trained: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(io.StringIO("0\nnone\n2\n")))
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    assert main(["train"]) == 0
    assert trained[0].model.path == "builtin:tiny-chain-sum"
    printed = capsys.readouterr().out
    assert " 1  smollm2 " in printed
    assert " 2  tiny " in printed
    assert f"'none' is none of 1 to {len(list(CONFIGS.glob('*.yaml')))}" in printed


def test_enter_takes_the_default_and_the_end_of_input_nothing() -> None:
    assert choose(lambda _: "", lambda _: None).stem == "smollm2"

    def ended(_: str) -> str:
        raise EOFError

    with pytest.raises(UserError, match="give --config FILE"):
        choose(ended, lambda _: None)


@pytest.mark.parametrize("words", [[], ["steps=3"]])
def test_a_script_gets_the_default_and_is_told_so(
    words: list[str], trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 0
    assert trained[0].model.path == "builtin:smollm2-135m-instruct"
    assert ("no --config: training the preset smollm2" in capsys.readouterr().out) == (not words)


def test_a_person_who_gives_overrides_is_not_asked(
    trained: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(io.StringIO("")))
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    assert main(["train", "steps=3"]) == 0
    assert main(["train", "--config", str(ROOT / "deploy/configs/tiny.yaml")]) == 0
    assert [config.steps for config in trained] == [3, 60]


def test_the_plan_says_what_follows_from_what(capsys: pytest.CaptureFixture[str]) -> None:
    """48 completions of 100 tokens in rows of 1000; S = 3: 4 x 9 groups; refill takes 9 for 6."""
    config = load_config(
        [ROOT / "deploy/configs/tiny.yaml"],
        [
            "batch.prompts_per_step=6",
            "batch.group_size=8",
            "batch.tokens_per_microbatch=1000",
            "generator.max_completion_tokens=100",
            "generator.max_staleness=3",
            "algorithm.objective.epochs=2",
            "steps=5",
        ],
        ROOT / "deploy/configs/recipes",
    )
    text = " ".join("\n".join(_batches(config, {})).split())
    for part in (
        "6 prompts x 8 completions = 48: batch.prompts_per_step x batch.group_size",
        "48 completions x generator.max_completion_tokens 100 = 4800 a step at most",
        "4800 tokens / batch.tokens_per_microbatch 1000 = 5 forward and backward passes",
        "steps 5 x algorithm.objective.epochs 2 x updates_per_batch 1 = 10",
        "(generator.max_staleness 3 + 1) x 6 prompts = 24 groups in flight",
        "24 groups x 8 = 192 completions over 1 generator(s)",
        "off-policy correction tis, because generator.max_staleness is 3",
        "steps 5 x 48 = 240",
    ):
        assert part in text
    config.algorithm.rollout.prune_rate, config.algorithm.rollout.refill = 0.34, True
    refilled = " ".join(_batches(config, {})[0].split())
    assert "batch.prompts_per_step 6 / (1 - algorithm.rollout.prune_rate 0.34) = 9" in refilled


def test_an_address_that_is_none_is_refused_at_once() -> None:
    config = load_config([], ["model.path=x", "ray.address=somewhere"])
    with pytest.raises(UserError, match="local, auto or HOST:PORT"):
        cluster.connect(config, plan_cores(config, [0], []))
