# SPDX-License-Identifier: Apache-2.0
"""The tiny DeepSeek V4: the released format, loaded by stock vLLM, with activations that stay sane.

The whole checkpoint is written once (some 10 s); what concerns only the writing uses a few tensors.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from vllm_sm12x import cli
from vllm_sm12x.preflight.checkpoint import read
from vllm_sm12x.preflight.weights import by_stage
from vllm_sm12x.tiny_checkpoint import deepseek_v4, write_tiny_checkpoint, write_tiny_deepseek_v4
from vllm_sm12x.tiny_checkpoint.tensors import Tensor

# sha256 of some tensors of seed 0. They may change only together with the checkpoint's format
# number: whoever has a checkpoint of that format and seed must have these bytes.
PINNED = {
    "embed.weight": "d3514f87fb4c7d49",
    "layers.0.attn.wq_a.weight": "538bb5bc69fbeb1f",
    "layers.0.attn.wq_a.scale": "52d9d6f7b9615d4a",
    "layers.0.ffn.gate.tid2eid": "f8151bcee372b9ae",
    "layers.3.ffn.experts.7.w2.weight": "817274affb409613",
    "layers.4.attn.indexer.compressor.ape": "83b379876e745767",
    "mtp.0.hc_attn_base": "31edb26134c1019b",
    "mtp.0.e_proj.weight": "2a6dc230e62882b2",
    "mtp.0.e_proj.scale": "b5ce2c4e06916877",
    "head.weight": "cc1e4bd8073687cd",
}

# DeepSeek-V4-Flash's published config.json, less what the tiny model may change.
RELEASED_CONFIG = json.loads("""{
  "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4", "hc_eps": 1e-06, "hc_mult": 4,
  "hc_sinkhorn_iters": 20, "head_dim": 512, "hidden_act": "silu", "hidden_size": 4096,
  "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512, "initializer_range": 0.02,
  "max_position_embeddings": 1048576, "model_type": "deepseek_v4", "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 64, "num_experts_per_tok": 6,
  "num_hash_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_groups": 8,
  "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "quantization_config":
  {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
  "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32,
  "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
  "sliding_window": 128, "swiglu_limit": 10.0, "tie_word_embeddings": false,
  "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.57.1",
  "use_cache": true, "compress_rope_theta": 160000}""")
CHANGED = {"num_hidden_layers", "n_routed_experts", "moe_intermediate_size", "vocab_size"}

# The safetensors headers of DeepSeek-V4-Flash, with its 256 experts, inner width 2048 and
# vocabulary 129,280 replaced by EXPERTS, INNER and VOCAB.
EXPERTS, INNER, VOCAB, HIDDEN = 16, 512, 8192, 4096
FP8_LINEARS = {
    "attn.wq_a": (1024, 4096), "attn.wq_b": (32768, 1024), "attn.wkv": (512, 4096),
    "attn.wo_a": (8192, 4096), "attn.wo_b": (4096, 8192), "ffn.shared_experts.w1": (INNER, 4096),
    "ffn.shared_experts.w2": (4096, INNER), "ffn.shared_experts.w3": (INNER, 4096),
}  # fmt: skip
EVERY_LAYER = {
    "attn.attn_sink": ("F32", [64]), "attn.kv_norm.weight": ("BF16", [512]),
    "attn.q_norm.weight": ("BF16", [1024]), "attn_norm.weight": ("BF16", [4096]),
    "ffn_norm.weight": ("BF16", [4096]), "ffn.gate.weight": ("BF16", [EXPERTS, 4096]),
    "hc_attn_base": ("F32", [24]), "hc_ffn_base": ("F32", [24]),
    "hc_attn_fn": ("F32", [24, 16384]), "hc_ffn_fn": ("F32", [24, 16384]),
    "hc_attn_scale": ("F32", [3]), "hc_ffn_scale": ("F32", [3]),
}  # fmt: skip
RATIO_4 = {
    "attn.compressor.ape": ("F32", [4, 1024]), "attn.compressor.norm.weight": ("BF16", [512]),
    "attn.compressor.wgate.weight": ("BF16", [1024, 4096]),
    "attn.compressor.wkv.weight": ("BF16", [1024, 4096]),
    "attn.indexer.compressor.ape": ("F32", [4, 256]),
    "attn.indexer.compressor.norm.weight": ("BF16", [128]),
    "attn.indexer.compressor.wgate.weight": ("BF16", [256, 4096]),
    "attn.indexer.compressor.wkv.weight": ("BF16", [256, 4096]),
    "attn.indexer.weights_proj.weight": ("BF16", [64, 4096]),
    "attn.indexer.wq_b.weight": ("F8_E4M3", [8192, 1024]),
    "attn.indexer.wq_b.scale": ("F8_E8M0", [64, 8]),
}  # fmt: skip
RATIO_128 = {
    "attn.compressor.ape": ("F32", [128, 512]), "attn.compressor.norm.weight": ("BF16", [512]),
    "attn.compressor.wgate.weight": ("BF16", [512, 4096]),
    "attn.compressor.wkv.weight": ("BF16", [512, 4096]),
}  # fmt: skip
HC_HEAD = {
    "hc_head_base": ("F32", [4]), "hc_head_fn": ("F32", [4, 16384]), "hc_head_scale": ("F32", [1]),
}  # fmt: skip
EXPERT = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}


def released_layer(extra: dict, hashed: bool) -> dict[str, tuple[str, list[int]]]:
    layer = EVERY_LAYER | extra | fp8(FP8_LINEARS)
    if hashed:
        layer["ffn.gate.tid2eid"] = ("I64", [VOCAB, 6])
    else:
        layer["ffn.gate.bias"] = ("F32", [EXPERTS])
    for expert in range(EXPERTS):
        for part, (rows, columns) in EXPERT.items():
            name = f"ffn.experts.{expert}.{part}"
            layer[f"{name}.weight"] = ("I8", [rows, columns // 2])
            layer[f"{name}.scale"] = ("F8_E8M0", [rows, columns // 32])
    return layer


def fp8(linears: dict[str, tuple[int, int]]) -> dict[str, tuple[str, list[int]]]:
    weights = {f"{name}.weight": ("F8_E4M3", [*shape]) for name, shape in linears.items()}
    scales = {f"{n}.scale": ("F8_E8M0", [a // 128, b // 128]) for n, (a, b) in linears.items()}
    return weights | scales


def released_tensors() -> dict[str, tuple[str, list[int]]]:
    wide = ("BF16", [VOCAB, HIDDEN])
    expected = {"embed.weight": wide, "head.weight": wide, "norm.weight": ("BF16", [HIDDEN])}
    expected |= HC_HEAD
    for index, extra in enumerate(({}, {}, RATIO_4, RATIO_128, RATIO_4, RATIO_128)):
        layer = released_layer(extra, hashed=index < 3)
        expected |= {f"layers.{index}.{name}": entry for name, entry in layer.items()}
    mtp = released_layer({}, hashed=False) | HC_HEAD
    mtp |= fp8({"e_proj": (HIDDEN, HIDDEN), "h_proj": (HIDDEN, HIDDEN)})
    mtp |= {f"{name}.weight": ("BF16", [HIDDEN]) for name in ("enorm", "hnorm", "norm")}
    return expected | {f"mtp.0.{name}": entry for name, entry in mtp.items()}


class Weights:
    """The checkpoint's tensors by name, read by the safetensors library; dequantised by torch."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.total_size = index["metadata"]["total_size"]
        self.shard_of = index["weight_map"]
        names = sorted(set(self.shard_of.values()))
        self.shards = {name: safe_open(folder / name, "pt") for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.shards[self.shard_of[name]].get_tensor(name)

    def stored(self) -> dict[str, tuple[str, list[int]]]:
        found = {}
        for shard_name, shard in self.shards.items():
            for name in shard.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                assert self.shard_of[name] == shard_name
                part = shard.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
        return found

    def linear(self, name: str) -> torch.Tensor:
        """The fp32 matrix of a bf16, FP8 or MXFP4 linear layer."""
        weight = self[f"{name}.weight"]
        if weight.dtype == torch.bfloat16:
            return weight.float()
        scale = self[f"{name}.scale"].float()
        if weight.dtype == torch.float8_e4m3fn:
            return weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        values = torch.tensor(positive + [-value for value in positive])
        codes = weight.view(torch.uint8).int()
        pairs = torch.stack([values[codes & 15], values[codes >> 4]], dim=-1)
        return pairs.flatten(1) * scale.repeat_interleave(32, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_deepseek_v4(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> Weights:
    return Weights(checkpoint)


# The format


def test_every_tensor_has_its_released_name_dtype_and_shape(weights: Weights):
    assert weights.stored() == released_tensors()


def test_size(checkpoint: Path, weights: Weights):
    on_disk = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert weights.total_size < on_disk <= 1_500_000_000


def test_config_has_every_released_field(checkpoint: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config.pop("compress_ratios") == [0, 0, 4, 128, 4, 128, 0]
    assert {name: config[name] for name in RELEASED_CONFIG} == RELEASED_CONFIG
    assert set(config) - set(RELEASED_CONFIG) == CHANGED


def test_fp8_weights_have_the_variance_of_their_fan_in(weights: Weights):
    # 2,048 block scales each: their sampling error is 1 % of the standard deviation.
    for name, gain in (("wq_b", 1.0), ("wo_a", 1.0), ("wo_b", 1.5)):
        matrix = weights.linear(f"layers.1.attn.{name}")
        assert matrix.std() * matrix.shape[1] ** 0.5 == pytest.approx(gain, rel=0.03)
        assert abs(matrix.mean() / matrix.std()) < 2e-3


def test_fp8_dequantises_as_in_vllm(weights: Weights):
    from vllm.model_executor.layers.quantization.utils.fp8_utils import _upcast_e8m0_to_fp32
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        GroupShape,
        scaled_dequantize,
    )

    name = "layers.3.attn.wkv"
    scale = _upcast_e8m0_to_fp32(weights[f"{name}.scale"])
    assert scale.unique().numel() >= 3
    vllm = scaled_dequantize(weights[f"{name}.weight"], scale, GroupShape(128, 128))
    assert torch.equal(vllm, weights.linear(name))


def test_mxfp4_dequantises_as_in_vllm(weights: Weights):
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import break_fp4_bytes

    name = "layers.3.ffn.experts.5.w2"
    codes, scale = weights[f"{name}.weight"].view(torch.uint8), weights[f"{name}.scale"].float()
    assert scale.unique().numel() >= 3
    blocks = break_fp4_bytes(codes, torch.float32).view(HIDDEN, INNER // 32, 32)
    matrix = weights.linear(name)
    assert torch.equal((blocks * scale[..., None]).flatten(1), matrix)
    assert matrix.std() * INNER**0.5 == pytest.approx(1.0, rel=0.02)


def test_hash_routing_names_six_different_experts(weights: Weights):
    table = weights["layers.1.ffn.gate.tid2eid"].sort(dim=1).values
    assert (table[:, 1:] > table[:, :-1]).all() and table.min() == 0 and table.max() == EXPERTS - 1
    share = torch.bincount(table.flatten(), minlength=EXPERTS) / table.numel()
    assert share.sub(1 / EXPERTS).abs().max() < 0.01


# Stock vLLM

LOAD = """
import tempfile

import torch
from safetensors import safe_open

config = engine_config(
    MODEL, load_format="safetensors", enforce_eager=True, max_num_batched_tokens=512,
    speculative_config={"method": "mtp", "num_speculative_tokens": 2},
)
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype


class Nothing:
    def __init__(self, *arguments, **keywords): pass


# The model is built in CPU memory: the made-up GPU has none, nor streams.
type(current_platform).device_type = "cpu"
torch.cuda.Stream = torch.cuda.Event = Nothing
draft = config.speculative_config.draft_model_config
facts, models = {}, {}
with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as rendezvous:
    init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, backend="gloo")
    initialize_model_parallel(1, 1)
    for role, model_config in (("target", config.model_config), ("draft", draft)):
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config, model_config=model_config)
        weights = get_model_loader(config.load_config).get_all_weights(model_config, model)
        loaded = model.load_weights(weights)
        models[role] = dict(model.named_parameters())
        missing = sorted(models[role].keys() - loaded)
        facts[role] = [type(model).__name__, missing, len(models[role])]
facts["bytes"] = sum(one.numel() * one.element_size() for one in models["target"].values())

shard_of = json.loads(Path(MODEL, "model.safetensors.index.json").read_text())["weight_map"]


def same(role, parameter, *names, part=slice(None)):
    shards = [safe_open(Path(MODEL, shard_of[name]), "pt") for name in names]
    stored = [shard.get_tensor(name) for shard, name in zip(shards, names)]
    stored = torch.cat([tensor.view(torch.uint8) for tensor in stored])
    return torch.equal(models[role][parameter].data[part].view(torch.uint8), stored)


at, routed = "layers.2.attn", "layers.3.ffn.experts"
w13, = (name for name in models["target"] if f"model.{routed}" in name and name.endswith("w13_weight"))
w2, mtp = w13.replace("w13", "w2"), "model.layers.6.mtp_block"
facts["same"] = {
    "fp8, fused": same("target", f"model.{at}.fused_wqa_wkv.weight",
        f"{at}.wq_a.weight", f"{at}.wkv.weight"),
    "e8m0, fused": same("target", f"model.{at}.fused_wqa_wkv.weight_scale_inv",
        f"{at}.wq_a.scale", f"{at}.wkv.scale"),
    "indexer": same("target", f"model.{at}.indexer.compressor.fused_wkv_wgate.weight",
        f"{at}.indexer.compressor.wkv.weight", f"{at}.indexer.compressor.wgate.weight"),
    "w13": same("target", w13, f"{routed}.9.w1.weight", f"{routed}.9.w3.weight", part=9),
    "w13 scale": same("target", f"{w13}_scale",
        f"{routed}.9.w1.scale", f"{routed}.9.w3.scale", part=9),
    "w2 scale": same("target", f"{w2}_scale", f"{routed}.15.w2.scale", part=15),
    "sink": same("target", f"model.{at}.attn_sink", f"{at}.attn_sink", part=slice(64)),
    "mtp": same("draft", f"{mtp}.attn.wo_b.weight", "mtp.0.attn.wo_b.weight"),
    "mtp norm": same("draft", "model.layers.6.shared_head.norm.weight", "mtp.0.norm.weight"),
    "mtp bias": same("draft", f"{mtp}.ffn.gate.e_score_correction_bias", "mtp.0.ffn.gate.bias"),
}
answer(facts)
"""  # noqa: E501


def test_stock_vllm_loads_every_parameter(host, checkpoint: Path):
    """vLLM's own loader and models, in CPU memory.

    On a made-up H200: on SM120 the layers of newer releases import FlashInfer as they are built.
    """
    snippet = f"MODEL = {str(checkpoint)!r}\n{LOAD}"
    run = host(snippet, plugin=False, capability="9.0", name="NVIDIA H200")
    target, draft, same = run.answer["target"], run.answer["draft"], run.answer["same"]
    assert target[:2] == ["DeepseekV4ForCausalLM", []] and target[2] > 200
    # vLLM lets the MTP layer share these two with the target; the release has no copy either.
    shared = ["model.embed_tokens.weight", "model.layers.6.shared_head.head.weight"]
    assert draft[:2] == ["DeepSeekV4MTP", shared]
    assert same == dict.fromkeys(same, True)
    # What the doctor makes of the files alone, less the two tables that are no parameters.
    estimate = by_stage(read(str(checkpoint)), 1, 1)[0] - 2 * 1048576 * 64 * 4
    assert run.answer["bytes"] == pytest.approx(estimate, rel=1e-3)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(checkpoint), tokenizer_mode="deepseek_v4")


@given(text=st.text())
def test_tokenizer_returns_any_text(tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < VOCAB for token in ids)


def test_tokenizer_knows_what_the_prompt_encoding_writes(tokenizer):
    from vllm.tokenizers import deepseek_v4_encoding as encoding

    tasks = encoding.DS_TASK_SP_TOKENS.values()
    known = {
        encoding.bos_token, encoding.eos_token, encoding.thinking_start_token,
        encoding.thinking_end_token, encoding.dsml_token, encoding.USER_SP_TOKEN,
        encoding.ASSISTANT_SP_TOKEN, encoding.LATEST_REMINDER_SP_TOKEN, *tasks,
    }  # fmt: skip
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in known}
    assert {text: len(tokens) for text, tokens in ids.items()} == dict.fromkeys(known, 1)
    assert ids[encoding.bos_token] == [0] and ids[encoding.eos_token] == [1]
    assert {tokens[0] for tokens in ids.values()} | {2} == deepseek_v4.TOKENS.special_ids(VOCAB)
    reasoning = tokenizer.encode("<think>so</think>yes<｜end▁of▁sentence｜>")
    assert tokenizer.decode(reasoning, skip_special_tokens=True) == "<think>so</think>yes"


def test_every_token_is_distinct_and_in_range(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB))


def test_chat_template_writes_vllms_prompt_encoding(checkpoint: Path, tokenizer):
    from transformers import AutoTokenizer

    plain_chat = {"enable_thinking": False}  # the default until 0.32 turned it round
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Drei, 四?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, **plain_chat)
    plain = AutoTokenizer.from_pretrained(checkpoint)
    rendered = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt
    assert tokenizer.decode(tokenizer.apply_chat_template(messages, **plain_chat)) == prompt


# Activations


def rms(x: torch.Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight.float()


def rotate(x: torch.Tensor, sign: int) -> torch.Tensor:
    """GPT-J RoPE on the last 64 of [tokens, ..., 512], or its inverse for sign -1."""
    frequency = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    angle = sign * torch.arange(len(x))[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle).view(len(x), *[1] * (x.dim() - 2), 32)
    pairs = torch.view_as_complex(x[..., 448:].unflatten(-1, (32, 2)).contiguous())
    return torch.cat([x[..., :448], torch.view_as_real(pairs * turn).flatten(-2)], dim=-1)


def swa_attention(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    tokens = len(x)
    assert tokens <= 128, "the sliding window is not applied"
    q_low = rms_norm(x @ weights.linear(f"{name}.wq_a").T, weights[f"{name}.q_norm.weight"])
    q = rotate(rms_norm((q_low @ weights.linear(f"{name}.wq_b").T).view(tokens, 64, 512)), 1)
    kv = rms_norm(x @ weights.linear(f"{name}.wkv").T, weights[f"{name}.kv_norm.weight"])
    kv = rotate(kv, 1)
    logits = torch.einsum("thd,kd->thk", q, kv) * 512**-0.5
    future = torch.ones(tokens, tokens).triu(1).bool()
    logits = logits.masked_fill(future[:, None], -math.inf)
    sink = weights[f"{name}.attn_sink"][None, :, None].expand(tokens, 64, 1)
    probability = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
    out = rotate(probability @ kv, -1).view(tokens, 8, 4096)
    low = torch.einsum("tgr,gdr->tgd", out, weights.linear(f"{name}.wo_a").view(8, 1024, 4096))
    return low.flatten(1) @ weights.linear(f"{name}.wo_b").T


def expert(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    gate = (x @ weights.linear(f"{name}.w1").T).clamp(max=10)
    up = (x @ weights.linear(f"{name}.w3").T).clamp(-10, 10)
    return (torch.nn.functional.silu(gate) * up) @ weights.linear(f"{name}.w2").T


def moe(
    weights: Weights, name: str, x: torch.Tensor, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Experts by hash of `ids`, or without these by the router's scores."""
    router = x @ weights[f"{name}.gate.weight"].float().T
    score = torch.nn.functional.softplus(router).sqrt()
    if ids is None:
        chosen = (score + weights[f"{name}.gate.bias"]).topk(6, dim=1).indices
    else:
        chosen = weights[f"{name}.gate.tid2eid"][ids]
    score = score.gather(1, chosen)
    score = 1.5 * score / score.sum(1, keepdim=True)
    out = expert(weights, f"{name}.shared_experts", x)
    for number in range(EXPERTS):
        token, slot = (chosen == number).nonzero(as_tuple=True)
        routed = expert(weights, f"{name}.experts.{number}", x[token])
        out[token] += score[token, slot, None] * routed
    return out


def swa_layer(
    weights: Weights, layer: str, streams: torch.Tensor, ids: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """One layer in fp32, with vLLM's own reference of the hyper-connections."""
    from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch

    seen = {}
    for part in ("attn", "ffn"):
        name = f"{layer}.{part}"
        hc = [weights[f"{layer}.hc_{part}_{kind}"] for kind in ("fn", "scale", "base")]
        post, mix, x = mhc_pre_torch(streams, *hc, 1e-6, 1e-6, 1e-6, 2.0, 20)
        x = rms_norm(x.float(), weights[f"{layer}.{part}_norm.weight"])
        out = swa_attention(weights, name, x) if part == "attn" else moe(weights, name, x, ids)
        streams = mhc_post_torch(out, streams, post, mix)
        seen[name] = out
        seen[f"{name}.mix"] = mix
    return {**seen, "streams": streams}


@torch.inference_mode()
def swa_layers(weights: Weights, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layers 0 and 1."""
    seen = {"streams": weights["embed.weight"][ids][:, None].repeat(1, 4, 1)}
    for layer in ("layers.0", "layers.1"):
        seen |= swa_layer(weights, layer, seen["streams"], ids)
    return seen | {"streams": seen["streams"].float()}


@pytest.mark.once
def test_activations_stay_sane_and_depend_on_the_context(weights: Weights):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (48,), generator=generator)
    other = torch.cat([ids[:24].flip(0), ids[24:]])
    seen, changed = swa_layers(weights, ids), swa_layers(weights, other)
    for name in ("layers.0.attn", "layers.1.attn", "layers.0.ffn", "layers.1.ffn"):
        assert 0.3 < rms(seen[name]) < 1.5, name
    assert 1.0 < rms(seen["streams"]) < 2.5
    for name in ("layers.0.attn.mix", "layers.1.ffn.mix"):
        mix = seen[name]
        # Doubly stochastic; Sinkhorn ends with the columns, the rows have what is left to converge.
        torch.testing.assert_close(mix.sum(-2), torch.ones_like(mix[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(mix.sum(-1), torch.ones_like(mix[:, 0]), atol=1e-2, rtol=0)
        assert 0.5 < mix.diagonal(dim1=-2, dim2=-1).mean() < 0.99
    streams = seen["streams"]
    assert torch.cosine_similarity(streams[:, 0], streams[:, 1], dim=-1).max() < 0.999
    last, last_changed = streams[-1], changed["streams"][-1]
    assert rms(last - last_changed) > 0.1 * rms(last)


# Successors

CHANGED_BY_SUCCESSORS = ("head.weight", "mtp.0.e_proj.weight", "mtp.0.e_proj.scale")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    """What the option changes, as written."""
    tensors = deepseek_v4.tensors_with_successors()
    few = [tensor for tensor in tensors if tensor.name in CHANGED_BY_SUCCESSORS]
    model = replace(deepseek_v4.MODEL, tensors_with_successors=lambda: few)
    folder = tmp_path_factory.mktemp("successors") / "tiny"
    write_tiny_checkpoint(model, folder, successors=True)
    yield Weights(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def successor() -> torch.Tensor:
    """The successor of each id, -1 where there is none."""
    order = deepseek_v4.successors.order(0, VOCAB, deepseek_v4.TOKENS.special_ids(VOCAB))
    found = torch.full((VOCAB,), -1)
    found[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, -1))
    return found


@pytest.mark.once
def test_ordinary_tokens_are_one_cycle(successor: torch.Tensor):
    special = deepseek_v4.TOKENS.special_ids(VOCAB)
    assert set((successor < 0).nonzero().flatten().tolist()) == special
    token, seen = 5, set()
    while token not in seen:
        seen.add(token)
        token = int(successor[token])
    assert token == 5 and seen == set(range(VOCAB)) - special


@pytest.mark.once
def test_successors_change_only_what_they_need():
    plain, drafting = deepseek_v4.tensors(), deepseek_v4.tensors_with_successors()
    facts = [[(one.name, one.dtype, one.shape) for one in each] for each in (plain, drafting)]
    assert facts[0] == facts[1]
    parts = ("mtp", "hc_head", "norm", "head", "embed")
    differ = {
        one.name
        for one, other in zip(plain, drafting, strict=True)
        if one.name.startswith(parts) and ".experts." not in one.name
        if not np.array_equal(one.draw(0), other.draw(0))
    }
    assert differ == set(CHANGED_BY_SUCCESSORS)


@pytest.mark.once
def test_a_successor_row_has_its_predecessor_embedding(
    weights: Weights, changed: Weights, successor: torch.Tensor
):
    added = changed["head.weight"].float() - weights["head.weight"].float()
    embedding = weights["embed.weight"].float()
    token = (successor >= 0).nonzero().flatten()
    factor = 10 / (HIDDEN * 0.41)
    error = added[successor[token]] - factor * embedding[token]
    # Rounding to bf16, twice.
    assert error.square().mean(1).max().sqrt() < 0.02 * factor
    assert not changed["head.weight"][successor < 0].any()


@pytest.mark.once
def test_e_proj_has_identities_on_its_diagonal(weights: Weights, changed: Weights):
    plain = weights.linear("mtp.0.e_proj").view(32, 128, 32, 128)
    drafting = changed.linear("mtp.0.e_proj").view(32, 128, 32, 128)
    for row in range(32):
        for column in range(32):
            expected = torch.eye(128) if row == column else plain[row, :, column]
            assert torch.equal(drafting[row, :, column], expected)


@torch.inference_mode()
@pytest.mark.once
def test_the_head_names_the_successor_of_most_tokens(
    weights: Weights, changed: Weights, successor: torch.Tensor
):
    """A final hidden state is a third embedding, and the rest depends on the context."""
    token = (successor >= 0).nonzero().flatten()[:512]
    context = torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(0))
    hidden = 0.41 * weights["embed.weight"][token].float() + (1 - 0.41**2) ** 0.5 * context
    logits = hidden @ changed["head.weight"].float().T
    assert 0.7 < (logits.argmax(1) == successor[token]).float().mean() < 0.95
    probability = logits.softmax(1).gather(1, successor[token, None])
    assert 0.25 < probability.mean() < 0.5
    assert probability.std() > 0.2
    chance = hidden @ weights["head.weight"].float().T
    assert (chance.argmax(1) == successor[token]).float().mean() < 0.01


@torch.inference_mode()
@pytest.mark.once
def test_the_mtp_layer_names_the_successor_of_its_input(
    weights: Weights, changed: Weights, successor: torch.Tensor
):
    """The whole layer, whatever the hidden states of the model are."""
    ordinary = (successor >= 0).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    token = ordinary[torch.randint(len(ordinary), (48,), generator=generator)]
    h = rms_norm(torch.randn(48, 4, HIDDEN, generator=generator), weights["mtp.0.hnorm.weight"])
    e = rms_norm(weights["embed.weight"][token].float(), weights["mtp.0.enorm.weight"])
    x = h @ weights.linear("mtp.0.h_proj").T + (e @ changed.linear("mtp.0.e_proj").T)[:, None]
    streams = swa_layer(weights, "mtp.0", x.bfloat16())["streams"].float()
    gates = rms_norm(streams.flatten(1)) @ weights["mtp.0.hc_head_fn"].T
    gates = gates * weights["mtp.0.hc_head_scale"] + weights["mtp.0.hc_head_base"]
    hidden = (gates.sigmoid()[:, :, None] * streams).sum(1)
    hidden = rms_norm(hidden, weights["mtp.0.norm.weight"])
    draft = (hidden @ changed["head.weight"].float().T).argmax(1)
    assert (draft == successor[token]).float().mean() > 0.9


# Writing

SMALL = (
    *("norm.weight", "layers.0.attn.attn_sink"),
    *("layers.0.attn.wkv.weight", "layers.0.attn.wkv.scale"),
)


def all_tensors() -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in deepseek_v4.tensors()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the checkpoint four tensors, 2 MB."""
    tensors = [all_tensors()[name] for name in SMALL]
    model = replace(deepseek_v4.MODEL, tensors=lambda: tensors)
    monkeypatch.setattr(deepseek_v4, "MODEL", model)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pinned_tensors_of_seed_0():
    tensors = all_tensors()
    found = {name: hashlib.sha256(tensors[name].draw(0)).hexdigest()[:16] for name in PINNED}
    assert found == PINNED


def test_tensors_differ_by_name_and_seed():
    tensors = all_tensors()
    w1, w3 = (tensors[f"layers.0.ffn.experts.0.{part}.weight"] for part in ("w1", "w3"))
    assert (w1.draw(0) == w3.draw(0)).mean() < 0.01
    assert (w1.draw(0) == w1.draw(1)).mean() < 0.01
    assert np.array_equal(w1.draw(0), replace(w3, name=w1.name).draw(0))


@pytest.mark.usefixtures("small")
def test_same_seed_same_files(tmp_path: Path):
    first = write_tiny_deepseek_v4(tmp_path / "a", seed=3)
    second = write_tiny_deepseek_v4(tmp_path / "b", seed=3)
    assert contents(first) == contents(second)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.usefixtures("small")
def test_progress_counts_bytes_to_the_total(tmp_path: Path):
    calls: list[tuple[int, int, str]] = []
    write_tiny_deepseek_v4(tmp_path / "a", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    sizes = [all_tensors()[call[2]].nbytes for call in calls]
    assert done == list(np.cumsum(sizes)) and {call[1] for call in calls} == {done[-1]}
    assert {call[2] for call in calls} == set(SMALL)


@pytest.mark.usefixtures("small")
def test_a_complete_checkpoint_is_kept(tmp_path: Path):
    path = write_tiny_deepseek_v4(tmp_path / "a")
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    calls: list[tuple[int, int, str]] = []
    assert write_tiny_deepseek_v4(path, progress=lambda *call: calls.append(call)) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert [call[0] == call[1] for call in calls] == [True]


@pytest.mark.usefixtures("small")
def test_a_damaged_or_different_checkpoint_is_written_again(tmp_path: Path):
    path = write_tiny_deepseek_v4(tmp_path / "a")
    good = contents(path)
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    write_tiny_deepseek_v4(path)
    assert contents(path) == good
    write_tiny_deepseek_v4(path, seed=1)
    assert contents(path)[shard.name] != good[shard.name]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("small")
def test_a_checkpoint_without_successors_is_replaced_by_one_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = [all_tensors()[name] for name in reversed(SMALL)]
    model = replace(deepseek_v4.MODEL, tensors_with_successors=lambda: other)
    monkeypatch.setattr(deepseek_v4, "MODEL", model)
    path = write_tiny_deepseek_v4(tmp_path / "a")
    plain = contents(path)
    write_tiny_deepseek_v4(path, successors=True)
    marker = "vllm_sm12x_tiny_checkpoint.json"
    drafting = contents(path)
    assert json.loads(drafting[marker])["successors"] and b"successors" not in plain[marker]
    assert drafting["config.json"] == plain["config.json"]
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    write_tiny_deepseek_v4(path, successors=True)
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    write_tiny_deepseek_v4(path)
    assert contents(path) == plain


def test_successors_of_another_model_are_refused_before_writing(tmp_path: Path):
    path = tmp_path / "a"
    arguments = ["tiny-checkpoint", str(path), "--model", "qwen3-next", "--successors"]
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 1
    assert "successors are only for deepseek-v4, got the tiny model qwen3-next" in refused.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_an_interrupted_run_leaves_nothing(tmp_path: Path):
    def interrupt(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tiny_deepseek_v4(tmp_path / "a", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    path = write_tiny_deepseek_v4(tmp_path / "a")
    good = contents(path)
    with pytest.raises(KeyboardInterrupt):
        write_tiny_deepseek_v4(path, seed=1, progress=interrupt)
    assert contents(path) == good


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ours", [False, True])
def test_foreign_files_are_not_touched(tmp_path: Path, ours: bool):
    path = tmp_path / "a"
    if ours:
        write_tiny_deepseek_v4(path, seed=1)
    path.mkdir(exist_ok=True)
    (path / "thesis.txt").write_text("three years of work")
    before = contents(path)
    with pytest.raises(FileExistsError, match=r"'thesis\.txt', which is not part of a tiny"):
        write_tiny_deepseek_v4(path)
    assert contents(path) == before and [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("small")
def test_an_empty_directory_is_used_and_a_file_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert write_tiny_deepseek_v4(tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; a tiny checkpoint needs a directory"):
        write_tiny_deepseek_v4(tmp_path / "file")


def test_a_full_disk_and_a_negative_seed_are_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        write_tiny_deepseek_v4(tmp_path / "a", seed=-1)
    disk = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(OSError, match=r"takes 1\.44 GB, but .* has 1\.00 GB free"):
        write_tiny_deepseek_v4(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
