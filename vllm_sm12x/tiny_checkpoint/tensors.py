# SPDX-License-Identifier: Apache-2.0
"""A tensor of a checkpoint, and the kinds of tensors that every tiny model has."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from vllm_sm12x.tiny_checkpoint import draws

# safetensors dtype name -> bytes an element. DeepSeek V4 stores packed e2m1 pairs as I8.
_ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[int, str], np.ndarray]  # (seed, name) -> the stored elements, little endian

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    def draw(self, seed: int) -> np.ndarray:
        """The tensor's bytes, uint8 [nbytes]: a function of (seed, name) alone."""
        data = self.fill(seed, self.name).reshape(-1).view(np.uint8)
        assert data.size == self.nbytes, (self.name, data.size, self.nbytes)
        return data


def normal(
    name: str, shape: tuple[int, ...], std: float, *, mean: float = 0.0, dtype: str = "BF16"
) -> Tensor:
    def fill(seed: int, tensor: str) -> np.ndarray:
        values = draws.normal_f32(seed, tensor, prod(shape))
        values *= np.float32(std)
        values += np.float32(mean)
        return draws.bf16_codes(values) if dtype == "BF16" else values.astype("<f4", copy=False)

    return Tensor(name, dtype, shape, fill)


def linear(name: str, rows: int, columns: int, *, gain: float = 1.0) -> Tensor:
    return normal(name, (rows, columns), gain * columns**-0.5)


def head(name: str, vocab: int, hidden: int, special_ids: frozenset[int]) -> Tensor:
    """The LM head; rows of special tokens are zero, so that a greedy answer is text, to its end."""

    def fill(seed: int, tensor: str) -> np.ndarray:
        rows = draws.normal_f32(seed, tensor, vocab * hidden).reshape(vocab, hidden)
        rows *= np.float32(2 * hidden**-0.5)
        rows[sorted(special_ids)] = 0.0
        return draws.bf16_codes(rows)

    return Tensor(name, "BF16", (vocab, hidden), fill)
