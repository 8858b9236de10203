# SPDX-License-Identifier: Apache-2.0
"""Every tensor of the tiny DeepSeek V4: released name, dtype and shape, and how it is drawn.

Scales, for a hidden state of RMS 1:
- A linear layer has weights of variance gain^2 / fan_in, so unit RMS in gives RMS `gain` out.
- Attention logits are q.k / sqrt(512) with |q|^2 = 512 (q is normalised per head), so their
  standard deviation is the weight of kv_norm (and of the compressor's norm): 1.5, where some 25 of
  128 keys carry the result. Flat attention (1.0 and less) would hide a wrong key, sharp attention
  (3 and more) would turn the KV cache's FP8 rounding into different tokens.
- Attention averages over those keys, which leaves RMS 0.3 to 0.8; wo_b's gain 1.5 brings its share
  of the residual stream up to that of the experts, so that the context decides the logits.
- Sinks N(3, 2^2): the denominator over 128 keys is about e^6, so sinks N(0, 1) could be dropped
  unnoticed. These take 10 to 20 % of the probability.
- Hyper-connections: the 4x4 mixing is near the identity (3 on the diagonal before softmax and
  Sinkhorn); the streams start equal and come apart through the spread of the post factors.
- Router logits have standard deviation 2; the correction bias, about 8 as in the release, is spread
  by 0.25, so using it for weights and not only for selection shows.
- Logits have standard deviation 2. The residual stream's RMS grows from 1 to about 3 in 6 layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from vllm_sm12x.tiny_checkpoint import draws
from vllm_sm12x.tiny_checkpoint.config import CONFIG

# safetensors dtype name -> bytes an element. The release stores packed e2m1 pairs as I8.
_ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}
_FP8_BLOCK = 128
_FP4_BLOCK = 32


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


def tiny_tensors(special_ids: frozenset[int]) -> list[Tensor]:
    """All tensors, in the order of the release. `special_ids` are tokens that are not text."""
    c = CONFIG
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    tensors = [_normal("embed.weight", (vocab, hidden), 1.0)]
    for layer in range(c["num_hidden_layers"]):
        hashed = layer < c["num_hash_layers"]
        tensors += _block(f"layers.{layer}", c["compress_ratios"][layer], hashed)
    for mtp in range(c["num_nextn_predict_layers"]):
        name = f"mtp.{mtp}"
        tensors += _block(name, c["compress_ratios"][c["num_hidden_layers"] + mtp], hashed=False)
        tensors += _fp8_linear(f"{name}.e_proj", hidden, hidden)
        tensors += _fp8_linear(f"{name}.h_proj", hidden, hidden)
        tensors += [_norm(f"{name}.{part}", hidden) for part in ("enorm", "hnorm", "norm")]
        tensors += _hc_head(f"{name}.")
    tensors += [_norm("norm", hidden), _head("head.weight", vocab, hidden, special_ids)]
    tensors += _hc_head("")
    return tensors


def _block(name: str, ratio: int, hashed: bool) -> Iterator[Tensor]:
    hidden = CONFIG["hidden_size"]
    yield from _attention(f"{name}.attn", ratio)
    yield from _moe(f"{name}.ffn", hashed)
    yield _norm(f"{name}.attn_norm", hidden)
    yield _norm(f"{name}.ffn_norm", hidden)
    for part in ("attn", "ffn"):
        yield from _hyper_connection(f"{name}.hc_{part}")


def _attention(name: str, ratio: int) -> Iterator[Tensor]:
    c = CONFIG
    hidden, heads, head_dim = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    groups, o_rank, q_rank = c["o_groups"], c["o_lora_rank"], c["q_lora_rank"]
    yield _normal(f"{name}.attn_sink", (heads,), 2.0, mean=3.0, dtype="F32")
    yield from _fp8_linear(f"{name}.wq_a", q_rank, hidden)
    yield _norm(f"{name}.q_norm", q_rank)
    yield from _fp8_linear(f"{name}.wq_b", heads * head_dim, q_rank)
    yield from _fp8_linear(f"{name}.wkv", head_dim, hidden)
    yield _norm(f"{name}.kv_norm", head_dim, mean=1.5)
    yield from _fp8_linear(f"{name}.wo_a", groups * o_rank, heads * head_dim // groups)
    yield from _fp8_linear(f"{name}.wo_b", hidden, groups * o_rank, gain=1.5)
    if ratio:
        yield from _compressor(f"{name}.compressor", ratio, head_dim, norm=1.5)
    if ratio == 4:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        yield from _fp8_linear(f"{name}.indexer.wq_b", index_heads * index_dim, q_rank)
        yield _linear(f"{name}.indexer.weights_proj.weight", index_heads, hidden)
        yield from _compressor(f"{name}.indexer.compressor", ratio, index_dim, norm=1.0)


def _compressor(name: str, ratio: int, head_dim: int, norm: float) -> Iterator[Tensor]:
    hidden = CONFIG["hidden_size"]
    # Ratio 4 pools overlapping windows: one half of the width for each of the two.
    width = head_dim * (2 if ratio == 4 else 1)
    yield _normal(f"{name}.ape", (ratio, width), 0.5, dtype="F32")
    yield _linear(f"{name}.wkv.weight", width, hidden)
    yield _linear(f"{name}.wgate.weight", width, hidden, gain=1.5)
    yield _norm(f"{name}.norm", head_dim, mean=norm)


def _moe(name: str, hashed: bool) -> Iterator[Tensor]:
    c = CONFIG
    hidden, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    yield _linear(f"{name}.gate.weight", experts, hidden, gain=2.0)
    if hashed:
        vocab, top_k = c["vocab_size"], c["num_experts_per_tok"]
        fill = partial(draws.distinct_experts, rows=vocab, experts=experts, top_k=top_k)
        yield Tensor(f"{name}.gate.tid2eid", "I64", (vocab, top_k), fill)
    else:
        yield _normal(f"{name}.gate.bias", (experts,), 0.25, mean=8.0, dtype="F32")
    for expert in range(experts):
        yield from _fp4_linear(f"{name}.experts.{expert}.w1", inner, hidden)
        yield from _fp4_linear(f"{name}.experts.{expert}.w2", hidden, inner)
        yield from _fp4_linear(f"{name}.experts.{expert}.w3", inner, hidden)
    shared = inner * c["n_shared_experts"]
    yield from _fp8_linear(f"{name}.shared_experts.w1", shared, hidden)
    yield from _fp8_linear(f"{name}.shared_experts.w2", hidden, shared)
    yield from _fp8_linear(f"{name}.shared_experts.w3", shared, hidden)


def _hyper_connection(name: str) -> Iterator[Tensor]:
    hc = CONFIG["hc_mult"]
    mixes, width = hc * (2 + hc), hc * CONFIG["hidden_size"]

    def base(seed: int, tensor: str) -> np.ndarray:
        draw = draws.normal_f32(seed, tensor, mixes)
        pre, post, mix = draw[:hc], draw[hc : 2 * hc], draw[2 * hc :].reshape(hc, hc)
        parts = (0.5 * pre - 1, 1.2 * post, 0.5 * mix + 3 * np.eye(hc))
        return np.concatenate([part.reshape(-1) for part in parts]).astype("<f4")

    yield _normal(f"{name}_fn", (mixes, width), width**-0.5, dtype="F32")
    yield Tensor(f"{name}_base", "F32", (mixes,), base)
    yield _normal(f"{name}_scale", (3,), 0.1, mean=0.5, dtype="F32")


def _hc_head(prefix: str) -> Iterator[Tensor]:
    hc = CONFIG["hc_mult"]
    width = hc * CONFIG["hidden_size"]
    yield _normal(f"{prefix}hc_head_fn", (hc, width), width**-0.5, dtype="F32")
    yield _normal(f"{prefix}hc_head_base", (hc,), 0.5, mean=-1.0, dtype="F32")
    yield _normal(f"{prefix}hc_head_scale", (1,), 0.1, mean=0.5, dtype="F32")


def _head(name: str, vocab: int, hidden: int, special_ids: frozenset[int]) -> Tensor:
    """The LM head; rows of special tokens are zero, so that a greedy answer is text, to its end."""

    def fill(seed: int, tensor: str) -> np.ndarray:
        rows = draws.normal_f32(seed, tensor, vocab * hidden).reshape(vocab, hidden)
        rows *= np.float32(2 * hidden**-0.5)
        rows[sorted(special_ids)] = 0.0
        return draws.bf16_codes(rows)

    return Tensor(name, "BF16", (vocab, hidden), fill)


def _normal(
    name: str, shape: tuple[int, ...], std: float, *, mean: float = 0.0, dtype: str = "BF16"
) -> Tensor:
    def fill(seed: int, tensor: str) -> np.ndarray:
        values = draws.normal_f32(seed, tensor, prod(shape))
        values *= np.float32(std)
        values += np.float32(mean)
        return draws.bf16_codes(values) if dtype == "BF16" else values.astype("<f4", copy=False)

    return Tensor(name, dtype, shape, fill)


def _norm(name: str, width: int, *, mean: float = 1.0) -> Tensor:
    return _normal(f"{name}.weight", (width,), 0.1 * mean, mean=mean)


def _linear(name: str, rows: int, columns: int, *, gain: float = 1.0) -> Tensor:
    return _normal(name, (rows, columns), gain * columns**-0.5)


def _fp8_linear(name: str, rows: int, columns: int, *, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """e4m3 [rows, columns] and one UE8M0 scale for each block of 128 x 128."""
    blocks = (rows // _FP8_BLOCK, columns // _FP8_BLOCK)
    codes = partial(draws.fp8_codes, count=rows * columns)
    scales = partial(draws.fp8_scales, count=prod(blocks), std=gain * columns**-0.5)
    return (
        Tensor(f"{name}.weight", "F8_E4M3", (rows, columns), codes),
        Tensor(f"{name}.scale", "F8_E8M0", blocks, scales),
    )


def _fp4_linear(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Packed e2m1 [rows, columns / 2] (low nibble first), UE8M0 scales for 32 along the columns."""
    packed, blocks = (rows, columns // 2), (rows, columns // _FP4_BLOCK)
    codes = partial(draws.fp4_codes, count=prod(packed))
    scales = partial(draws.fp4_scales, count=prod(blocks), std=columns**-0.5)
    return (
        Tensor(f"{name}.weight", "I8", packed, codes),
        Tensor(f"{name}.scale", "F8_E8M0", blocks, scales),
    )
