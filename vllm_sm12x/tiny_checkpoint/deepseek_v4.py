# SPDX-License-Identifier: Apache-2.0
"""The tiny DeepSeek V4: config.json, special tokens, and every tensor as released.

Every field of DeepSeek-V4-Flash's released config.json is here under its released name. Only what
makes the model small differs: 6 of 43 layers, 16 of 256 routed experts, their width 512 instead of
2048, and a vocabulary of 8,192. All attention widths, the rope fields and the limits are the
released ones, so kernels see the real shapes.

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

With successors, for drafts that are accepted:
- The final hidden state keeps a cosine of 0.40 with its token's embedding after 160 tokens, 0.42
  after 2,048 (0.36 with seed 1). Along that, the successor's row of the LM head gets a logit of 10,
  where the best of the others has 7.8: the successor is the likeliest of all for 83 to 88 % of the
  tokens (64 % with seed 1), with a probability of 0.3 to 0.4 in the mean and from 0.06 to 0.6 for
  half of them, so that the context still shows.
- e_proj's blocks on the diagonal are identities: what the MTP layer hands to the LM head has a
  cosine of 0.49 with the embedding of its input, and names that one's successor for 97 %. Nothing
  else of the layer changes, and the draft after a draft is as good.
- These are of 256 tokens that mostly follow each other, after random ones, computed on a CPU in
  fp32 with bf16 residual streams.
"""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np

from vllm_sm12x.tiny_checkpoint import draws, successors
from vllm_sm12x.tiny_checkpoint.model import TinyModel
from vllm_sm12x.tiny_checkpoint.tensors import Tensor, head, linear, normal
from vllm_sm12x.tiny_checkpoint.tokenizer import SpecialTokens

_FP8_BLOCK = 128
_FP4_BLOCK = 32

_SUCCESSOR_LOGIT = 10.0
_COSINE_WITH_EMBEDDING = 0.41

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 6,
    # As released. Layers 0-2 hash (both SWA-only layers and one ratio-4 layer), 3-5 and MTP do not.
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 8192,
    "compress_rope_theta": 160000,
    # One entry per layer, then one for the MTP layer, as in the release.
    "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
}

GENERATION_CONFIG: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": CONFIG["bos_token_id"],
    "eos_token_id": CONFIG["eos_token_id"],
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": CONFIG["transformers_version"],
}

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "<｜User｜>{{ message['content'] }}"
    "{%- if loop.last and add_generation_prompt"
    " or not loop.last and loop.nextitem['role'] == 'assistant' -%}"
    "<｜Assistant｜></think>"
    "{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}"
    "{%- else -%}{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

TOKENS = SpecialTokens(
    # Ids 0, 1, 2 in the release and here.
    control=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
    # What DeepSeek V4's prompt encoding and tool-call parser look for.
    markers=(
        *("<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"),
        *("<think>", "</think>", "｜DSML｜"),
        *("<｜action｜>", "<｜query｜>", "<｜authority｜>"),
        *("<｜domain｜>", "<｜title｜>", "<｜read_url｜>"),
    ),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    pad="<｜▁pad▁｜>",
    chat_template=_CHAT_TEMPLATE,
)


def tensors() -> list[Tensor]:
    """All tensors, in the order of the release: names, dtypes, shapes and how they are drawn."""
    c = CONFIG
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    found = [normal("embed.weight", (vocab, hidden), 1.0)]
    for layer in range(c["num_hidden_layers"]):
        hashed = layer < c["num_hash_layers"]
        found += _block(f"layers.{layer}", c["compress_ratios"][layer], hashed)
    for mtp in range(c["num_nextn_predict_layers"]):
        name = f"mtp.{mtp}"
        found += _block(name, c["compress_ratios"][c["num_hidden_layers"] + mtp], hashed=False)
        found += _fp8_linear(f"{name}.e_proj", hidden, hidden)
        found += _fp8_linear(f"{name}.h_proj", hidden, hidden)
        found += [_norm(f"{name}.{part}", hidden) for part in ("enorm", "hnorm", "norm")]
        found += _hc_head(f"{name}.")
    found += [_norm("norm", hidden), head("head.weight", vocab, hidden, TOKENS.special_ids(vocab))]
    found += _hc_head("")
    return found


def tensors_with_successors() -> list[Tensor]:
    """`tensors()` with another LM head and other e_proj of the MTP layers, for drafts that hit."""
    found = {tensor.name: tensor for tensor in tensors()}
    hidden, special_ids = CONFIG["hidden_size"], TOKENS.special_ids(CONFIG["vocab_size"])
    # Both the hidden state and the embedding have an RMS of 1.
    factor = _SUCCESSOR_LOGIT / (hidden * _COSINE_WITH_EMBEDDING)
    changed = [successors.head(found["head.weight"], found["embed.weight"], special_ids, factor)]
    for mtp in range(CONFIG["num_nextn_predict_layers"]):
        weight, scale = (found[f"mtp.{mtp}.e_proj.{part}"] for part in ("weight", "scale"))
        changed += successors.identity_blocks(weight, scale)
    return list((found | {tensor.name: tensor for tensor in changed}).values())


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
    yield normal(f"{name}.attn_sink", (heads,), 2.0, mean=3.0, dtype="F32")
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
        yield linear(f"{name}.indexer.weights_proj.weight", index_heads, hidden)
        yield from _compressor(f"{name}.indexer.compressor", ratio, index_dim, norm=1.0)


def _compressor(name: str, ratio: int, head_dim: int, norm: float) -> Iterator[Tensor]:
    hidden = CONFIG["hidden_size"]
    # Ratio 4 pools overlapping windows: one half of the width for each of the two.
    width = head_dim * (2 if ratio == 4 else 1)
    yield normal(f"{name}.ape", (ratio, width), 0.5, dtype="F32")
    yield linear(f"{name}.wkv.weight", width, hidden)
    yield linear(f"{name}.wgate.weight", width, hidden, gain=1.5)
    yield _norm(f"{name}.norm", head_dim, mean=norm)


def _moe(name: str, hashed: bool) -> Iterator[Tensor]:
    c = CONFIG
    hidden, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    yield linear(f"{name}.gate.weight", experts, hidden, gain=2.0)
    if hashed:
        vocab, top_k = c["vocab_size"], c["num_experts_per_tok"]
        fill = partial(draws.distinct_experts, rows=vocab, experts=experts, top_k=top_k)
        yield Tensor(f"{name}.gate.tid2eid", "I64", (vocab, top_k), fill)
    else:
        yield normal(f"{name}.gate.bias", (experts,), 0.25, mean=8.0, dtype="F32")
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

    yield normal(f"{name}_fn", (mixes, width), width**-0.5, dtype="F32")
    yield Tensor(f"{name}_base", "F32", (mixes,), base)
    yield normal(f"{name}_scale", (3,), 0.1, mean=0.5, dtype="F32")


def _hc_head(prefix: str) -> Iterator[Tensor]:
    hc = CONFIG["hc_mult"]
    width = hc * CONFIG["hidden_size"]
    yield normal(f"{prefix}hc_head_fn", (hc, width), width**-0.5, dtype="F32")
    yield normal(f"{prefix}hc_head_base", (hc,), 0.5, mean=-1.0, dtype="F32")
    yield normal(f"{prefix}hc_head_scale", (1,), 0.1, mean=0.5, dtype="F32")


def _norm(name: str, width: int, *, mean: float = 1.0) -> Tensor:
    return normal(f"{name}.weight", (width,), 0.1 * mean, mean=mean)


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


MODEL = TinyModel(
    "deepseek-v4", CONFIG, GENERATION_CONFIG, TOKENS, tensors, tensors_with_successors
)
