"""The teacher: found, and compared with the policy, before a process is started.

A teacher's log-probability of a token means something only where it reads the same token ids in
the same frame. So its vocabulary and its chat template must be those of the policy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config.sections import Config, TeacherConfig
from common.errors import UserError
from deploy.models.resolve import resolve_model, text_config
from deploy.placement.options import uses_cuda

_SHOWN = 3


def check_teacher(config: Config) -> None:
    """Raise `UserError` where a teacher is needed and none is named, or where none can wait."""
    if config.teacher.path is None and config.algorithm.advantage.scorer == "teacher":
        raise UserError(
            "algorithm.advantage.scorer=teacher needs a teacher: set teacher.path to a model "
            "with the vocabulary of model.path"
        )
    here = config.placement.generator_device is None
    if config.teacher.offload and here and not uses_cuda(config):
        raise UserError(
            "teacher.offload=true moves a teacher off a CUDA device between its passes, and this "
            "run is on CPUs, where it is in the host's memory anyway: set it to false"
        )


def find_teacher(config: Config, policy: Path) -> TeacherConfig:
    """The teacher's section with a local folder as its path.

    Args:
        policy: the folder of the model that is trained.

    Raises:
        UserError: none is named and one is needed, or it does not read what the policy writes.
    """
    check_teacher(config)
    path = config.teacher.path
    if path is None:
        return config.teacher
    folder = resolve_model(path)
    _check_tokens(path, _tokenizer(policy, config), _tokenizer(folder, config), config)
    longest = text_config(folder, "max_position_embeddings")
    needed = config.model.max_length + (config.teacher.count > 0)  # vLLM wants one behind a score
    if isinstance(longest, int) and longest < needed:
        raise UserError(
            f"teacher.path={path} reads {longest} tokens at most and model.max_length="
            f"{config.model.max_length}: lower the latter, or choose another teacher"
        )
    return replace(config.teacher, path=str(folder))


def _tokenizer(folder: Path, config: Config) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=config.model.trust_remote_code
    )


def _check_tokens(path: str, policy: Any, teacher: Any, config: Config) -> None:
    """Raise `UserError` unless both read the same ids, and frame a conversation alike."""
    mine, theirs = policy.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        odd = sorted({token for token, _ in mine.items() ^ theirs.items()})
        raise UserError(
            f"teacher.path={path} has another vocabulary than model.path: {len(odd)} tokens have "
            f"another id or are in one alone, as {', '.join(map(repr, odd[:_SHOWN]))}. Choose a "
            "teacher of the same family"
        )
    if policy.eos_token_id != teacher.eos_token_id:
        raise UserError(
            f"teacher.path={path} ends a text with token {teacher.eos_token_id}, and model.path "
            f"with {policy.eos_token_id}: choose a teacher of the same kind (base or instruct)"
        )
    own = config.data.template == "chat" and config.data.chat_template is None
    if own and policy.chat_template != teacher.chat_template:
        raise UserError(
            f"teacher.path={path} has another chat template than model.path: name the one that "
            "both shall read in data.chat_template, or choose another teacher"
        )
