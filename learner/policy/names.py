"""The names and shapes that tensors have in an architecture's checkpoints.

transformers holds some architectures otherwise than their checkpoints do: the experts of a layer as
one tensor, or modules under other names. Engines know the checkpoint's form. So weights travel as
`save_pretrained` would write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_LAYER = re.compile(r".*?\.\d+\.")
"""What the names of a layer's tensors begin with."""


class CheckpointNames:
    """Turns a model's tensors into those of its checkpoints."""

    def __init__(self, blank: PreTrainedModel) -> None:
        """`blank`: a model of the architecture, best on the meta device, that was not loaded: one
        that was remembers in which form it was read."""
        self._blank = blank
        own = list(blank.state_dict().items())
        self._same = _shapes(own) == _shapes(self._converted(own))

    def of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the checkpoint, for tensors in the order of the model's layers.

        A layer at a time is held. Where the model has the checkpoint's form already, the tensors
        pass through one by one.
        """
        return iter(tensors) if self._same else self._converted(tensors)

    def _converted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for _, layer in groupby(tensors, key=lambda pair: _layer_of(pair[0])):
            yield from revert_weight_conversion(self._blank, dict(layer)).items()


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors}


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found.group() if found else ""
