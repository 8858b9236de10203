# SPDX-License-Identifier: Apache-2.0
"""How a DeepSeek V4 checkpoint's bytes fall on the ranks of vLLM's model, by its tensors' names."""

import re
from typing import Any

from vllm_sm12x.preflight.checkpoint import Checkpoint

RULES = (
    "sharded over tensor-parallel ranks: attention's wq_b, wo_a and wo_b, the sinks, shared "
    "experts and routed experts (by their inner width), embedding and head (by the vocabulary)",
    "replicated on every rank: wq_a, wkv, compressors, indexers, norms, gates, hyper-connections",
    "layers are split over pipeline stages as vLLM splits them; the embedding is on the first "
    "stage, the head on the last",
    "the MTP layer is not built without --speculative-config",
    "tables of hash routing are stored as int64 and held as int32",
    "each rank adds vLLM's two tables of rotary embeddings, max_position_embeddings x "
    "qk_rope_head_dim in fp32",
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_DRAFT = re.compile(r"(?:^|\.)mtp\.\d+\.")
_SHARDED = re.compile(
    r"attn\.(wq_b|wo_a|wo_b)\.|attn\.attn_sink$|ffn\.shared_experts\.|ffn\.experts\.\d+\."
)
# VocabParallelEmbedding pads the vocabulary to a multiple of this.
_VOCABULARY_UNIT = 64


def draft_bytes(checkpoint: Checkpoint) -> int:
    """The MTP layer's bytes, which only speculative decoding loads."""
    return sum(one.nbytes for name, one in checkpoint.tensors.items() if _DRAFT.search(name))


def by_stage(checkpoint: Checkpoint, tensor_ranks: int, stages: int) -> list[int]:
    """Bytes that a rank of each pipeline stage holds when the weights are loaded, by RULES."""
    config = checkpoint.config
    stage_of = stage_of_layer(config["num_hidden_layers"], stages)
    totals = [0.0] * stages
    for name, tensor in checkpoint.tensors.items():
        layer = _LAYER.search(name)
        if _DRAFT.search(name):
            continue
        if layer is not None:
            share = tensor_ranks if _SHARDED.search(layer[2]) else 1
            if tensor.dtype == "I64":
                share *= 2
            totals[stage_of[int(layer[1])]] += tensor.nbytes / share
        elif name.endswith(("embed.weight", "head.weight")):
            stage = 0 if name.endswith("embed.weight") else stages - 1
            rows = tensor.shape[0]
            padded = -(-rows // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
            totals[stage] += tensor.nbytes / rows * padded / tensor_ranks
        else:
            totals[stages - 1] += tensor.nbytes
    tables = _rotary_tables(config, stage_of, stages)
    return [round(total) + table for total, table in zip(totals, tables, strict=True)]


def stage_of_layer(layers: int, stages: int) -> list[int]:
    """vLLM's split: even, and what is left over goes to the stages before the last."""
    sizes = [layers // stages] * stages
    for back in range(2, layers % stages + 2):
        sizes[-back] += 1
    return [stage for stage, size in enumerate(sizes) for _ in range(size)]


def _rotary_tables(config: dict[str, Any], stage_of: list[int], stages: int) -> list[int]:
    """One table for layers without compression on a stage, and one for those with it."""
    table = config["max_position_embeddings"] * config["qk_rope_head_dim"] * 4
    kinds: list[set[bool]] = [set() for _ in range(stages)]
    for stage, ratio in zip(stage_of, config["compress_ratios"], strict=False):
        kinds[stage].add(ratio > 1)
    return [table * len(kind) for kind in kinds]
