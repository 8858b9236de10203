# SPDX-License-Identifier: Apache-2.0
"""Every token gets a successor that it makes likely, and that a draft layer knows as well.

With random weights alone the layer that drafts tokens agrees with the model on none of them.
"""

from dataclasses import replace

import numpy as np

from vllm_sm12x.tiny_checkpoint import draws
from vllm_sm12x.tiny_checkpoint.tensors import Tensor

_E4M3_ONE = 0x38
_E8M0_ONE = 127


def order(seed: int, vocab: int, special_ids: frozenset[int]) -> np.ndarray:
    """int64 [ordinary ids]: all but the special ids, each followed by its successor.

    The last one's is the first: one cycle, so that an answer does not soon repeat itself.
    """
    ordinary = np.setdiff1d(np.arange(vocab), sorted(special_ids))
    return ordinary[draws.permutation(seed, "successors", ordinary.size)]


def head(tensor: Tensor, embedding: Tensor, special_ids: frozenset[int], factor: float) -> Tensor:
    """The LM head `tensor` with `factor` times a token's embedding added to its successor's row.

    Both are BF16 [vocab, hidden].
    """

    def fill(seed: int, name: str) -> np.ndarray:
        rows = draws.bf16_values(tensor.fill(seed, name)).reshape(tensor.shape)
        added = draws.bf16_values(embedding.fill(seed, embedding.name)).reshape(embedding.shape)
        added *= np.float32(factor)
        tokens = order(seed, tensor.shape[0], special_ids)
        rows[np.roll(tokens, -1)] += added[tokens]
        return draws.bf16_codes(rows)

    return replace(tensor, fill=fill)


def identity_blocks(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A square layer with identities for the blocks on its diagonal.

    e4m3 [hidden, hidden] and one UE8M0 scale for each block.
    """
    blocks = scale.shape[0]
    size = weight.shape[0] // blocks
    diagonal = np.arange(blocks)

    def codes(seed: int, name: str) -> np.ndarray:
        found = weight.fill(seed, name).reshape(blocks, size, blocks, size)
        found[diagonal, :, diagonal, :] = _E4M3_ONE * np.eye(size, dtype=np.uint8)
        return found

    def scales(seed: int, name: str) -> np.ndarray:
        found = scale.fill(seed, name).reshape(blocks, blocks)
        found[diagonal, diagonal] = _E8M0_ONE
        return found

    return replace(weight, fill=codes), replace(scale, fill=scales)
