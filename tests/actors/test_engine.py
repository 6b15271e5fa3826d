"""The adapter over vLLM: what a request carries. No engine is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import vllm
import vllm.platforms
from learner_models import save_tiny_model
from vllm.config.lora import MaxLoRARanks

from actors.generation import engine as engine_module
from actors.generation.adapters import adapter_arguments
from actors.generation.engine import Engine, _advice
from actors.generation.engine_arguments import changed_settings, engine_arguments
from common.config.data import SERVED_RANKS
from common.config.sections import AdapterConfig, GeneratorConfig, ModelConfig
from common.errors import RunError, UserError
from common.weights.registry import TRANSPORTS


class FakeLLM:
    """Answers every request with one token, and keeps what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[dict[str, Any]] = []
        self.parameters: list[Any] = []
        self.adapters: list[Any] = []
        self.calls: list[Any] = []

    async def generate(
        self, prompt: dict[str, Any], parameters: Any, *_: Any, lora_request: Any
    ) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        self.parameters.append(parameters)
        self.adapters.append(lora_request)
        span = SimpleNamespace(version="4", start=0, end=1)
        output = SimpleNamespace(
            weight_versions=[span],
            token_ids=[7],
            logprobs=SimpleNamespace(logprobs=[-0.5]),
            finish_reason="stop",
        )
        yield SimpleNamespace(outputs=[output])

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)

    async def start_weight_update(self) -> None: ...

    async def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((name, kwargs))

    async def update_weight_version(self, version: str) -> None:
        self.calls.append(version)

    async def resume_generation(self) -> None:
        self.calls.append("resume")


def test_cached_prefixes_are_shared_among_requests_of_the_same_weights_only() -> None:
    """vLLM cannot clear its cache while requests are under way, so salts keep versions apart."""
    llm = FakeLLM()
    engine = Engine(llm)  # type: ignore[arg-type]

    async def before_and_during_an_update() -> None:
        sampling = {"temperature": 1.0, "max_tokens": 1}
        await engine.generate("a", [1, 2], sampling)
        await engine.generate("b", [1, 2], sampling)
        await engine.begin_update()
        await engine.generate("c", [1, 2], sampling)

    asyncio.run(before_and_during_an_update())
    first, second, after = (prompt["cache_salt"] for prompt in llm.prompts)
    assert first == second != after


def test_an_adapter_comes_in_one_call_and_every_request_behind_it_has_it() -> None:
    """As with `AsyncLLM`, whose worker is in a process of its own."""
    llm = FakeLLM()
    engine = Engine(llm, AdapterConfig(rank=4, alpha=8))  # type: ignore[arg-type]

    async def before_and_after_an_update() -> None:
        sampling = {"temperature": 1.0, "max_tokens": 1}
        with pytest.raises(RunError, match="a came before the first adapter"):
            await engine.generate("a", [1, 2], sampling)
        await engine.update([{"names": ["x"]}], 0)
        await engine.generate("b", [1, 2], sampling)
        await engine.update([{"names": ["y"]}], 1)
        await engine.generate("c", [1, 2], sampling)

    asyncio.run(before_and_after_an_update())
    loaded = [
        ("replace_adapter", {"update_infos": [{"names": [name]}], "rank": 4, "alpha": 8})
        for name in "xy"
    ]
    assert llm.calls == [loaded[0], "0", "resume", loaded[1], "1", "resume"]
    assert [asked.lora_int_id for asked in llm.adapters] == [1, 1]
    first, second = (prompt["cache_salt"] for prompt in llm.prompts)
    assert first != second


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"temperature": 0.001, "max_tokens": 1},
            r"temperature=0\.01 where it is asked for 0\.001",
        ),
        ({"temperature": 1.0, "max_tokens": 1, "seed": -1}, "seed=None where it is asked for -1"),
    ],
)
def test_sampling_otherwise_than_asked_is_refused(asked: dict[str, Any], words: str) -> None:
    """vLLM changes what it finds too small, and says so in a log that nobody reads."""
    engine = Engine(FakeLLM())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        asyncio.run(engine.generate("a", [1, 2], asked))


def test_texts_and_tokens_that_end_a_completion_are_asked_for_apart() -> None:
    llm = FakeLLM()
    engine = Engine(llm)  # type: ignore[arg-type]
    asked = {"temperature": 1.0, "max_tokens": 1, "stop": ["end", 5, "\n\n", 2]}
    asyncio.run(engine.generate("a", [1, 2], asked))
    assert sorted(llm.parameters[0].stop) == ["\n\n", "end"]
    assert sorted(llm.parameters[0].stop_token_ids) == [2, 5]


def settings(**changes: Any) -> Any:
    """A configuration of vLLM's, as an engine says that it runs with it."""
    used: dict[str, Any] = {
        "dtype": "torch.float32",
        "max_model_len": 64,
        "seed": 3,
        "logprobs_mode": "processed_logprobs",
        "quantization": None,
        "cache_dtype": "auto",
        "enable_chunked_prefill": False,
        "async_scheduling": False,
        **changes,
    }
    part = SimpleNamespace(**used)
    return SimpleNamespace(model_config=part, scheduler_config=part, cache_config=part)


ASKED = {
    "dtype": "float32",
    "max_model_len": 64,
    "seed": 3,
    "logprobs_mode": "processed_logprobs",
    "enable_chunked_prefill": False,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"async_scheduling": True}, []),  # nothing was said of it
        ({"max_model_len": 32}, ["max_model_len is 32 instead of 64"]),
        ({"dtype": "torch.bfloat16"}, ["dtype is bfloat16 instead of float32"]),
        ({"quantization": "fp8"}, ["quantization is fp8 instead of None"]),
        ({"cache_dtype": "fp8"}, ["kv_cache_dtype is fp8 instead of auto"]),
        ({"enable_chunked_prefill": True}, ["enable_chunked_prefill is True instead of False"]),
    ],
)
def test_settings_that_vllm_changed_by_itself_are_named(
    changes: dict[str, Any], expected: list[str]
) -> None:
    assert changed_settings(ASKED, settings(**changes)) == expected


def test_an_engine_that_changed_a_setting_is_ended_and_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM says such things in its log, and serves."""
    ended: list[bool] = []
    used = settings(max_model_len=32, dtype="torch.float32", seed=0)
    llm = SimpleNamespace(vllm_config=used, shutdown=lambda: ended.append(True))

    async def start(_: dict[str, Any]) -> Any:
        return llm

    monkeypatch.setattr(engine_module, "_check_build", lambda: None)
    monkeypatch.setattr(engine_module, "_start_llm", start)
    model = ModelConfig(path="mine", max_length=64, dtype="float32")
    with pytest.raises(UserError, match="serves mine with other .*max_model_len is 32 instead"):
        asyncio.run(Engine.start(model, GeneratorConfig(), TRANSPORTS["object_store"], 0))
    assert ended == [True]


def test_advice_fits_the_error() -> None:
    assert "kv_cache_gib" in _advice("No available memory for the cache blocks")
    assert "heads of this size" in _advice("Unsupported CPU attention configuration: head_dim=16")
    assert "weights.publish=merged" in _advice("GPT2LMHeadModel does not support LoRA yet.")
    assert _advice("no module named x") == ""


def arguments(
    cuda: bool, monkeypatch: pytest.MonkeyPatch, cache_bytes: int | None = None, **keys: Any
) -> dict[str, Any]:
    """What vLLM is started with; `transport` is by default that through the object store."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    transport = TRANSPORTS[keys.pop("transport", "object_store")]
    model, generator = ModelConfig(path="x", max_length=10_000), GeneratorConfig(**keys)
    return engine_arguments(model, generator, transport, 0, cache_bytes)


def test_what_vllm_chooses_on_cuda_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multi-head latent attention wants blocks of 64 there; it profiles the cache itself."""
    of_cpu = {"block_size", "async_scheduling", "enable_chunked_prefill", "kv_cache_memory_bytes"}
    assert of_cpu <= arguments(False, monkeypatch, max_staleness=0).keys()
    assert not of_cpu & arguments(True, monkeypatch, max_staleness=0).keys()


def test_a_batch_on_cuda_is_not_that_of_a_server_nobody_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "max_num_batched_tokens"
    assert arguments(True, monkeypatch)[name] == 8192
    assert arguments(True, monkeypatch, max_batched_tokens=16_384)[name] == 16_384
    # vLLM refuses a batch that has no room for a token of each sequence.
    assert arguments(True, monkeypatch, max_concurrent_sequences=9000)[name] == 9000


def test_on_a_cpu_a_prompt_in_one_piece_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "max_num_batched_tokens"
    assert arguments(False, monkeypatch, max_staleness=0)[name] == 10_000
    assert arguments(False, monkeypatch, max_batched_tokens=512)[name] == 512
    assert name not in arguments(False, monkeypatch)


@pytest.mark.parametrize("split", [{"tensor_parallel": 2}, {"pipeline_parallel": 4}])
def test_devices_of_a_generator_are_worked_by_vllms_own_processes(
    split: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cuda in (True, False):
        assert arguments(cuda, monkeypatch, **split)["distributed_executor_backend"] == "mp"


def test_a_planned_cache_is_the_one_that_vllm_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = arguments(True, monkeypatch, 123, transport="ipc", memory_fraction=0.7)
    assert found["kv_cache_memory_bytes"] == 123
    assert found["enable_sleep_mode"] is True
    assert found["gpu_memory_utilization"] == 0.7


def test_vllm_makes_room_for_one_adapter_of_a_rank_that_it_knows(tmp_path: Path) -> None:
    assert get_args(MaxLoRARanks) == SERVED_RANKS
    folder = save_tiny_model(tmp_path, "qwen2")
    for rank, targets, room, layers in (
        (3, "q_proj, self_attn.v_proj", 8, "q_proj v_proj"),
        (33, "all-linear", 64, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        (512, "mlp.up_proj", 512, "up_proj"),
    ):
        adapter = AdapterConfig(rank=rank, targets=targets)
        assert adapter_arguments(ModelConfig(path=str(folder)), adapter) == {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": room,
            "lora_target_modules": layers.split(),
        }
    assert AdapterConfig(rank=513).served_rank == 0


def test_an_engine_that_is_sent_weights_knows_of_no_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Teachers, evaluations, and runs that publish merged, whatever `model.adapter` says."""
    assert not [name for name in arguments(False, monkeypatch) if "lora" in name]


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (None, r"is the build for CUDA, and torch sees no CUDA device: compare the driver"),
        ("", r"sees no CUDA device \(learner\.device=cpu hides them\)"),
        ("7", r"sees no CUDA device \(CUDA_VISIBLE_DEVICES=7\)"),
    ],
)
def test_a_build_for_cuda_without_cuda_is_refused_by_name(
    hidden: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(UserError, match=message):
        engine_module._check_build()


@pytest.mark.parametrize(
    ("version", "known"), [("0.32.1", True), ("0.33.0", True), ("0.34", False)]
)
def test_only_versions_whose_interface_is_known_are_used(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    if known:
        engine_module._check_build()
    else:
        with pytest.raises(UserError, match=r"vLLM 0\.34 is installed, 0\.32 or 0\.33 is needed"):
            engine_module._check_build()
