# SPDX-License-Identifier: Apache-2.0
"""What a tiny model is: the files that its release has beside the weights, and the tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_sm12x.tiny_checkpoint.tensors import Tensor
from vllm_sm12x.tiny_checkpoint.tokenizer import SpecialTokens


@dataclass(frozen=True)
class TinyModel:
    """A model to write.

    Attributes:
        name: what `vllm-sm12x tiny-checkpoint --model` calls it.
        config, generation_config: the contents of the files of these names.
        tensors: all tensors of the checkpoint, in the order of the release.
        tensors_with_successors: the same with those replaced by which most drafts are accepted;
            None where the model has no such weights.
    """

    name: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokens: SpecialTokens
    tensors: Callable[[], list[Tensor]]
    tensors_with_successors: Callable[[], list[Tensor]] | None = None
