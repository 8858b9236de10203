# SPDX-License-Identifier: Apache-2.0
"""The weight shapes of a checkpoint's block-scaled FP8 linear layers, as one GPU multiplies them.

Read are config.json and the headers of the safetensors files; no weight is loaded. vLLM merges some
layers into one and shards others over GPUs: `RULES` has what its models do with the names that
checkpoints use. A layer that no rule names counts as it is stored, and is said to.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_sm12x.tune.errors import TuneError

FP8 = "F8_E4M3"
SCALES = ("weight_scale_inv", "scale", "weight_scale")
# Routed experts are vLLM's FusedMoE, whose kernels have other configurations.
ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")


class Stored(NamedTuple):
    """One tensor of the checkpoint: its safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]


class Rule(NamedTuple):
    """What vLLM makes of the layers whose name ends in `pattern`.

    `layer` is vLLM's name; parts of one parent with the same `layer` are one layer. `shard` is the
    axis that --tensor-parallel-size divides: "n" (column parallel), "k" (row parallel), "kv" (n by
    key-value heads, which GPUs share where there are fewer), or "" (every GPU has all of it).
    """

    pattern: str
    layer: str | None  # None: vLLM does not multiply it by its linear kernel
    shard: str


RULES = (
    # DeepSeek V4: vllm.models.deepseek_v4. wo_a is a batched matmul (fp8_einsum).
    Rule(r"\.indexer\.wq_b", "wq_b", ""),
    Rule(r"\.(wq_a|wkv)", "fused_wqa_wkv", ""),
    Rule(r"\.wq_b", "wq_b", "n"),
    Rule(r"\.wo_a", None, ""),
    Rule(r"\.wo_b", "wo_b", "k"),
    Rule(r"\.(w1|w3)", "gate_up_proj", "n"),
    Rule(r"\.w2", "down_proj", "k"),
    Rule(r"\.(e_proj|h_proj)", "", ""),
    # DeepSeek V2, V3, V3.2: vllm.model_executor.models.deepseek_v2.
    Rule(r"\.indexer\.wk", "wk", ""),
    Rule(r"\.(q_a_proj|kv_a_proj_with_mqa)", "fused_qkv_a_proj", ""),
    Rule(r"\.(q_b_proj|kv_b_proj)", "", "n"),
    # Llama, Qwen, GLM, and what is like them.
    Rule(r"\.q_proj", "qkv_proj", "n"),
    Rule(r"\.(k_proj|v_proj)", "qkv_proj", "kv"),
    Rule(r"\.(gate_proj|up_proj)", "gate_up_proj", "n"),
    Rule(r"\.(o_proj|down_proj|out_proj)", "", "k"),
)


@dataclass(frozen=True)
class Shape:
    """Weights [n, k] of one GPU, and the layers that have them."""

    n: int
    k: int
    layers: tuple[str, ...]  # vLLM's names, without the layer's number
    by_rule: bool  # False: some of them no rule names, and they count as stored


@dataclass(frozen=True)
class Model:
    """What a checkpoint says of its FP8 linear layers."""

    name: str
    block: tuple[int, int]  # rows and columns of a scale's block: block_n, block_k
    shapes: tuple[Shape, ...]


def read_model(model: str, tensor_parallel_size: int = 1) -> Model:
    """The FP8 linear shapes of a folder, or of a repository of the Hugging Face hub.

    Raises TuneError.
    """
    folder = Path(model).expanduser()
    config, tensors = _of_folder(folder) if folder.exists() else _of_hub(model)
    block = _weight_block(config)
    if block is None:
        raise TuneError(
            f"{model} has no block-scaled FP8 linear layers: the quantization_config of its "
            "config.json names no weight_block_size."
        )
    shapes = shapes_of(tensors, config, block, tensor_parallel_size)
    if not shapes:
        raise TuneError(
            f"{model} has no block-scaled FP8 linear layers: no tensor of dtype {FP8} outside its "
            f"routed experts has scales of blocks of {block[0]} x {block[1]}."
        )
    return Model(model, block, shapes)


def shapes_of(
    tensors: dict[str, Stored], config: dict[str, Any], block: tuple[int, int], ranks: int
) -> tuple[Shape, ...]:
    """The distinct shapes of the layers in `tensors`, largest first. Raises TuneError."""
    layers: dict[str, list[int]] = {}  # [n, k] by vLLM's full name of the layer
    unknown = set()
    for name, (n, k) in _block_scaled(tensors, block):
        parent, _, leaf = name.rpartition(".")
        rule = next((rule for rule in RULES if re.search(f"{rule.pattern}$", f".{name}")), None)
        if rule is not None and rule.layer is None:
            continue
        full = f"{parent}.{rule.layer}" if rule and rule.layer else name
        if rule is None:
            unknown.add(full)
        n, k = _on_one_gpu(name, n, k, rule.shard if rule else "", config, block, ranks)
        if full in layers:
            layers[full][0] += n
        else:
            layers[full] = [n, k]
    by_shape: dict[tuple[int, int], list[str]] = {}
    for full, (n, k) in layers.items():
        by_shape.setdefault((n, k), []).append(full)
    return tuple(
        Shape(
            n,
            k,
            tuple(sorted({_without_number(full) for full in names})),
            by_rule=unknown.isdisjoint(names),
        )
        for (n, k), names in sorted(by_shape.items(), key=lambda item: -item[0][0] * item[0][1])
    )


def _block_scaled(
    tensors: dict[str, Stored], block: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and [n, k] of the modules with FP8 weights and one scale for each block."""
    for name, stored in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or stored.dtype != FP8 or len(stored.shape) != 2:
            continue
        if ROUTED_EXPERT.search(name):
            continue
        n, k = stored.shape
        scales = (-(-n // block[0]), -(-k // block[1]))
        found = (tensors.get(f"{module}.{scale}") for scale in SCALES)
        if any(scale is not None and scale.shape == scales for scale in found):
            yield module, (n, k)


def _on_one_gpu(
    name: str,
    n: int,
    k: int,
    shard: str,
    config: dict[str, Any],
    block: tuple[int, int],
    ranks: int,
) -> tuple[int, int]:
    if shard == "kv":
        heads = _text_config(config).get("num_key_value_heads") or ranks
        return _divided(name, n, min(heads, ranks)), k
    if shard and re.search(r"\.shared_experts\.w[123]$", name):
        # DeepSeek V4 rounds each GPU's share up to whole blocks.
        axis, unit = (n, block[0]) if shard == "n" else (k, block[1])
        share = -(-(axis // unit) // ranks) * unit
        return (share, k) if shard == "n" else (n, share)
    if shard == "n":
        return _divided(name, n, ranks), k
    if shard == "k":
        return n, _divided(name, k, ranks)
    return n, k


def _divided(name: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise TuneError(
            f"--tensor-parallel-size {ranks} does not divide the {size} features of {name}; "
            "allowed is what vLLM can shard the model by."
        )
    return size // ranks


def _without_number(name: str) -> str:
    """The last two parts of a layer's name: what it is, without where."""
    return ".".join([part for part in name.split(".") if not part.isdecimal()][-2:])


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    return config.get("text_config") or config


def _weight_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """(block_n, block_k), as FP8 checkpoints and compressed-tensors write it."""
    for part in (config, _text_config(config)):
        quantization = part.get("quantization_config") or {}
        block = quantization.get("weight_block_size")
        for group in (quantization.get("config_groups") or {}).values():
            block = block or (group.get("weights") or {}).get("block_structure")
        if block and len(block) == 2:
            return int(block[0]), int(block[1])
    return None


def _of_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise TuneError(f"{folder} is no checkpoint: it holds no *.safetensors.")
        tensors = {}
        for file in files:
            with safe_open(file, framework="np") as opened:
                for name in _of_interest(opened.keys()):
                    part = opened.get_slice(name)
                    tensors[name] = Stored(part.get_dtype(), tuple(part.get_shape()))
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, TuneError):
            raise
        raise TuneError(f"{folder} is no checkpoint that can be read: {error}.") from None
    return config, tensors


def _of_hub(model: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Of a repository: from the local cache if it is there, else config and headers alone."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download

    missing = f"{model} is neither a folder nor a model of the Hugging Face hub"
    try:
        return _of_folder(Path(snapshot_download(model, local_files_only=True)))
    except (OSError, ValueError):
        pass  # not in the cache, or not whole
    try:
        config = json.loads(Path(hf_hub_download(model, "config.json")).read_text("utf-8"))
        metadata = get_safetensors_metadata(model)
    # Besides its own errors the library lets those of its HTTP client through.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TuneError(f"{missing} that can be read: {reason}") from None
    tensors = {
        name: Stored(info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return config, {name: tensors[name] for name in _of_interest(tensors)}


def _of_interest(names: Iterable[str]) -> list[str]:
    """Weights and scales outside routed experts, of which there are tens of thousands."""
    kinds = ("weight", *SCALES)
    return [
        name
        for name in names
        if name.rpartition(".")[2] in kinds and not ROUTED_EXPERT.search(name)
    ]
