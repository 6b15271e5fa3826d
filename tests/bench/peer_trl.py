"""TRL's GRPOTrainer on prompts of ours, in an environment of its own (`peer_setup.sh`).

    python peer_trl.py JOB.json RESULT.json

JOB: model, prompts [[text, answer]], held_out [[text, answer]], steps, prompts_per_step,
group_size, max_tokens, learning_rate, warmup_steps, microbatch, bf16, eval_every (0: never),
target, seed.
RESULT: seconds of every step, [[training seconds, held-out accuracy]] of every evaluation, which
are not in the seconds, and tokens, the mean of a completion. Imports nothing of this project.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NUMBER = re.compile(r"-?\d+")


def is_right(text: str, answer: str) -> bool:
    found = NUMBER.findall(text)
    return bool(found) and found[-1] == answer


LENGTHS: list[int] = []
"""Of all completions so far."""


def reward(
    completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: object
) -> list[float]:
    LENGTHS.extend(map(len, completion_ids))
    return [float(is_right(text, want)) for text, want in zip(completions, answer, strict=True)]


class Clock(TrainerCallback):
    """Step times without evaluation; stops at the target accuracy."""

    def __init__(self, job: dict[str, Any], tokenizer: Any) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.seconds: list[float] = []
        self.accuracy: list[tuple[float, float]] = []
        self.started = time.perf_counter()

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: object, state: object, control: object, **kw: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        every = self.job["eval_every"]
        if every and len(self.seconds) % every == 0:
            self.accuracy.append((sum(self.seconds), self.evaluate(kw["model"])))
            if self.accuracy[-1][1] >= self.job["target"]:
                control.should_training_stop = True  # type: ignore[attr-defined]
        self.started = time.perf_counter()

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> float:
        right = 0
        for start in range(0, len(self.job["held_out"]), 100):
            rows = self.job["held_out"][start : start + 100]
            inputs = self.tokenizer(
                [text for text, _ in rows],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            ids = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=self.job["max_tokens"], do_sample=False
            )
            texts = self.tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            right += sum(is_right(t, want) for t, (_, want) in zip(texts, rows, strict=True))
        return right / len(self.job["held_out"])


def settings(job: dict[str, Any], folder: str) -> GRPOConfig:
    """TRL's settings for a job; `folder` is for what it writes."""
    completions = job["prompts_per_step"] * job["group_size"]
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=job["bf16"],
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=completions // job["microbatch"],
        num_generations=job["group_size"],
        max_completion_length=job["max_tokens"],
        max_tool_calling_iterations=job.get("tool_calls"),
        temperature=1.0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=job["warmup_steps"],
        max_grad_norm=1.0,
        beta=0.0,
        max_steps=job["steps"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        seed=job["seed"],
        disable_tqdm=True,
    )


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    data = Dataset.from_list([{"prompt": text, "answer": want} for text, want in job["prompts"]])
    clock = Clock(job, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings(job, sys.argv[2] + ".trainer"),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    with open(sys.argv[2], "w") as file:
        tokens = sum(LENGTHS) / len(LENGTHS)
        json.dump({"seconds": clock.seconds, "accuracy": clock.accuracy, "tokens": tokens}, file)


if __name__ == "__main__":
    main()
