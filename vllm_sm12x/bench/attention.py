# SPDX-License-Identifier: Apache-2.0
"""sparse_mla against FlashMLA, vLLM's ROCm kernels and, on SM12x, FlashInfer."""

from collections.abc import Callable, Iterator, Sequence
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
    spread_rows,
)
from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM, NOPE_DIM, ROPE_DIM
from vllm_sm12x.ops.sparse_mla.config import LaunchPolicy
from vllm_sm12x.ops.sparse_mla.spec import COMPRESSION, SPARSE_MLA, SparseMlaShape
from vllm_sm12x.vllm_api.peers import Peers

FLASH_MLA_HEADS = (64, 128)
FLASHINFER_HEADS = (8, 16, 32, 64, 128)
FLASHINFER_WORKSPACE = 128 << 20  # what vLLM gives it
ORACLE_TOKENS = 512  # the oracle holds [tokens, candidates, 512] in fp32
PER_TOKEN = ("q", "swa_indices", "swa_lens", "extra_indices", "extra_lens", "request_ids")
UNPACKING = ("unpacked", "unpacked_lens")
QUANTISING = ("out", "out_scale", "positions", "cos_sin_cache")
# Half of what rounding to e4m3 may take: where rows differ by their own tolerance, a few values
# round the other way.
QUANTISED_TOLERANCE = 2**-5
IN_TWO = "attention, quantiser"
HEADS_OF_GROUP = 8  # in DeepSeek V4's output projection
# How many times FlashMLA's time a prefill may take, its gather and our unpacking included.
PREFILL_RATIO = 1.6
GATHERED = "FlashMLA's and ROCm's with vLLM's gather into bf16 and its lists of places"
# Attends with rows bf16 [rows, 1, 512], indices int32 [T, width] among them, and lens int32 [T].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def sparse_mla_cases(
    peers: Peers, device: torch.device, shapes: Sequence[SparseMlaShape] = SPARSE_MLA.bench
) -> Iterator[Case]:
    """Decode, where every token has as many candidates as the shape is wide, and prefill.

    Quantised results race the same attention with vLLM's op behind it.
    """
    for shape in shapes:
        # A set's caches are larger than what a call reads of them.
        count = min(3, input_sets(shape.bytes, device))
        sets = [SPARSE_MLA.inputs(shape, device=device, seed=seed) for seed in range(count)]
        if shape.quantised:
            yield quantised_case(peers, shape, sets)
            continue
        builds = (
            prefill_peers(peers, shape.context, sets)
            if shape.context
            else decode_peers(peers, sets)
        )
        if peers.flashinfer is not None:
            builds["flashinfer"] = partial(calls_of, partial(flashinfer, peers.flashinfer), sets)
        candidates = candidates_of(shape)
        yield Case(
            op=SPARSE_MLA.name,
            shape=f"T {shape.tokens}, {shape.heads} heads, {candidates}",
            series=f"{shape.heads} heads, {candidates}",
            at=shape.tokens,
            ours=[_ours(inputs) for inputs in sets],
            peers=builds,
            error=partial(attention_error, sets[0]),
            tolerance=SPARSE_MLA.tolerance,
            difference=lambda theirs, ours: relative_error(theirs, ours.float()),
            peer_tolerance=SPARSE_MLA.tolerance,
            bytes=shape.bytes,
            flops=shape.flops,
            invariant=partial(
                calls_of,
                partial(_ours, policy=LaunchPolicy(batch_invariant=True)),
                [packed_only(inputs) for inputs in sets],
            ),
            slowest={"flash_mla": PREFILL_RATIO} if shape.context else {},
            note=GATHERED if shape.context and {"flash_mla", "rocm"} & builds.keys() else "",
        )


def candidates_of(shape: SparseMlaShape) -> str:
    """In words."""
    candidates = f"{shape.swa}+{shape.extra}" if shape.extra else str(shape.swa)
    if shape.context:
        candidates += f" of a context of {shape.context}"
        candidates += ", rows unpacked once" if shape.unpack else ", packed rows"
    return candidates


def quantised_case(peers: Peers, shape: SparseMlaShape, sets: list[dict[str, Any]]) -> Case:
    """A result of e4m3 and scales, against bf16 rows and vLLM's op that makes these of them."""
    name = f"{shape.heads} heads, {candidates_of(shape)}, quantised"
    builds: dict[str, Build] = {}
    if peers.quantize is not None:
        builds[IN_TWO] = partial(calls_of, partial(quantised_by_vllm, peers.quantize), sets)
    return Case(
        op=SPARSE_MLA.name,
        shape=f"T {shape.tokens}, {name}",
        series=name,
        at=shape.tokens,
        ours=[partial(quantised, inputs) for inputs in sets],
        peers=builds,
        error=partial(quantised_error, sets[0]),
        tolerance=QUANTISED_TOLERANCE,
        difference=quantised_difference,
        peer_tolerance=QUANTISED_TOLERANCE,
        bytes=shape.bytes,
        flops=shape.flops,
    )


def quantised(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Our call; e4m3 and scales."""
    return SPARSE_MLA.function(**inputs), inputs["out_scale"]


def quantised_by_vllm(quantize: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    """Ours with a result in bf16, and vLLM's op, which gives e4m3 and scales by groups of heads.

    By the same kernel: that of wgmma, which bf16 may take, has no quantised result.
    """
    plain = {name: value for name, value in inputs.items() if name not in QUANTISING}
    rows = torch.empty_like(inputs["q"])
    groups = max(1, rows.shape[1] // HEADS_OF_GROUP)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        SPARSE_MLA.function(**plain, out=rows, policy=LaunchPolicy(wgmma=False))
        return quantize(rows, inputs["positions"], inputs["cos_sin_cache"], groups)

    return call


def quantised_error(inputs: dict[str, Any], result: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The error of some tokens against the oracle, quantised too."""
    some = spread_rows(len(result[0]), ORACLE_TOKENS, result[0].device)
    per_token = {name: inputs[name][some] for name in (*PER_TOKEN, "positions") if name in inputs}
    out, scale = (torch.empty_like(part[some]) for part in result)
    SPARSE_MLA.oracle(**inputs | per_token | {"out": out, "out_scale": scale})
    return quantised_difference((out, scale), tuple(part[some] for part in result))


def quantised_difference(theirs: tuple, ours: tuple) -> float:
    """The relative difference of what the values and their scales stand for."""

    def rows(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        tokens = len(values)
        return values.float().reshape(tokens, -1, 128) * scales.reshape(tokens, -1, 1)

    return relative_error(rows(*ours), rows(*theirs))


def decode_peers(peers: Peers, sets: list[dict[str, Any]]) -> dict[str, Build]:
    """What reads the packed caches itself, and is here."""
    builds: dict[str, Build] = {}
    if peers.flash_mla is not None:
        builds["flash_mla"] = partial(calls_of, partial(flash_mla, peers.flash_mla), sets)
    if peers.rocm is not None:
        builds["rocm"] = partial(calls_of, partial(rocm, peers.rocm), sets)
    return builds


def prefill_peers(peers: Peers, context: int, sets: list[dict[str, Any]]) -> dict[str, Build]:
    """What attends to rows that vLLM has gathered, and is here."""
    builds: dict[str, Build] = {}
    if peers.prefill is None:
        return builds
    for name, attends in (("flash_mla", flash_mla_prefill), ("rocm", rocm_prefill)):
        peer = getattr(peers, name)
        if peer is not None:
            call_of = partial(gathered, peers.prefill, partial(attends, peer), context)
            builds[name] = partial(calls_of, call_of, sets)
    return builds


def attention_error(inputs: dict[str, Any], out: torch.Tensor) -> float:
    """The error against the oracle, of some tokens where there are many."""
    some = spread_rows(len(out), ORACLE_TOKENS, out.device)
    per_token = {name: inputs[name][some] for name in PER_TOKEN if name in inputs}
    return oracle_error(SPARSE_MLA, {**inputs, **per_token}, out[some])


def packed_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call on packed rows, as batch-invariant mode makes it.

    How many tokens there are decides whether others unpack, and with it a token's bits.
    """
    return {name: value for name, value in inputs.items() if name not in UNPACKING}


def _ours(inputs: dict[str, Any], policy: LaunchPolicy | None = None) -> Call:
    """A call of sparse_mla that allocates nothing for its output."""
    out = torch.empty_like(inputs["q"])
    return partial(SPARSE_MLA.function, **inputs, out=out, policy=policy)


def gathered(
    steps: Any,
    attend: Callable[[dict[str, Any], torch.Tensor], Attend],
    context: int,
    inputs: dict[str, Any],
) -> Call:
    """The last tokens of a request of `context`, as vLLM's layer of ratio 4 prefills them.

    The compressed rows, then those of the windows, are dequantised into one workspace; the two
    lists of each token become one list of places there; then `attend` attends.
    """
    q, topk = inputs["q"], inputs["extra_indices"]
    window, tokens = inputs["swa_indices"].shape[1], len(q)
    table = window_table(inputs, context)
    gather = min(context, tokens + window - 1)
    compressed = context // COMPRESSION

    def vector(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    seq_lens, gather_lens, query_start_loc = vector(context), vector(gather), vector(0, tokens)
    workspace = q.new_empty((1, compressed + gather, HEAD_DIM))
    out = torch.empty_like(q)
    attention = attend(inputs, out)

    def call() -> torch.Tensor:
        steps.gather(
            workspace,
            inputs["extra_cache"],
            seq_lens=seq_lens // COMPRESSION,
            gather_lens=None,
            block_table=inputs["extra_block_table"],
            block_size=inputs["extra_cache"].shape[1],
            offset=0,
        )
        steps.gather(
            workspace,
            inputs["swa_cache"],
            seq_lens=seq_lens,
            gather_lens=gather_lens,
            block_table=table,
            block_size=inputs["swa_cache"].shape[1],
            offset=compressed,
        )
        indices, lens = steps.combine(
            topk,
            query_start_loc,
            seq_lens,
            gather_lens,
            window,
            COMPRESSION,
            topk.shape[1],
            workspace.shape[1],
            compressed,
        )
        attention(workspace.view(-1, 1, HEAD_DIM), indices, lens)
        return out

    return call


def window_table(inputs: dict[str, Any], context: int) -> torch.Tensor:
    """The request's block table of the window cache, int32 [1, pages].

    sparse_mla has global slots instead. Pages before the first window are left at 0.
    """
    slots, lens = inputs["swa_indices"], inputs["swa_lens"].long()
    block = inputs["swa_cache"].shape[1]
    own = slots.gather(1, lens[:, None] - 1).squeeze(1)
    known = torch.cat([slots[0, : lens[0] - 1], own])
    position = torch.arange(context - len(known), context, device=slots.device)
    table = torch.zeros(-(-context // block), dtype=torch.int32, device=slots.device)
    table[position // block] = known // block
    return table[None]


def flash_mla_prefill(interface: Any, inputs: dict[str, Any], out: torch.Tensor) -> Attend:
    """FlashMLA's prefill kernel, over rows that have been gathered."""
    _check_flash_mla_heads(inputs)

    def attend(rows: torch.Tensor, indices: torch.Tensor, lens: torch.Tensor) -> None:
        interface.flash_mla_sparse_fwd(
            q=inputs["q"],
            kv=rows,
            indices=indices.unsqueeze(1),
            sm_scale=inputs["softmax_scale"],
            attn_sink=inputs["sink"],
            topk_length=lens,
            out=out,
        )

    return attend


def rocm_prefill(kernels: Any, inputs: dict[str, Any], out: torch.Tensor) -> Attend:
    """The prefill kernel of vLLM's ROCm backend, over rows that have been gathered."""

    def attend(rows: torch.Tensor, indices: torch.Tensor, lens: torch.Tensor) -> None:
        kernels.prefill(
            q=inputs["q"],
            kv=rows,
            indices=indices,
            topk_length=lens,
            scale=inputs["softmax_scale"],
            head_dim=HEAD_DIM,
            nope_head_dim=NOPE_DIM,
            rope_head_dim=ROPE_DIM,
            attn_sink=inputs["sink"],
            output=out,
        )

    return attend


def rocm(kernels: Any, inputs: dict[str, Any]) -> Call:
    """The decode of vLLM's ROCm backend; its packed index lists are made once, beforehand."""
    out = torch.empty_like(inputs["q"])

    def ragged(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        cache = inputs[f"{kind}_cache"]
        rows = cache.shape[0] * cache.shape[1]
        return kernels.ragged(inputs[f"{kind}_indices"], inputs[f"{kind}_lens"], num_rows=rows)

    swa = ragged("swa")
    extra = ragged("extra") if "extra_cache" in inputs else (None, None)

    def call() -> torch.Tensor:
        kernels.decode(
            q=inputs["q"],
            kv_cache=inputs.get("extra_cache"),
            swa_k_cache=inputs["swa_cache"],
            swa_only="extra_cache" not in inputs,
            topk_indices=inputs.get("extra_indices"),
            topk_lens=inputs.get("extra_lens"),
            swa_indices=inputs["swa_indices"],
            swa_lens=inputs["swa_lens"],
            swa_ragged_indices=swa[0],
            swa_ragged_indptr=swa[1],
            topk_ragged_indices=extra[0],
            topk_ragged_indptr=extra[1],
            attn_sink=inputs["sink"],
            scale=inputs["softmax_scale"],
            head_dim=HEAD_DIM,
            nope_head_dim=NOPE_DIM,
            rope_head_dim=ROPE_DIM,
            output=out,
        )
        return out

    return call


def flash_mla(interface: Any, inputs: dict[str, Any]) -> Call:
    """The same call of FlashMLA: tokens as a batch of single-token queries, one cache head."""
    _check_flash_mla_heads(inputs)
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
    """The same call of FlashInfer, as vLLM's backend for SM12x makes it, with global slots."""
    if (heads := inputs["q"].shape[1]) not in FLASHINFER_HEADS:
        raise NotHereError(f"FlashInfer takes 8, 16, 32, 64 or 128 heads, not {heads}")
    out = torch.empty_like(inputs["q"])
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=out.device)
    extra: dict[str, Any] = {}
    if "extra_cache" in inputs:
        extra = {
            "compressed_kv_cache": inputs["extra_cache"].unsqueeze(-2),
            "extra_sparse_indices": global_slots(inputs).unsqueeze(1),
            "extra_sparse_topk_lens": inputs["extra_lens"].clamp(
                max=inputs["extra_indices"].shape[1]
            ),
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


def global_slots(inputs: dict[str, Any]) -> torch.Tensor:
    """The compressed candidates as global slots, int32 [T, width], -1 where there is none."""
    positions = inputs["extra_indices"]
    if "extra_block_table" not in inputs:
        return positions
    block = inputs["extra_cache"].shape[1]
    page = positions.clamp(min=0) // block
    block_number = inputs["extra_block_table"][inputs["request_ids"][:, None], page]
    return torch.where(positions < 0, -1, block_number * block + positions % block)


def _check_flash_mla_heads(inputs: dict[str, Any]) -> None:
    if (heads := inputs["q"].shape[1]) not in FLASH_MLA_HEADS:
        raise NotHereError(f"FlashMLA takes 64 or 128 heads, not {heads}")
