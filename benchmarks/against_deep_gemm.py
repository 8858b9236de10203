# SPDX-License-Identifier: Apache-2.0
"""Races the ops that replace DeepGEMM's against DeepGEMM, called as vLLM calls it.

One process, CUDA-graph replays that take turns, inputs rotated beyond L2. Each result is compared
with the fp32 oracle and with DeepGEMM's first; a row that is outside a tolerance gets no time.

The file is not called deep_gemm.py: vLLM would import it in DeepGEMM's place.
"""

import gc
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from machine import describe_machine, machine_line, write_result
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sparse_mla import copy_bandwidth, relative_error
from timing import interleaved

from vllm_sm12x.ops.fp8_einsum.spec import FP8_EINSUM, Fp8EinsumShape
from vllm_sm12x.ops.hc_prenorm_gemm.spec import HC_PRENORM_GEMM, HcPrenormGemmShape
from vllm_sm12x.ops.launch import multiprocessors
from vllm_sm12x.ops.mqa_logits.spec import MQA_LOGITS, MqaLogitsShape
from vllm_sm12x.ops.paged_mqa_logits.spec import PAGED_MQA_LOGITS, pack_indexer_cache

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

HEADS, HEAD_DIM, PAGE, ROW_BYTES = 64, 128, 64, 132  # the indexer of DeepSeek V4
TOPK = 512
COMPRESSION = 4  # query tokens to one key of the indexer

# requests, keys of each, query rows of each
PAGED_SHAPES = [(b, c, n) for n in (1, 3) for c in (4096, 32_768, 131_072) for b in (1, 8, 32)]
PREFILL_SHAPES = [(4096, 4096), (4096, 32_768)]  # rows, keys
TOPK_SHAPES = [*PREFILL_SHAPES, (512, 32_768)]
EINSUM_TOKENS = [1, 16, 256, 4096]
PRENORM_TOKENS = [1, 64, 4096]

SLOWEST_RATIO = 2.5  # ours to DeepGEMM, on every row
ORACLE_ROWS = 64  # of prefill logits, whose oracle holds [rows, heads, keys] in fp32
ORACLE_REQUESTS = 4

# How far DeepGEMM may be from ours, and why it may.
LOGITS_DIFFERENCE = 5e-3  # Hopper's FP8 MMA keeps some 14 bits of a running sum
EINSUM_DIFFERENCE = 2**-7  # two roundings to bf16, on top of that
PRENORM_DIFFERENCE = 2e-3  # tf32 has 11 bits, ours are fp32 products
SELECTION_SHORTFALL = 2e-3  # near-ties, where FP8 sums keep some 14 bits of their largest term
SELECTION_DIFFERENCE = 1e-2  # the share of other positions; scores near the last one are close

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row of the race.

    Attributes:
        ours: the same call over several input sets.
        peers: by name, what builds the same calls; a RuntimeError says that it cannot be run here.
        error: of our result for the first input set, against the oracle.
        difference: of a peer's result (first argument) from ours.
        bytes, flops: that one call must move and compute.
        copy_share: the least share of the copy bandwidth, where that is a goal.
        memory: also measure the memory that a call takes beyond its inputs.
    """

    op: str
    shape: str
    ours: list[Call]
    peers: dict[str, Callable[[], list[Call]]]
    error: Callable[[Any], float]
    tolerance: float
    difference: Callable[[Any, Any], float]
    peer_tolerance: float
    bytes: int
    flops: int
    copy_share: float | None = None
    note: str = ""
    memory: bool = False


def load_deep_gemm() -> SimpleNamespace | str:
    """The functions that vLLM calls DeepGEMM through, or in words why they cannot be called."""
    try:
        from vllm.utils import deep_gemm
        from vllm.utils.import_utils import has_deep_gemm
    except ImportError as error:
        return f"DeepGEMM cannot be called as vLLM calls it: {error}"
    if not has_deep_gemm():
        return "vLLM finds no DeepGEMM that it can import"
    names = ("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "get_paged_mqa_logits_metadata")
    names += ("fp8_einsum", "transform_sf_into_required_layout", "tf32_hc_prenorm_gemm")
    return SimpleNamespace(**{name: getattr(deep_gemm, name) for name in names})


def load_vllm_ops() -> SimpleNamespace | str:
    """vLLM's gather and top-k of the indexer's prefill, or in words why there are none."""
    try:
        from vllm import _custom_ops as ops
    except ImportError as error:
        return f"vLLM's operators cannot be imported: {error}"
    return SimpleNamespace(
        gather=ops.cp_gather_indexer_k_quant_cache, top_k=ops.top_k_per_row_prefill
    )


def load_topk() -> Callable[..., torch.Tensor] | str:
    """The op paged_mqa_topk, or that this version has none."""
    name = "vllm_sm12x.ops.paged_mqa_topk"
    if importlib.util.find_spec(name) is None:
        return "paged_mqa_topk is not in this version"
    return importlib.import_module(name).paged_mqa_topk


def calls_of(call_of: Callable[..., Call], sets: list[dict[str, Any]]) -> list[Call]:
    """One call for each set of inputs."""
    return [call_of(inputs) for inputs in sets]


def deep_gemm_peer(
    deep_gemm: Any, call_of: Callable[..., Call], sets: list[dict[str, Any]]
) -> dict[str, Callable[[], list[Call]]]:
    """DeepGEMM's calls as peers of a case; none without DeepGEMM."""
    if deep_gemm is None:
        return {}
    return {"deep_gemm": partial(calls_of, partial(call_of, deep_gemm), sets)}


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs push each other out of L2 before one is used again."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(300, max(2, math.ceil(3 * l2 / bytes_of_one)))


def logits_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the finite logits; infinite if others are -inf than expected."""
    finite = expected.isfinite()
    if not torch.equal(finite, out.isfinite()):
        return math.inf
    return relative_error(out[finite], expected[finite].float())


def logits_difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Relative difference where ours is finite: DeepGEMM leaves the rest unwritten."""
    return relative_error(ours.masked_fill(ours.isinf(), 0.0), theirs.masked_fill(ours.isinf(), 0))


def paged_mqa_logits_cases(
    deep_gemm: Any,
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = PAGED_SHAPES,
) -> Iterator[Case]:
    """Decode's logits: every request has pages of its own, context and columns are the keys."""
    op = PAGED_MQA_LOGITS
    gen = torch.Generator(device).manual_seed(0)

    def moved(requests: int, keys: int, next_n: int) -> int:
        rows = requests * next_n
        return requests * keys * ROW_BYTES + rows * (4 * keys + HEADS * HEAD_DIM)

    def pages_of(requests: int, keys: int) -> int:
        return requests * -(-keys // PAGE)

    pages = max(input_sets(moved(*shape), device) * pages_of(*shape[:2]) for shape in shapes)
    cache = random_cache(pages, gen, device)
    order = torch.randperm(pages, generator=gen, device=device).int()
    for requests, keys, next_n in shapes:
        count = input_sets(moved(requests, keys, next_n), device)
        tables = order[: count * pages_of(requests, keys)].view(count, requests, -1)
        out = torch.empty(requests * next_n, keys, device=device)
        sets = [
            {
                "q": random_e4m3(gen, device, requests, next_n, HEADS, HEAD_DIM),
                "cache": cache,
                "weights": torch.randn(requests * next_n, HEADS, generator=gen, device=device),
                "context_lens": torch.full((requests,), keys, dtype=torch.int32, device=device),
                "block_table": table.contiguous(),
                "max_model_len": keys,
            }
            for table in tables
        ]

        def error(result: torch.Tensor, sets=sets, next_n=next_n) -> float:
            some = {
                name: value[: ORACLE_REQUESTS * (next_n if name == "weights" else 1)]
                for name, value in sets[0].items()
                if name not in ("cache", "max_model_len")
            }
            expected = op.oracle(**{**sets[0], **some})
            return logits_error(result[: len(expected)], expected)

        flat = deep_gemm and next_n > 2
        yield Case(
            op=op.name,
            shape=f"batch {requests}, {keys} keys, next_n {next_n}",
            ours=[partial(op.function, **inputs, out=out) for inputs in sets],
            peers=deep_gemm_peer(deep_gemm, deep_gemm_paged, sets),
            error=error,
            tolerance=op.tolerance,
            difference=logits_difference,
            peer_tolerance=LOGITS_DIFFERENCE,
            bytes=moved(requests, keys, next_n),
            flops=2 * requests * next_n * keys * HEADS * HEAD_DIM,
            # With next_n 3 the FLOP of a byte are beyond what the memory could feed.
            copy_share=0.6 if (requests, keys, next_n) == (8, 131_072, 1) else None,
            note=f"DeepGEMM: {requests * next_n} x next_n 1, as vLLM flattens" if flat else "",
        )


def deep_gemm_paged(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's indexer makes it on SM90 and SM12x; more than two rows are flattened."""
    q, table, cache = inputs["q"], inputs["block_table"], inputs["cache"]
    next_n = q.shape[1]
    steps = torch.arange(1 - next_n, 1, dtype=torch.int32, device=q.device)
    lens = inputs["context_lens"][:, None] + steps
    if next_n > 2:
        q, lens = q.flatten(0, 1).unsqueeze(1), lens.reshape(-1, 1)
        table = table.repeat_interleave(next_n, 0)
    sms = multiprocessors("q", q.device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, cache.shape[1], sms)
    return lambda: deep_gemm.fp8_fp4_paged_mqa_logits(
        (q, None),
        cache,
        inputs["weights"],
        lens,
        table,
        schedule,
        max_model_len=inputs["max_model_len"],
        clean_logits=False,
    )


def mqa_logits_cases(
    deep_gemm: Any, device: torch.device, shapes: Sequence[tuple[int, int]] = PREFILL_SHAPES
) -> Iterator[Case]:
    """Prefill's logits: every row sees all keys."""
    op = MQA_LOGITS
    for rows, keys in shapes:
        moved = rows * (HEADS * HEAD_DIM + 4 * keys) + keys * ROW_BYTES
        shape = MqaLogitsShape(rows, keys, ranges="full")
        count = input_sets(moved, device)
        sets = [op.inputs(shape, device=device, seed=seed) for seed in range(count)]
        out = torch.empty(rows, keys, device=device)

        def error(result: torch.Tensor, sets=sets, rows=rows) -> float:
            some = spread_rows(rows, result.device)
            per_row = {name: sets[0][name][some] for name in ("q", "weights", "ks", "ke")}
            return logits_error(result[some], op.oracle(**{**sets[0], **per_row}))

        yield Case(
            op=op.name,
            shape=f"{rows} x {keys} keys",
            ours=[partial(op.function, **inputs, out=out) for inputs in sets],
            peers=deep_gemm_peer(deep_gemm, deep_gemm_mqa, sets),
            error=error,
            tolerance=op.tolerance,
            difference=logits_difference,
            peer_tolerance=LOGITS_DIFFERENCE,
            bytes=moved,
            flops=2 * rows * keys * HEADS * HEAD_DIM,
        )


def deep_gemm_mqa(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's indexer makes it."""
    return lambda: deep_gemm.fp8_fp4_mqa_logits(
        (inputs["q"], None),
        (inputs["k"], inputs["k_scale"]),
        inputs["weights"],
        inputs["ks"],
        inputs["ke"],
        clean_logits=False,
    )


def fp8_einsum_cases(
    deep_gemm: Any, device: torch.device, tokens_of: Sequence[int] = EINSUM_TOKENS, **shape: int
) -> Iterator[Case]:
    """The output projection, in the layouts that vLLM's quantiser writes."""
    op = FP8_EINSUM
    for tokens in tokens_of:
        axes = Fp8EinsumShape(tokens, **shape)
        sets = []
        for seed in range(input_sets(axes.bytes, device)):
            inputs = op.inputs(axes, device=device, seed=seed)
            # [G, T, R] in memory, and scales [G, R/128, T] with T padded to 16 bytes.
            inputs["a"] = inputs["a"].transpose(0, 1).contiguous().transpose(0, 1)
            scale = inputs["a_scale"]
            groups, steps = scale.shape[1:]
            padded = scale.new_zeros(groups, steps, -(-tokens // 4) * 4)
            padded[..., :tokens] = scale.permute(1, 2, 0)
            inputs["a_scale"] = padded.permute(2, 0, 1)[:tokens]
            sets.append(inputs)
        out = torch.empty(tokens, axes.groups, axes.cols, dtype=torch.bfloat16, device=device)
        yield Case(
            op=op.name,
            shape=f"T {tokens}",
            ours=[partial(op.function, **inputs, out=out) for inputs in sets],
            peers=deep_gemm_peer(deep_gemm, deep_gemm_einsum, sets),
            error=lambda result, sets=sets: relative_error(result, op.oracle(**sets[0]).float()),
            tolerance=op.tolerance,
            difference=lambda theirs, ours: relative_error(ours, theirs.float()),
            peer_tolerance=EINSUM_DIFFERENCE,
            bytes=axes.bytes,
            flops=axes.flops,
            copy_share=0.6 if tokens == 1 else None,
        )


def deep_gemm_einsum(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's output projection makes it on SM90: fp32 scales, recipe (1, 128, 128)."""
    groups, cols, depth = inputs["b"].shape
    b_scale = deep_gemm.transform_sf_into_required_layout(
        sf=inputs["b_scale"],
        mn=cols,
        k=depth,
        recipe=(1, 128, 128),
        num_groups=groups,
        is_sfa=False,
    )
    out = inputs["a"].new_empty((inputs["a"].shape[0], groups, cols), dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        deep_gemm.fp8_einsum(
            "bhr,hdr->bhd",
            (inputs["a"], inputs["a_scale"]),
            (inputs["b"], b_scale),
            out,
            recipe=(1, 128, 128),
        )
        return out

    return call


def hc_prenorm_gemm_cases(
    deep_gemm: Any, device: torch.device, tokens_of: Sequence[int] = PRENORM_TOKENS, **shape: int
) -> Iterator[Case]:
    """The hyper-connections' GEMM; each input set is a layer with weights of its own."""
    op = HC_PRENORM_GEMM
    for tokens in tokens_of:
        axes = HcPrenormGemmShape(tokens, **shape)
        count = input_sets(axes.bytes, device)
        sets = [op.inputs(axes, device=device, seed=seed) for seed in range(count)]
        peers = deep_gemm_peer(deep_gemm, deep_gemm_prenorm, sets)
        peers["torch"] = partial(calls_of, torch_prenorm, sets)
        yield Case(
            op=op.name,
            shape=f"T {tokens}, K {axes.depth}",
            ours=[partial(op.function, **inputs) for inputs in sets],
            peers=peers,
            error=lambda result, sets=sets: prenorm_difference(op.oracle(**sets[0]), result),
            tolerance=op.tolerance,
            difference=prenorm_difference,
            peer_tolerance=PRENORM_DIFFERENCE,
            bytes=axes.bytes,
            flops=axes.flops,
            copy_share=0.7 if tokens == 4096 else None,
        )


def deep_gemm_prenorm(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's mhc_pre makes it, with its number of splits."""
    x, fn = inputs["x"], inputs["fn"]
    tokens, depth = x.shape
    splits = vllm_splits(tokens, depth, sms=multiprocessors("x", x.device))
    out = torch.empty(splits, tokens, len(fn), device=x.device)
    sqrsum = torch.empty(splits, tokens, device=x.device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        deep_gemm.tf32_hc_prenorm_gemm(x, fn, out, sqrsum, splits)
        return out, sqrsum

    return call


def vllm_splits(tokens: int, depth: int, *, sms: int) -> int:
    """vLLM's compute_num_split with the tiles of DeepGEMM's kernel, 64 x 64."""
    return max(1, min(sms // -(-tokens // 64), -(-depth // 64) // 4))


def torch_prenorm(inputs: dict[str, Any]) -> Call:
    """The same by torch, in fp32."""

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        rows = inputs["x"].float()
        return (rows @ inputs["fn"].T)[None], rows.square().sum(-1)[None]

    return call


def prenorm_difference(theirs: tuple, ours: tuple) -> float:
    """The larger relative difference of the two results, each summed over its splits."""
    pairs = zip(ours, theirs, strict=True)
    return max(relative_error(mine.sum(0), other.sum(0)) for mine, other in pairs)


def paged_mqa_topk_cases(
    deep_gemm: Any,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = TOPK_SHAPES,
    topk: int = TOPK,
    *,
    function: Callable[..., torch.Tensor],
    vllm_ops: Any,
) -> Iterator[Case]:
    """Score and select: one request whose rows are the last of its context.

    The peers gather the keys, write logits and select, as vLLM's indexer does; "logits, top-k"
    has our logits.
    """
    gen = torch.Generator(device).manual_seed(0)
    for rows, keys in shapes:
        moved = rows * (HEADS * HEAD_DIM + 4 * topk) + keys * ROW_BYTES
        count, pages = input_sets(moved, device), -(-keys // PAGE)
        cache = random_cache(count * pages, gen, device)
        order = torch.randperm(count * pages, generator=gen, device=device).int()
        behind = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=device)
        lens = keys - behind // COMPRESSION
        sets = [
            {
                "q": random_e4m3(gen, device, rows, HEADS, HEAD_DIM),
                "cache": cache,
                "weights": torch.randn(rows, HEADS, generator=gen, device=device),
                "query_start_loc": torch.tensor([0, rows], dtype=torch.int32, device=device),
                "lens": lens,
                "block_table": table[None].contiguous(),
                "topk": topk,
            }
            for table in order.view(count, pages)
        ]

        def error(result: torch.Tensor, sets=sets, keys=keys) -> float:
            first = sets[0]
            some = spread_rows(len(result), result.device)
            logits = PAGED_MQA_LOGITS.oracle(
                first["q"][some].unsqueeze(1),
                first["cache"],
                first["weights"][some],
                first["lens"][some],
                first["block_table"].expand(len(some), -1),
                max_model_len=keys,
            )
            return selection_error(result[some], logits)

        peers: dict[str, Callable[[], list[Call]]] = {}
        if vllm_ops:
            by = {"logits, top-k": MQA_LOGITS.function}
            if deep_gemm:
                by["deep_gemm"] = partial(contiguous_deep_gemm, deep_gemm)
            for name, logits in by.items():
                select = partial(partial, gather_score_select, vllm_ops, logits)
                peers[name] = partial(calls_of, select, sets)
        yield Case(
            op="paged_mqa_topk",
            shape=f"{rows} x {keys} keys, top {topk}",
            ours=[partial(function, **inputs) for inputs in sets],
            peers=peers,
            error=error,
            tolerance=SELECTION_SHORTFALL,
            difference=selection_difference,
            peer_tolerance=SELECTION_DIFFERENCE,
            bytes=moved,
            flops=2 * int(lens.sum()) * HEADS * HEAD_DIM,
            note="peers: gather, logits, top-k",
            memory=True,
        )


def contiguous_deep_gemm(
    deep_gemm: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
) -> torch.Tensor:
    """DeepGEMM's logits with the arguments of mqa_logits."""
    inputs = {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "ks": ks, "ke": ke}
    return deep_gemm_mqa(deep_gemm, inputs)()


def gather_score_select(
    vllm_ops: Any, logits_of: Callable[..., torch.Tensor], inputs: dict[str, Any]
) -> torch.Tensor:
    """vLLM's three steps for a chunk of one request: copied keys, fp32 logits, top-k."""
    q, cache, lens = inputs["q"], inputs["cache"], inputs["lens"]
    rows, topk = len(q), inputs["topk"]
    keys = inputs["block_table"].shape[1] * PAGE
    k = torch.empty(keys, HEAD_DIM, dtype=torch.float8_e4m3fn, device=q.device)
    scale = torch.empty(keys, 4, dtype=torch.uint8, device=q.device)
    starts = torch.zeros(rows, dtype=torch.int32, device=q.device)
    ends = torch.arange(0, 2 * keys, keys, dtype=torch.int32, device=q.device)  # 0 and keys
    vllm_ops.gather(cache.squeeze(2), k, scale, inputs["block_table"], ends)
    k_scale = scale.view(torch.float32).squeeze(1)
    logits = logits_of(q, k, k_scale, inputs["weights"], starts, lens)
    chosen = torch.full((rows, topk), -1, dtype=torch.int32, device=q.device)
    vllm_ops.top_k(logits, starts, lens, chosen, rows, logits.stride(0), logits.stride(1), topk)
    return chosen


def selection_error(chosen: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the worst chosen score is below the last that belongs to the best, relative to it.

    Infinite if a position is chosen twice, none or one outside the row, or too few.
    """
    topk = chosen.shape[1]
    ordered = chosen.sort(1).values
    if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= logits.shape[1]:
        return math.inf
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return math.inf
    worst = logits.gather(1, chosen.long()).amin(1)
    last = logits.topk(topk, 1).values[:, -1]
    return ((last - worst) / last.abs().clamp_min(1.0)).max().clamp_min(0).item()


def selection_difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The share of our positions that they have not chosen."""
    other, mine = theirs.sort(1).values, ours.sort(1).values
    places = torch.searchsorted(other, mine).clamp_max(other.shape[1] - 1)
    return (other.gather(1, places) != mine).float().mean().item()


def spread_rows(rows: int, device: torch.device) -> torch.Tensor:
    """At most ORACLE_ROWS row numbers, from the first to the last."""
    return torch.linspace(0, rows - 1, min(rows, ORACLE_ROWS), device=device).long()


def random_e4m3(gen: torch.Generator, device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=gen, device=device).to(torch.float8_e4m3fn)


def random_cache(pages: int, gen: torch.Generator, device: torch.device) -> torch.Tensor:
    """An indexer cache uint8 [pages, 64, 1, 132] with scales from 2^-3 to 2^3."""
    keys = random_e4m3(gen, device, pages, PAGE, HEAD_DIM)
    spread = torch.randn(pages, PAGE, generator=gen, device=device) * 2
    return pack_indexer_cache(keys, torch.exp2(spread.round().clamp(-3, 3)))


def gate(case: Case) -> tuple[dict[str, list[Call]], dict[str, float], dict[str, str]]:
    """Build the peers and compare every result.

    Returns:
        calls by name, what can be run; errors by name, ours against the oracle and the peers
        against ours (their worst over the input sets); refusals by name, in words.
    """
    calls, refused = {"ours": case.ours}, {}
    for name, build in case.peers.items():
        try:
            built = build()
            built[0]()
        except RuntimeError as error:
            refused[name] = str(error).strip().splitlines()[0]
        else:
            calls[name] = built
    errors = {"ours": case.error(case.ours[0]())}
    for name in list(calls)[1:]:
        pairs = zip(calls[name], case.ours, strict=True)
        errors[name] = max(case.difference(theirs(), ours()) for theirs, ours in pairs)
    return calls, errors, refused


def red_variants(case: Case, errors: dict[str, float]) -> list[str]:
    """Which of them are outside their tolerance. NaN is."""
    limits = {name: case.peer_tolerance for name in errors} | {"ours": case.tolerance}
    return [name for name, error in errors.items() if not error <= limits[name]]


def extra_memory(call: Call) -> int:
    """Bytes that one call takes at its peak, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def repetitions(call: Call, sets: int) -> tuple[int, int]:
    """Calls in a graph, a multiple of the input sets, and replays of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    microseconds = start.elapsed_time(end) * 1e3
    calls = sets * max(1, round(min(20, 20_000 / microseconds) / sets))
    return calls, round(min(30, max(7, 200_000 / (calls * microseconds))))


def measure(case: Case, copy_rate: float) -> dict[str, Any]:
    """One row of the result: errors first, times only if all of them are within tolerance."""
    calls, errors, refused = gate(case)
    red = red_variants(case, errors)
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "error": errors,
        "tolerance": {"ours": case.tolerance, "peers": case.peer_tolerance},
        "red": red,
        "refused": refused,
        "input_sets": len(case.ours),
        "bytes": case.bytes,
        "flops": case.flops,
        "note": case.note,
    }
    if red:
        return row | {"median_us": {}, "iqr_us": {}, "floors": {}, "missed": []}
    if case.memory:
        row["extra_bytes"] = {name: extra_memory(variant[0]) for name, variant in calls.items()}
    count, rounds = repetitions(case.ours[0], len(case.ours))
    timings = interleaved(calls, calls=count, rounds=rounds)
    row["median_us"] = {name: timing.median_us for name, timing in timings.items()}
    row["iqr_us"] = {name: timing.iqr_us for name, timing in timings.items()}
    return row | judge(row["median_us"], case, copy_rate)


def judge(medians: dict[str, float], case: Case, copy_rate: float) -> dict[str, Any]:
    """Rates of ours, the floors that the row has, and those it missed, in words."""
    seconds = medians["ours"] / 1e6
    share = case.bytes / seconds / copy_rate
    floors, missed = {}, []
    if case.copy_share is not None:
        floors["copy_share"] = case.copy_share
        if share < case.copy_share:
            missed.append(f"{share:.0%} of the copy bandwidth, not {case.copy_share:.0%}")
    result = {"copy_share": share, "flops_per_second": case.flops / seconds}
    if "deep_gemm" in medians:
        floors["ratio"] = SLOWEST_RATIO
        result["ratio"] = medians["ours"] / medians["deep_gemm"]
        if result["ratio"] > SLOWEST_RATIO:
            missed.append(f"{result['ratio']:.2f} x DeepGEMM, not {SLOWEST_RATIO}")
    return {**result, "floors": floors, "missed": missed}


def table_cells(row: dict[str, Any]) -> list[str]:
    """The row as the table prints it."""
    medians = row["median_us"]

    def microseconds(name: str) -> str:
        return f"{medians[name]:.1f}" if name in medians else "-"

    others = [name for name in medians if name not in ("ours", "deep_gemm")]
    more = [f"{name} {medians[name]:.1f} us" for name in others]
    memory = row.get("extra_bytes", {})
    more += [f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items()]
    more += [f"{name}: {reason}" for name, reason in row["refused"].items()]
    if row["red"]:
        verdict = f"[red]red: {', '.join(row['red'])}[/]"
    elif row["missed"]:
        verdict = f"[red]{'; '.join(row['missed'])}[/]"
    else:
        verdict = "pass" if row["floors"] else "-"
    return [
        f"{row['op']} {row['shape']}",
        " / ".join(f"{error:.0e}" for error in row["error"].values()),
        microseconds("ours"),
        microseconds("deep_gemm"),
        f"{row['ratio']:.2f}" if "ratio" in row else "-",
        f"{row['copy_share']:.0%}" if medians else "-",
        f"{row['flops_per_second'] / 1e12:.0f}" if medians else "-",
        verdict,
        escape("; ".join(filter(None, [row["note"], *more]))),
    ]


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows that were timed, for a document."""
    lines = ["| op | ours, us | DeepGEMM, us | ours / DeepGEMM | of copy | TFLOP/s | difference |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if row["median_us"]:
            name, _, ours, peer, ratio, share, rate, *_ = table_cells(row)
            other = row["error"].get("deep_gemm")
            difference = "-" if other is None else f"{other:.0e}"
            cells = (f"`{row['op']}`{name.removeprefix(row['op'])}", ours, peer, ratio, share, rate)
            lines.append(f"| {' | '.join([*cells, difference])} |")
    return "\n".join(lines) + "\n"


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "paged_mqa_logits": paged_mqa_logits_cases,
    "mqa_logits": mqa_logits_cases,
    "fp8_einsum": fp8_einsum_cases,
    "hc_prenorm_gemm": hc_prenorm_gemm_cases,
    "paged_mqa_topk": paged_mqa_topk_cases,
}
Op = Enum("Op", {name: name for name in CASES}, type=str)  # type: ignore[misc]


@app.command()
def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
    only: Annotated[list[Op] | None, typer.Option(help="An op; repeatable.")] = None,
    show: Annotated[
        Path | None, typer.Option(help="Print this result as a Markdown table; nothing is run.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Race the ops. Exit status 1 if a result is outside a tolerance or a floor is missed."""
    console = Console(width=150)
    if show:
        print(markdown_table(json.loads(show.read_text(encoding="utf-8"))["rows"]), end="")
        return
    if not torch.cuda.is_available():
        console.print("[red]no NVIDIA GPU:[/] torch.cuda.is_available() is False")
        raise typer.Exit(2)
    began = time.monotonic()
    machine = describe_machine(revision)
    console.print(machine_line(machine), highlight=False)
    device = torch.device("cuda", torch.cuda.current_device())
    deep_gemm, vllm_ops, topk = load_deep_gemm(), load_vllm_ops(), load_topk()
    for missing in (deep_gemm, vllm_ops, topk):
        if isinstance(missing, str):
            console.print(escape(missing))
    copy_rate = copy_bandwidth()
    console.print(f"measured here: copy {copy_rate / 1e12:.2f} TB/s")

    rows: list[dict[str, Any]] = []
    columns = ("op", "errors", "ours us", "DeepGEMM us", "ratio", "of copy", "TFLOP/s")
    table = Table(*columns, "floors", "", title="medians of CUDA-graph replays")
    for name in [op.value for op in only or Op]:
        more: dict[str, Any] = {}
        if name == "paged_mqa_topk":
            if isinstance(topk, str):
                continue
            more["function"] = topk
            more["vllm_ops"] = None if isinstance(vllm_ops, str) else vllm_ops
        peer = None if isinstance(deep_gemm, str) else deep_gemm
        for case in CASES[name](peer, device, **more):
            rows.append(measure(case, copy_rate))
            cells = table_cells(rows[-1])
            table.add_row(*cells)
            # A run that is cut short leaves these.
            console.print(f"{time.monotonic() - began:5.0f} s", *cells, soft_wrap=True)
            del case
            gc.collect()
            torch.cuda.empty_cache()
            if json_path:
                write_result(
                    json_path,
                    machine,
                    benchmark="against_deep_gemm",
                    deep_gemm=deep_gemm if isinstance(deep_gemm, str) else "timed",
                    copy_bytes_per_second=copy_rate,
                    rows=rows,
                )
    console.print(table)
    raise typer.Exit(1 if any(row["red"] or row["missed"] for row in rows) else 0)


if __name__ == "__main__":
    app()
