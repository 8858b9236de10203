# SPDX-License-Identifier: Apache-2.0
"""sparse_mla against FlashMLA and, on SM12x, FlashInfer."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vllm_sm12x.bench.case import (
    Build,
    Call,
    Case,
    NotHereError,
    calls_of,
    input_sets,
    oracle_error,
    relative_error,
)
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA, SparseMlaShape
from vllm_sm12x.vllm_api.peers import Peers

FLASH_MLA_HEADS = (64, 128)
FLASHINFER_HEADS = (8, 16, 32, 64, 128)
FLASHINFER_WORKSPACE = 128 << 20  # what vLLM gives it


def sparse_mla_cases(
    peers: Peers, device: torch.device, shapes: Sequence[SparseMlaShape] = SPARSE_MLA.bench
) -> Iterator[Case]:
    """Decode and prefill: every token has as many candidates as the shape is wide."""
    for shape in shapes:
        # A set's caches are larger than what a call reads of them.
        count = min(3, input_sets(shape.bytes, device))
        sets = [SPARSE_MLA.inputs(shape, device=device, seed=seed) for seed in range(count)]
        builds: dict[str, Build] = {}
        if peers.flash_mla is not None:
            builds["flash_mla"] = partial(calls_of, partial(flash_mla, peers.flash_mla), sets)
        if peers.flashinfer is not None:
            builds["flashinfer"] = partial(calls_of, partial(flashinfer, peers.flashinfer), sets)
        candidates = f"{shape.swa}+{shape.extra}" if shape.extra else str(shape.swa)
        yield Case(
            op=SPARSE_MLA.name,
            shape=f"T {shape.tokens}, {shape.heads} heads, {candidates}",
            series=f"{shape.heads} heads, {candidates}",
            at=shape.tokens,
            ours=[_ours(inputs) for inputs in sets],
            peers=builds,
            error=partial(oracle_error, SPARSE_MLA, sets[0]),
            tolerance=SPARSE_MLA.tolerance,
            difference=lambda theirs, ours: relative_error(theirs, ours.float()),
            peer_tolerance=SPARSE_MLA.tolerance,
            bytes=shape.bytes,
            flops=shape.flops,
        )


def _ours(inputs: dict[str, Any]) -> Call:
    """A call of sparse_mla that allocates nothing for its output."""
    return partial(SPARSE_MLA.function, **inputs, out=torch.empty_like(inputs["q"]))


def flash_mla(interface: Any, inputs: dict[str, Any]) -> Call:
    """The same call of FlashMLA: tokens as a batch of single-token queries, one cache head."""
    if (heads := inputs["q"].shape[1]) not in FLASH_MLA_HEADS:
        raise NotHereError(f"FlashMLA takes 64 or 128 heads, not {heads}")
    out = torch.empty_like(inputs["q"]).unsqueeze(1)
    extra: dict[str, Any] = {}
    if "extra_cache" in inputs:
        extra = {
            "extra_k_cache": inputs["extra_cache"].unsqueeze(-2),
            "extra_indices_in_kvcache": inputs["extra_indices"].unsqueeze(1),
            "extra_topk_length": inputs["extra_lens"],
        }
    # Filled by the first call, which must come before a graph is captured.
    schedule = interface.get_mla_metadata()[0]

    def call() -> torch.Tensor:
        interface.flash_mla_with_kvcache(
            q=inputs["q"].unsqueeze(1),
            k_cache=inputs["swa_cache"].unsqueeze(-2),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=schedule,
            softmax_scale=inputs["softmax_scale"],
            is_fp8_kvcache=True,
            indices=inputs["swa_indices"].unsqueeze(1),
            topk_length=inputs["swa_lens"],
            attn_sink=inputs["sink"],
            out=out,
            **extra,
        )
        return out.squeeze(1)

    return call


def flashinfer(function: Any, inputs: dict[str, Any]) -> Call:
    """The same call of FlashInfer, as vLLM's backend for SM12x makes it."""
    if (heads := inputs["q"].shape[1]) not in FLASHINFER_HEADS:
        raise NotHereError(f"FlashInfer takes 8, 16, 32, 64 or 128 heads, not {heads}")
    out = torch.empty_like(inputs["q"])
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=out.device)
    extra: dict[str, Any] = {}
    if "extra_cache" in inputs:
        extra = {
            "compressed_kv_cache": inputs["extra_cache"].unsqueeze(-2),
            "extra_sparse_indices": inputs["extra_indices"].unsqueeze(1),
            "extra_sparse_topk_lens": inputs["extra_lens"],
        }

    def call() -> torch.Tensor:
        function(
            query=inputs["q"],
            swa_kv_cache=inputs["swa_cache"].unsqueeze(-2),
            workspace_buffer=workspace,
            sparse_indices=inputs["swa_indices"],
            swa_topk_lens=inputs["swa_lens"],
            out=out,
            bmm1_scale=inputs["softmax_scale"],
            sinks=inputs["sink"],
            kv_layout="NHD",
            **extra,
        )
        return out

    return call
