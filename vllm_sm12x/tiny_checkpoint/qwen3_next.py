# SPDX-License-Identifier: Apache-2.0
"""The tiny Qwen3-Next: config.json, special tokens, and every tensor as released.

Every field of Qwen3-Next-80B-A3B-Instruct's released config.json is here under its released name.
Only what makes the model small differs: 4 of 48 layers, of which the last has full attention and
the others a Gated DeltaNet (GDN), 16 of 512 experts, 4 of 10 chosen, and a vocabulary of 8,192. The
MTP layer has full attention. All widths, the rope fields and the limits are the released ones.

All is bf16. Norms are stored as their weight less 1, as the model adds it, but for the gated norm
of a GDN layer. `in_proj_qkvz` and `in_proj_ba` interleave their parts by key heads; as all parts
have one scale here, the order does not show in how they are drawn.

Scales, for a hidden state of RMS 1:
- A linear layer has weights of variance gain^2 / fan_in, so unit RMS in gives RMS `gain` out.
- A GDN head forgets by exp(-exp(A_log) softplus(a + dt_bias)) a token: half in 16 tokens at the
  median, in 4 to 80 for most heads, so that tokens of long ago and the last ones both show.
- The gated norm makes a GDN's output RMS 1 whatever the state's, silu(z) leaves 0.6 of it.
- Full attention's logits have a standard deviation of k_norm's weight, 1.5; see deepseek_v4.
- SwiGLU leaves RMS 0.6 of unit gates, the sigmoid gates halve, attention averages: the gains of
  what follows them bring each share of the residual stream to 0.6 to 1.
- Router logits have standard deviation 2, and so have the logits. The residual stream's RMS grows
  from 1 to about 3 in 4 layers.
"""

from collections.abc import Iterator
from typing import Any

from vllm_sm12x.tiny_checkpoint.model import TinyModel
from vllm_sm12x.tiny_checkpoint.tensors import Tensor, head, linear, normal
from vllm_sm12x.tiny_checkpoint.tokenizer import SpecialTokens

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 8192,
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": CONFIG["bos_token_id"],
    "do_sample": True,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": CONFIG["transformers_version"],
}

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

TOKENS = SpecialTokens(
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    markers=(
        *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        *("<think>", "</think>"),
    ),
    bos=None,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    chat_template=_CHAT_TEMPLATE,
)


def tensors() -> list[Tensor]:
    """All tensors: names, dtypes, shapes and how they are drawn."""
    c = CONFIG
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    found = [normal("model.embed_tokens.weight", (vocab, hidden), 1.0)]
    for layer in range(c["num_hidden_layers"]):
        full = (layer + 1) % c["full_attention_interval"] == 0
        found += _layer(f"model.layers.{layer}", full)
    found += [_norm("model.norm", hidden)]
    found += [head("lm_head.weight", vocab, hidden, TOKENS.special_ids(vocab))]
    found += [linear("mtp.fc.weight", hidden, 2 * hidden)]
    found += _layer("mtp.layers.0", full_attention=True)
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    found += [_norm(f"mtp.{norm}", hidden) for norm in norms]
    return found


def _layer(name: str, full_attention: bool) -> Iterator[Tensor]:
    hidden = CONFIG["hidden_size"]
    yield _norm(f"{name}.input_layernorm", hidden)
    if full_attention:
        yield from _attention(f"{name}.self_attn")
    else:
        yield from _gated_delta_net(f"{name}.linear_attn")
    yield _norm(f"{name}.post_attention_layernorm", hidden)
    yield from _moe(f"{name}.mlp")


def _attention(name: str) -> Iterator[Tensor]:
    c = CONFIG
    hidden, head_dim = c["hidden_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    # A head's query, then the gate of its output.
    yield linear(f"{name}.q_proj.weight", 2 * heads * head_dim, hidden)
    yield linear(f"{name}.k_proj.weight", kv_heads * head_dim, hidden)
    yield linear(f"{name}.v_proj.weight", kv_heads * head_dim, hidden)
    yield linear(f"{name}.o_proj.weight", hidden, heads * head_dim, gain=3.0)
    yield _norm(f"{name}.q_norm", head_dim)
    yield _norm(f"{name}.k_norm", head_dim, mean=1.5)


def _gated_delta_net(name: str) -> Iterator[Tensor]:
    c = CONFIG
    hidden, kernel = c["hidden_size"], c["linear_conv_kernel_dim"]
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    keys = key_heads * c["linear_key_head_dim"]
    values = value_heads * c["linear_value_head_dim"]
    channels = 2 * keys + values
    yield normal(f"{name}.A_log", (value_heads,), 1.0, mean=-2.0)
    yield normal(f"{name}.dt_bias", (value_heads,), 1.0, mean=-1.0)
    yield normal(f"{name}.conv1d.weight", (channels, 1, kernel), kernel**-0.5)
    yield linear(f"{name}.in_proj_qkvz.weight", channels + values, hidden)
    yield linear(f"{name}.in_proj_ba.weight", 2 * value_heads, hidden)
    yield normal(f"{name}.norm.weight", (c["linear_value_head_dim"],), 0.1, mean=1.0)
    yield linear(f"{name}.out_proj.weight", hidden, values, gain=1.5)


def _moe(name: str) -> Iterator[Tensor]:
    c = CONFIG
    hidden, experts = c["hidden_size"], c["num_experts"]
    yield linear(f"{name}.gate.weight", experts, hidden, gain=2.0)
    for expert in range(experts):
        yield from _swiglu(f"{name}.experts.{expert}", c["moe_intermediate_size"])
    yield from _swiglu(f"{name}.shared_expert", c["shared_expert_intermediate_size"])
    yield linear(f"{name}.shared_expert_gate.weight", 1, hidden)


def _swiglu(name: str, inner: int) -> Iterator[Tensor]:
    hidden = CONFIG["hidden_size"]
    yield linear(f"{name}.gate_proj.weight", inner, hidden)
    yield linear(f"{name}.up_proj.weight", inner, hidden)
    yield linear(f"{name}.down_proj.weight", hidden, inner, gain=2.0)


def _norm(name: str, width: int, *, mean: float = 1.0) -> Tensor:
    """An RMSNorm that multiplies by 1 + what is stored; `mean` is of the sum."""
    return normal(f"{name}.weight", (width,), 0.1 * mean, mean=mean - 1.0)


MODEL = TinyModel("qwen3-next", CONFIG, GENERATION_CONFIG, TOKENS, tensors)
