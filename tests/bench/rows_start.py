"""From the command to the first trained step, against a vLLM that starts and answers alone.

The tiny model, in turns. No trainer that samples by vLLM starts sooner than vLLM does.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import CONFIGS, ROOT, Row, emit

from common.record.metrics import read_metrics
from deploy.models.resolve import resolve_model

REPEATS = 3
STARTS = "time/start/"


def trained(folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds until the first step was on record, and those of the parts of the start."""
    keys = ("steps=1", f"runs_dir={folder}", "name=first", "eval.every=0", "eval.prompts=8")
    command = [sys.executable, "-m", "deploy.cli", "train", "--config", f"{CONFIGS}/tiny.yaml"]
    began, metrics = time.monotonic(), folder / "first" / "metrics.jsonl"
    with subprocess.Popen([*command, *keys], cwd=ROOT, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None and not (metrics.is_file() and len(read_metrics(metrics)) > 1):
            time.sleep(0.05)
        seconds = time.monotonic() - began
    if run.returncode:
        raise SystemExit(f"the run ended with status {run.returncode}")
    first = read_metrics(metrics)[0]
    return seconds, {
        key.removeprefix(STARTS): value for key, value in first.items() if STARTS in key
    }


def answered(model: str) -> float:
    """Seconds until vLLM alone had sampled a token, imports included."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, __file__, model], stdout=subprocess.PIPE, text=True
    ) as alone:
        assert alone.stdout is not None
        while alone.stdout.readline().strip() != "sampled":
            if alone.poll() is not None:
                raise SystemExit(f"vLLM alone ended with status {alone.returncode}")
        seconds = time.monotonic() - began
        alone.communicate(timeout=60)
    return seconds


def alone(model: str) -> None:
    """In a process of its own, engine and worker in it too, as a generator has them."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=2**28,
        distributed_executor_backend="uni",
        async_scheduling=False,
    )
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=1), use_tqdm=False)
    print("sampled", flush=True)


def main() -> None:
    model = str(resolve_model("builtin:tiny-chain-sum"))
    ours, others, parts = [], [], list[dict[str, float]]()
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as name:
            seconds, start = trained(Path(name))
        ours.append(seconds)
        parts.append(start)
        others.append(answered(model))
    median = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
    emit(
        [
            Row(
                "from the command to the first trained step, tiny model",
                "vLLM's own start and first token",
                [a / b for a, b in zip(ours, others, strict=True)],
                3.0,
                False,
                f"{statistics.median(ours):.1f} against {statistics.median(others):.1f} s; "
                + ", ".join(f"{key} {value:.1f}" for key, value in median.items()),
            )
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        alone(sys.argv[1])
    else:
        main()
