"""The policy as the learner holds it: a transformers model that scores packed rows.

`load_policy` reads a Hugging Face folder and turns the model into one that returns
log-probabilities: packed attention, and `LogprobHead` in place of the output embedding.
Transformations that an architecture applies to logits after that embedding move into the head.
`learner.policy.self_check` compares the result with the untouched model, so that an architecture
with a peculiarity nobody foresaw stops the run instead of training on wrong numbers.

Shapes: T row tokens, N scored tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from common.errors import UserError
from learner.policy.as_served import follow_engine, reach
from learner.policy.attention import ATTENTION_NAME
from learner.policy.logprobs import HeadRequest, LogitTransform, LogprobHead
from learner.policy.packing import PackedRow
from learner.policy.self_check import HALF_TOLERANCE, SelfCheck, check_row
from learner.policy.varlen import VARLEN_DEVICES, VARLEN_NAME

if TYPE_CHECKING:
    from common.config.sections import ModelConfig
    from learner.policy.adapters import Adapters

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_PLAIN_ATTENTION = "eager"
"""What the self-check compares with. Not `sdpa`: there transformers drops the soft cap of
attention scores (Gemma 2) without a word."""

_GRADIENT_TOLERANCE = 0.1
"""Share of a gradient's norm. bfloat16 rounds elements by 0.4 %, a wrong term is of order 1."""


class Policy:
    """A causal language model with a log-probability head.

    Attributes:
        model: the module to shard and train; its forward returns [1, N, 2].
        pristine_config, model_class: as loaded, for writing the model back.
        tokenizer_files: contents by name, for the same; the folder they came from may be a
            checkpoint that is pruned before the next is written.
        reach: see `learner.policy.as_served.reach`.
        adapters: None where all weights are trained.
    """

    tokenizer_files: Mapping[str, bytes] = MappingProxyType({})
    reach = 0
    adapters: Adapters | None = None

    def __init__(self, model: PreTrainedModel, chunk_tokens: int) -> None:
        self.pristine_config = copy.deepcopy(model.config)
        self.model_class = type(model)  # FSDP changes the model's class in place
        self.model = model
        output = model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no linear output embedding that can be replaced; "
                "choose a causal language model"
            )
        self.head = LogprobHead(output, chunk_tokens, _take_over_logit_transform(model))
        model.set_output_embeddings(self.head)
        model.config._attn_implementation = ATTENTION_NAME
        model.eval()  # no dropout: a policy's log-probabilities are deterministic

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder blocks: the largest module list of the model."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise UserError(
                f"{type(self.model).__name__} has no list of decoder layers to shard; choose a "
                "causal language model"
            )
        return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))

    def blank(self, dtype: torch.dtype) -> PreTrainedModel:
        """The untouched model on the meta device, as a mould for checkpoints in `dtype`."""
        config = copy.deepcopy(self.pristine_config)
        config.dtype = dtype
        with torch.device("meta"), no_init_weights():
            blank: PreTrainedModel = self.model_class(config)
        blank.tie_weights()
        return blank

    @property
    def hidden_size(self) -> int:
        return int(self.head.weight.shape[1])

    def logprobs(
        self,
        row: PackedRow,
        *,
        temperature: float,
        with_entropy: bool = False,
        entropy_learns: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the row's N completion tokens, float32, in nats."""
        request = HeadRequest(
            row.predictor_rows_M, row.labels_M, temperature, with_entropy, entropy_learns
        )
        with self.head.requested(request):
            scores_N2 = row.of_tokens(self.outputs(row)[0])
        return scores_N2[:, 0], scores_N2[:, 1]

    def outputs(self, row: PackedRow) -> Tensor:
        """What the model's head gives for a row, once it has been asked for something."""
        found: Tensor = self.model(
            input_ids=row.input_ids_1T,
            position_ids=row.position_ids_1T,
            use_cache=False,
            packed_layout=row.layout,
        ).logits
        if not torch.is_grad_enabled():  # a pass that only scores leaves no dense masks behind
            row.layout.derived.clear()
        return found


def _take_over_logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Move what the model does to logits into the head, where it meets real logits.

    Known: soft cap (Gemma 2 and 3), `logits_scaling` divisor (Granite), `logit_scale` (Cohere).
    """
    config: Any = model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        config.final_logit_softcapping = None
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
        config.logits_scaling = 1.0
        if hasattr(model, "logits_scaling"):
            model.logits_scaling = 1.0
    if isinstance(getattr(model, "logit_scale", None), float | int):
        scale *= float(model.logit_scale)
        model.logit_scale = 1.0
    return LogitTransform(scale, softcap)


def load_model(config: ModelConfig, dtype: torch.dtype, *, weights: bool) -> PreTrainedModel:
    """The model on the CPU; without `weights` its memory stays untouched until it is filled.

    Raises:
        UserError: the path is not a model folder transformers can read.
    """
    try:
        hf_config = AutoConfig.from_pretrained(
            config.path, trust_remote_code=config.trust_remote_code
        )
        _refuse_quantised(hf_config, config.path)
        if weights:
            return AutoModelForCausalLM.from_pretrained(
                config.path,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                attn_implementation=_PLAIN_ATTENTION,
            )
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
        model.tie_weights()  # skipping the initialisation skips the tying, which it does last
        return model
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the model at {config.path!r}: {error}. "
            "model.path must be a folder with config.json and safetensors weights"
        ) from error


def _refuse_quantised(config: Any, path: str) -> None:
    """Raise `UserError` for weights of a few bits, which neither a gradient nor an update fits."""
    method = getattr(config, "quantization_config", None)
    if method is not None:
        raise UserError(
            f"the model at {path!r} is quantised ({_method_of(method)}), and its weights can "
            "neither be trained nor published: give the folder it was quantised from"
        )


def _method_of(method: Any) -> Any:
    return method.get("quant_method") if isinstance(method, dict) else method


def load_policy(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    logits_mib: float,
    temperature: float,
    weights: bool,
) -> tuple[Policy, float]:
    """The policy and the largest log-probability gap its self-check found (0 without weights).

    Where `weights` is False, the caller fills the parameters (see `learner.training.fsdp`).
    """
    model = load_model(config, dtype, weights=weights)
    pristine = copy.deepcopy(model.config)
    follow_engine(model, config.max_length)
    length = reach(pristine, config.max_length)
    check = SelfCheck(model, temperature, length, config.max_length) if weights else None
    row_bytes = 4 * model.get_output_embeddings().weight.shape[0]
    policy = Policy(model, max(1, int(logits_mib * 2**20 / row_bytes)))
    policy.pristine_config, policy.reach = pristine, length
    policy.tokenizer_files = _tokenizer_files(Path(config.path))
    if check is None:
        return policy, 0.0
    try:
        return policy, check.gap(policy, torch.device("cpu"))
    except UserError:
        raise
    except Exception as error:  # of every kind: the architecture's own code meets a layout
        raise UserError(
            f"{type(model).__name__} cannot score packed rows: {type(error).__name__}: {error}. "
            "Choose another model"
        ) from error


def use_varlen(policy: Policy, device: torch.device, temperature: float) -> None:
    """Switch to the variable-length kernel if it gives the numbers of the padded grids here.

    Raises:
        UserError: it does not, or it cannot run there (on a CPU it would end the process).
    """
    fault = varlen_fault(policy, device, temperature)
    if fault is not None:
        raise UserError(f"{fault}: use learner.attention=grids")


def varlen_fault(policy: Policy, device: torch.device, temperature: float) -> str | None:
    """Switch to the variable-length kernel; what speaks against it on `device`, None if nothing.

    A forward pass of each on `device`, and where the policy learns a backward pass; collective
    where it is sharded.
    """
    if device.type not in VARLEN_DEVICES:
        return f"learner.attention=varlen is a CUDA kernel and {device} is none"
    expected_N, expected = _pass_of(policy, temperature)
    policy.model.config._attn_implementation = VARLEN_NAME
    try:
        found_N, found = _pass_of(policy, temperature)
    except (RuntimeError, TypeError, ValueError, UserError) as error:
        return f"the kernel of learner.attention=varlen does not run on {device}: {error}"
    gap = float((found_N - expected_N).abs().max())
    apart = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    share = float(apart / torch.stack([gradient.norm() for gradient in expected]).norm())
    if not (gap <= HALF_TOLERANCE and share <= _GRADIENT_TOLERANCE):
        return (
            f"the kernel of learner.attention=varlen disagrees with learner.attention=grids on "
            f"{device}: by {gap:.3g} nats (tolerance {HALF_TOLERANCE}), and by {share:.2g} of the "
            f"gradient (tolerance {_GRADIENT_TOLERANCE})"
        )
    return None


def _pass_of(policy: Policy, temperature: float) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the check row, and the gradients of their sum: this rank's parts."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    with torch.set_grad_enabled(bool(parameters)):
        logprobs_N, _ = policy.logprobs(check_row(policy.model), temperature=temperature)
    if not parameters:
        return logprobs_N, [logprobs_N]
    logprobs_N.sum().backward()
    gradients = [_part(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
    policy.model.zero_grad(set_to_none=True)
    return logprobs_N.detach(), gradients


def _part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checkpoint_activations(layers: nn.ModuleList) -> None:
    """Keep only each layer's input and recompute the rest in backward.

    `forward` is wrapped, not the module: parameter names stay those of the model, and FSDP's
    hooks, which gather parameters, run outside the recomputed part.
    """
    for layer in layers:
        forward = layer.forward

        def recomputed(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

        layer.forward = recomputed


def save_hf_folder(
    policy: Policy, state: dict[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write a folder that transformers and vLLM load, from full tensors in compute dtype."""
    blank = policy.blank(dtype)
    blank.generation_config = policy.model.generation_config
    blank.save_pretrained(folder, state_dict=state)
    for name, content in policy.tokenizer_files.items():
        (folder / name).write_bytes(content)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def _tokenizer_files(source: Path) -> dict[str, bytes]:
    return {
        name: (source / name).read_bytes() for name in _TOKENIZER_FILES if (source / name).is_file()
    }
