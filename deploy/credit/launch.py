"""`grpo-lambda credit RUN --step N` measures what the segments of completions were worth.

    log of the run --> completions of the step --> branches
    checkpoint     --> the policy that sampled them --> K continuations of every branch, judged
    --> V of every prefix, advantage of every segment
    --> agreement of each rule's credit, and of its gradient

RUN/measured/step-N/trajectories/       every continuation, as training logs it
                   /segments.parquet    a row a segment
                   /results.json        the table
            /policy-V/                  weights of version V, where no checkpoint has them

Branches are sampled by the generators of an evaluation, and judged as whole answers: the prefix and
its continuation. An episode is brought to a branch by its environment, which is told what the
policy said (`deploy.credit.episodes`), and played on to its end. The same call again goes on where
one was interrupted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from actors.rollout.guidance import GuidedStart
from common.branch_points import BranchRules, branch_points
from common.config.sections import Config
from common.errors import UserError
from common.record.credit_log import credit_path, read_credit
from deploy.command.presets import RECIPES
from deploy.credit import report
from deploy.credit.branches import parse_rules
from deploy.credit.completions import Sampled, chosen, digest_of, policy_version
from deploy.credit.episodes import begun_at, check_repeats
from deploy.credit.files import FOLDER, SEGMENTS, measured_path
from deploy.credit.gradient import directions
from deploy.credit.measured import Floats, Measured
from deploy.eval.launch import Job, open_folder, sample_all
from deploy.eval.runner import Start, logged, logged_rewards
from deploy.eval.settings import (
    EvaluationConfig,
    Sampling,
    fingerprint,
    played_in,
    sampling_config,
    versions,
)
from deploy.inspector.replay import other_rule, replay, run_config, step_batches, write_policy
from deploy.inspector.tokens import FILE, TokenTexts
from deploy.placement.options import with_compute_dtype
from deploy.run.display import PlainDisplay

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """One call of `grpo-lambda credit`."""

    run: Path
    step: int
    at: Sequence[str] = ("turns", "sentences", "every:4")
    points: int = 12
    completions: int = 16
    continuations: int = 8
    samples: int = 4000
    seconds: float = math.inf
    recipes: Sequence[str] = ()
    out: Path | None = None


@dataclass(frozen=True)
class Branched:
    """A completion with its branches."""

    sampled: Sampled
    texts: tuple[str, ...]
    """Text of each token."""
    points: tuple[int, ...]

    def left(self, point: int) -> int:
        """Tokens that the policy sampled from `point` on."""
        return len(self.texts) - point - sum(map(math.isnan, self.sampled.logprobs[point:]))

    def turns_left(self, point: int) -> int:
        """Turns that end behind `point`."""
        return sum(turn["end"] > point for turn in self.sampled.row["turns"])

    def start(self, point: int, config: Config) -> Start:
        """What the continuations of a branch go on from."""
        if config.environment.playing:
            return begun_at(self.sampled.row, point, config)
        return GuidedStart(self.sampled.token_ids[:point], int(point > 0))


def measure(options: Options) -> report.Results:
    """Sample what is missing, and say what was measured.

    Raises:
        UserError: wrong input, or data that are gone. RunError: sampling cannot go on; call again
            to go on with what is missing.
    """
    places, notify = _checked(options), PlainDisplay(0).event
    config = run_config(options.run)
    _check_run(config)
    step = options.step
    groups = step_batches(options.run, range(step, step + 1))[step]
    version = policy_version(groups)
    # Rules that cannot be asked are refused before anything is sampled.
    others = {
        name: other_rule(options.run, f"recipe={name}".split(","), RECIPES)
        for name in options.recipes
    }
    policy = options.run / FOLDER / f"policy-{version}"
    if not policy.is_dir():
        policy = write_policy(options.run, version, policy)
    completions = chosen(groups, version, options.completions)
    branched = _within(_branched(completions, policy, places), options)
    job = _job(options, config, policy, version, branched, notify)
    try:
        if job.missing:
            if config.environment.playing:
                check_repeats(config, [b.sampled.row for b in branched], policy)
            sample_all([job], notify)
        measured = _measured(branched, job.run.path / "trajectories", options.continuations)
        rules = _rules(options, config, others)
        notify(f"gradients of {len(branched)} completions under {len(rules)} rules")
        ways = directions(
            with_compute_dtype(config),
            policy if version else None,
            groups,
            {b.sampled.key: each for b, each in zip(branched, measured, strict=True)},
            rules,
        )
        credits = {name: _by_completion(table) for name, (_, table) in rules.items()}
        results = report.of([(b.sampled, b.texts) for b in branched], measured, credits, ways)
        report.write(job.run.path, results)
    finally:
        job.run.release()
    print(f"\n{results.table}\n  {job.run.path / SEGMENTS}", flush=True)
    return results


def _checked(options: Options) -> BranchRules:
    """The rules of `--at`. Raises: `UserError` for numbers that cannot be."""
    for name in ("completions", "continuations", "samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g} must be above 0")
    return parse_rules(options.at, options.points)


def _check_run(config: Config) -> None:
    if config.environment.command is not None:
        raise UserError(
            "the run's episodes are played by a command (environment.command), which asks the "
            "policy what it likes, in conversations of its own: it cannot be brought to a branch "
            "and on from there. Runs of single answers and of environment.name can be measured"
        )


def _branched(completions: Sequence[Sampled], policy: Path, rules: BranchRules) -> list[Branched]:
    decoder = TokenTexts(Tokenizer.from_file(str(policy / FILE)))
    found = []
    for each in completions:
        texts = decoder.texts(list(each.token_ids))
        points = branch_points(texts.__getitem__, each.logprobs, rules, first=each.first)
        found.append(Branched(each, tuple(texts), tuple(points)))
    return found


def _within(branched: list[Branched], options: Options) -> list[Branched]:
    """As many completions as `--samples` allows, the first ones. Raises: `UserError` for none."""
    left, found = options.samples, list[Branched]()
    for each in branched:
        left -= len(each.points) * options.continuations
        if left < 0:
            break
        found.append(each)
    if not found:
        raise UserError(
            f"--samples {options.samples} is not enough for one completion with "
            f"{len(branched[0].points)} branches of {options.continuations} continuations: raise "
            "it, or lower --points or --continuations"
        )
    return found


def _job(
    options: Options,
    config: Config,
    policy: Path,
    version: int,
    branched: Sequence[Branched],
    notify: Notify,
) -> Job:
    """What is to be sampled, with its cost said; opens the folder."""
    tokens = config.generator.max_completion_tokens
    # No seed of a run is below 0, so none of its samples is drawn again.
    sampling = Sampling(
        options.continuations, config.generator.temperature, tokens, -1 - config.seed
    )
    serving = _serving(config, policy)
    points = [each.points for each in branched]
    settings: dict[str, Any] = {
        "model": str(policy),
        "model_fingerprint": fingerprint(policy),
        "step": options.step,
        "version": version,
        "branches": digest_of([each.sampled for each in branched], points),
        "dtype": serving.model.dtype,
        "verifier": [asdict(rule) for rule in config.verifier.rules],
        "sampling": asdict(sampling),
        "versions": versions(),
        **({"environment": played_in(serving)} if serving.environment.playing else {}),
    }
    path = options.out or measured_path(options.run, options.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = open_folder(path, serving, settings)
    total = sum(map(len, points)) * options.continuations
    there = logged(path / "trajectories")
    order = sorted(range(total), key=lambda n: (n % options.continuations, n))
    missing = [number for number in order if number not in there]
    notify(
        f"{len(branched)} completions of step {options.step}, sampled by version {version}: "
        f"{sum(map(len, points))} branches with {options.continuations} continuations each are "
        f"{total} samples of some {_each_takes(branched, config)}; {total - len(missing)} are there"
    )
    return Job(
        "measure",
        sampling,
        [each.sampled.prompt for each in branched for _ in each.points],
        serving,
        settings,
        run,
        missing,
        [each.start(point, config) for each in branched for point in each.points],
        options.seconds,
    )


def _each_takes(branched: Sequence[Branched], config: Config) -> str:
    """What a continuation costs, if it is as long as what is on record behind its branch."""
    all_points = [(each, point) for each in branched for point in each.points]
    count = max(1, len(all_points))
    tokens = f"{sum(b.left(point) for b, point in all_points) / count:.0f} tokens"
    if not config.environment.playing:
        return tokens
    turns = sum(b.turns_left(point) for b, point in all_points) / count
    return f"{tokens} in {turns:.1f} turns"


def _serving(config: Config, policy: Path) -> EvaluationConfig:
    """The generators and verifiers of the run, without a learner; no sample is cut off.

    What is measured is the value of a part under the policy. So generators hold the checkpoint's
    weights as they are, also where those of the run computed in eight bits.
    """
    model = replace(config.model, path=str(policy))
    generator = replace(config.generator, group_cap_s=None, quantization=None)
    return with_compute_dtype(sampling_config(replace(config, model=model, generator=generator)))


def _measured(branched: Sequence[Branched], log: Path, continuations: int) -> list[Measured]:
    """The rewards of all continuations, by branch.

    Raises: `UserError` where no continuation at all has a reward.
    """
    rewards: dict[int, list[float]] = defaultdict(list)
    for number, reward in logged_rewards(log).items():
        if reward is not None:
            rewards[number // continuations].append(reward)
    if not rewards:
        raise UserError(
            f"no continuation in {log} has a reward: their verifier failed or was too slow for all "
            "of them. Raise verifier.timeout_s in the run's config.yaml, or --seconds"
        )
    seen = [r for each in rewards.values() for r in each] + [b.sampled.reward for b in branched]
    span, first, found = (min(seen), max(seen)), 0, []
    for each in branched:
        numbers = range(first, first + len(each.points))
        first = numbers.stop
        own = tuple(tuple(rewards[number]) for number in numbers)
        found.append(Measured(each.points, len(each.texts), each.sampled.reward, own, span))
    return found


def _rules(
    options: Options, config: Config, others: Mapping[str, tuple[str, Config]]
) -> dict[str, tuple[Config, pa.Table]]:
    """Configuration and credit of the run's own rule and of the others."""
    run, step = options.run, options.step
    logged = credit_path(run, step).is_file()
    if logged and not others:
        return {"this run": (config, read_credit(run, step))}
    found = replay(run, step, *others.values())
    rules = {"this run": (config, read_credit(run, step) if logged else found.credit)}
    for (name, (_, other)), judged in zip(others.items(), found.others, strict=True):
        rules[name] = (other, judged.credit)
    return rules


def _by_completion(credit: pa.Table) -> dict[tuple[int, int], Floats | None]:
    """Credit of every token, by group and completion; None where it was not trained."""
    names = ("group_id", "completion_index", "advantages")
    rows = zip(*(credit[name].to_pylist() for name in names), strict=True)
    return {
        (group, index): None if values is None else np.array(values, np.float64)
        for group, index, values in rows
    }
