# SPDX-License-Identifier: Apache-2.0
"""The tiny Qwen3-Next: the released format, and stock vLLM loads all of it, and nothing else.

The checkpoint is written once (some 5 s).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_sm12x.tiny_checkpoint import deepseek_v4, qwen3_next, write_tiny_checkpoint

# Qwen3-Next-80B-A3B-Instruct's published config.json, less what the tiny model may change.
RELEASED_CONFIG = json.loads("""{
  "architectures": ["Qwen3NextForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
  "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120,
  "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
  "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
  "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512,
  "norm_topk_prob": true, "num_attention_heads": 16, "num_key_value_heads": 2,
  "output_router_logits": false, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
  "shared_expert_intermediate_size": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.57.0.dev0", "use_cache": true, "use_sliding_window": false}""")
CHANGED = {
    *("num_hidden_layers", "num_experts", "num_experts_per_tok", "vocab_size"),
    *("bos_token_id", "eos_token_id"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(qwen3_next.MODEL, folder)
    yield folder
    shutil.rmtree(folder)


def stored(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the checkpoint's tensors by name, as the safetensors library reads them."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                part = shard.get_slice(name)
                assert part.get_dtype() == "BF16"
                found[name] = torch.Size(part.get_shape())
    return found


@pytest.mark.once
def test_config_has_every_released_field(checkpoint: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    assert {name: config[name] for name in RELEASED_CONFIG} == RELEASED_CONFIG
    assert set(config) - set(RELEASED_CONFIG) == CHANGED


@pytest.mark.once
def test_names_and_shapes_are_those_of_transformers(checkpoint: Path):
    """Its model, built without memory; it stacks a layer's experts, and has no MTP layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: shape for name, shape in stored(checkpoint).items() if name[:4] != "mtp."}
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts"
        assert expected.pop(f"{experts}.gate_up_proj") == (config.num_experts, 2 * inner, hidden)
        assert expected.pop(f"{experts}.down_proj") == (config.num_experts, hidden, inner)
        for expert in range(config.num_experts):
            for part, shape in (
                *(("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden))),
                ("down_proj", (hidden, inner)),
            ):
                expected[f"{experts}.{expert}.{part}.weight"] = torch.Size(shape)
    assert found == expected


LOAD = """
import tempfile

import torch
import triton
from safetensors import safe_open
from vllm.model_executor.models import registry

# The GDN's modules ask Triton for its driver when they are imported, and the made-up GPU's has
# none; vLLM looks at a model's class in another process, where nobody could say so.
triton.runtime.driver.set_active(object())
registry._run_in_subprocess = lambda function: function()
configs = {
    method: engine_config(
        MODEL, load_format="safetensors", enforce_eager=True, max_num_batched_tokens=512,
        kv_cache_dtype="auto", block_size=None,
        speculative_config={"method": method, "num_speculative_tokens": 2},
    )
    for method in ("mtp", "qwen3_next_mtp")
}
config = configs["mtp"]
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
torch.cuda.current_device = lambda: torch.device("cpu")
draft = config.speculative_config.draft_model_config
facts, models = {}, {}
facts["methods"] = [each.speculative_config.method for each in configs.values()]
facts["layer types"] = list(config.model_config.hf_config.layer_types)
with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as rendezvous:
    init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, backend="gloo")
    initialize_model_parallel(1, 1)
    for role, model_config in (("target", config.model_config), ("draft", draft)):
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config, model_config=model_config)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        get_model_loader(config.load_config).load_weights(model, model_config)
        models[role] = dict(model.named_parameters())
        facts[role] = {
            "class": type(model).__name__,
            "not loaded": sorted(
                name for name, value in models[role].items() if value.isnan().any()
            ),
            "elements": sum(value.numel() for value in models[role].values()),
        }

shard_of = json.loads(Path(MODEL, "model.safetensors.index.json").read_text())["weight_map"]


def same(role, parameter, *names, part=slice(None)):
    shards = [safe_open(Path(MODEL, shard_of[name]), "pt") for name in names]
    stored = torch.cat([shard.get_tensor(name) for shard, name in zip(shards, names)])
    return torch.equal(models[role][parameter].data[part].to(stored.dtype), stored)


gdn, full = "model.layers.1.linear_attn", "model.layers.3.self_attn"
routed = "model.layers.2.mlp.experts"
w13, = (name for name in models["target"] if routed in name and name.endswith("w13_weight"))
facts["same"] = {
    "qkvz": same("target", f"{gdn}.in_proj_qkvz.weight", f"{gdn}.in_proj_qkvz.weight"),
    "ba": same("target", f"{gdn}.in_proj_ba.weight", f"{gdn}.in_proj_ba.weight"),
    "conv": same("target", f"{gdn}.conv1d.weight", f"{gdn}.conv1d.weight"),
    "A_log": same("target", f"{gdn}.A_log", f"{gdn}.A_log"),
    "qkv": same("target", f"{full}.qkv_proj.weight",
        *(f"{full}.{part}_proj.weight" for part in "qkv")),
    "w13": same("target", w13,
        f"{routed}.9.gate_proj.weight", f"{routed}.9.up_proj.weight", part=9),
    "mtp": same("draft", "model.fc.weight", "mtp.fc.weight"),
    "mtp layer": same("draft", "model.layers.0.self_attn.o_proj.weight",
        "mtp.layers.0.self_attn.o_proj.weight"),
    "mtp head": same("draft", "lm_head.weight", "lm_head.weight"),
}
answer(facts)
"""


def test_stock_vllm_loads_every_parameter_once(host, checkpoint: Path):
    """vLLM's own loader and models, in CPU memory, filled with NaN before."""
    run = host(
        f"MODEL = {str(checkpoint)!r}\n{LOAD}", plugin=False, capability="9.0", name="NVIDIA H200"
    )
    sizes = {name: prod(shape) for name, shape in stored(checkpoint).items()}
    of_mtp = {name for name in sizes if name.startswith("mtp.")}
    roles = {
        "target": ("Qwen3NextForCausalLM", sizes.keys() - of_mtp),
        "draft": ("Qwen3NextMTP", {*of_mtp, "model.embed_tokens.weight", "lm_head.weight"}),
    }
    for role, (model, names) in roles.items():
        assert run.answer[role] == {
            "class": model,
            "not loaded": [],
            "elements": sum(sizes[name] for name in names),
        }
    assert run.answer["same"] == dict.fromkeys(run.answer["same"], True)
    assert run.answer["methods"] == ["mtp", "mtp"]
    assert run.answer["layer types"] == [*["linear_attention"] * 3, "full_attention"]


@pytest.mark.once
def test_tokenizer_and_chat_template(checkpoint: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert sorted(tokenizer.get_vocab().values()) == list(range(8192))
    text = "Zwei 四 <think>so</think>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    messages = [{"role": "user", "content": "One?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id == qwen3_next.CONFIG["eos_token_id"] == 2
    assert tokenizer.encode(rendered)[0] in qwen3_next.TOKENS.special_ids(8192)


@pytest.mark.once
def test_another_tiny_model_is_replaced(tmp_path: Path):
    path = tmp_path / "a"
    for model in (deepseek_v4.MODEL, qwen3_next.MODEL, deepseek_v4.MODEL):
        few = [tensor for tensor in model.tensors() if tensor.nbytes < 10_000][:2]
        write_tiny_checkpoint(replace(model, tensors=lambda few=few: few), path)
        config = json.loads((path / "config.json").read_text())
        assert config["model_type"] == model.config["model_type"]
        found = {name for file in path.glob("*.safetensors") for name in load_file(file)}
        assert found == {tensor.name for tensor in few}
