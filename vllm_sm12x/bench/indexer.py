# SPDX-License-Identifier: Apache-2.0
"""The indexer's ops against DeepGEMM, and selection against vLLM's gather and top-k."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vllm_sm12x.bench.case import (
    Build,
    Call,
    Case,
    calls_of,
    deep_gemm_peer,
    input_sets,
    relative_error,
    spread_rows,
)
from vllm_sm12x.ops.launch import multiprocessors
from vllm_sm12x.ops.mqa_logits.spec import MQA_LOGITS, MqaLogitsShape
from vllm_sm12x.ops.paged_mqa_logits.spec import (
    PAGED_MQA_LOGITS,
    PagedMqaLogitsShape,
    pack_indexer_cache,
)
from vllm_sm12x.ops.paged_mqa_topk.spec import PAGED_MQA_TOPK, PagedMqaTopkShape
from vllm_sm12x.vllm_api.peers import Peers

HEAD_DIM, ROW_BYTES = 128, 132  # of DeepSeek V4's indexer
COMPRESSION = 4  # query tokens to one key

ORACLE_ROWS = 64  # of prefill logits, whose oracle holds [rows, heads, keys] in fp32
ORACLE_REQUESTS = 4

# How far a peer may be from ours, and why it may.
LOGITS_DIFFERENCE = 5e-3  # Hopper's FP8 MMA keeps some 14 bits of a running sum
SELECTION_SHORTFALL = 2e-3  # near-ties, where FP8 sums keep some 14 bits of their largest term
SELECTION_DIFFERENCE = 1e-2  # the share of other positions; scores near the last one are close


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
    peers: Peers,
    device: torch.device,
    shapes: Sequence[PagedMqaLogitsShape] = PAGED_MQA_LOGITS.bench,
) -> Iterator[Case]:
    """Decode's logits: every request has pages of its own, context and columns are the keys."""
    op = PAGED_MQA_LOGITS
    gen = torch.Generator(device).manual_seed(0)

    def moved(shape: PagedMqaLogitsShape) -> int:
        rows = shape.requests * shape.next_n
        read = shape.requests * shape.context * ROW_BYTES
        return read + rows * (4 * shape.context + shape.heads * HEAD_DIM)

    def pages_of(shape: PagedMqaLogitsShape) -> int:
        return shape.requests * -(-shape.context // shape.block_size)

    (page,) = {shape.block_size for shape in shapes}
    pages = max(input_sets(moved(shape), device) * pages_of(shape) for shape in shapes)
    cache = random_cache(pages, page, gen, device)
    order = torch.randperm(pages, generator=gen, device=device).int()
    for shape in shapes:
        requests, keys, next_n, heads = shape.requests, shape.context, shape.next_n, shape.heads
        count = input_sets(moved(shape), device)
        tables = order[: count * pages_of(shape)].view(count, requests, -1)
        out = torch.empty(requests * next_n, keys, device=device)
        sets = [
            {
                "q": random_e4m3(gen, device, requests, next_n, heads, HEAD_DIM),
                "cache": cache,
                "weights": torch.randn(requests * next_n, heads, generator=gen, device=device),
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

        flat = peers.deep_gemm is not None and next_n > 2
        yield Case(
            op=op.name,
            shape=f"batch {requests}, {keys} keys, next_n {next_n}",
            series=f"batch {requests}, next_n {next_n}",
            at=keys,
            ours=[partial(op.function, **inputs, out=out) for inputs in sets],
            peers=deep_gemm_peer(peers, deep_gemm_paged, sets),
            error=error,
            tolerance=op.tolerance,
            difference=logits_difference,
            peer_tolerance=LOGITS_DIFFERENCE,
            bytes=moved(shape),
            matrix="fp8",
            flops=2 * requests * next_n * keys * heads * HEAD_DIM,
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
    schedule = deep_gemm.wrappers().get_paged_mqa_logits_metadata(lens, cache.shape[1], sms)
    return partial(
        deep_gemm.paged_mqa_logits,
        q,
        cache,
        inputs["weights"],
        lens,
        table,
        schedule,
        inputs["max_model_len"],
        clean_logits=False,
    )


def mqa_logits_cases(
    peers: Peers, device: torch.device, shapes: Sequence[MqaLogitsShape] = MQA_LOGITS.bench
) -> Iterator[Case]:
    """Prefill's logits."""
    op = MQA_LOGITS
    for shape in shapes:
        rows, keys = shape.rows, shape.keys
        moved = rows * (shape.heads * HEAD_DIM + 4 * keys) + keys * ROW_BYTES
        count = input_sets(moved, device)
        sets = [op.inputs(shape, device=device, seed=seed) for seed in range(count)]
        out = torch.empty(rows, keys, device=device)

        def error(result: torch.Tensor, sets=sets, rows=rows) -> float:
            some = spread_rows(rows, ORACLE_ROWS, result.device)
            per_row = {name: sets[0][name][some] for name in ("q", "weights", "ks", "ke")}
            return logits_error(result[some], op.oracle(**{**sets[0], **per_row}))

        yield Case(
            op=op.name,
            shape=f"{rows} x {keys} keys",
            series=f"{rows} rows",
            at=keys,
            ours=[partial(op.function, **inputs, out=out) for inputs in sets],
            peers=deep_gemm_peer(peers, deep_gemm_mqa, sets),
            error=error,
            tolerance=op.tolerance,
            difference=logits_difference,
            peer_tolerance=LOGITS_DIFFERENCE,
            bytes=moved,
            matrix="fp8",
            flops=2 * rows * keys * shape.heads * HEAD_DIM,
        )


def deep_gemm_mqa(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's indexer makes it."""
    return partial(deep_gemm.mqa_logits, **inputs)


def paged_mqa_topk_cases(
    peers: Peers, device: torch.device, shapes: Sequence[PagedMqaTopkShape] = PAGED_MQA_TOPK.bench
) -> Iterator[Case]:
    """Score and select: one request whose rows are the last of its context.

    The peers gather the keys, write logits and select, as vLLM's indexer does; "logits, top-k"
    has our logits.
    """
    op = PAGED_MQA_TOPK
    gen = torch.Generator(device).manual_seed(0)
    for shape in shapes:
        rows, keys, topk, heads = shape.rows, shape.keys, shape.topk, shape.heads
        moved = rows * (heads * HEAD_DIM + 4 * topk) + keys * ROW_BYTES
        count, pages = input_sets(moved, device), -(-keys // shape.block_size)
        cache = random_cache(count * pages, shape.block_size, gen, device)
        order = torch.randperm(count * pages, generator=gen, device=device).int()
        behind = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=device)
        lens = keys - behind // COMPRESSION
        sets = [
            {
                "q": random_e4m3(gen, device, rows, heads, HEAD_DIM),
                "cache": cache,
                "weights": torch.randn(rows, heads, generator=gen, device=device),
                "query_start_loc": torch.tensor([0, rows], dtype=torch.int32, device=device),
                "lens": lens,
                "block_table": table[None].contiguous(),
                "topk": topk,
            }
            for table in order.view(count, pages)
        ]

        def error(result: torch.Tensor, sets=sets, keys=keys) -> float:
            first = sets[0]
            some = spread_rows(len(result), ORACLE_ROWS, result.device)
            logits = PAGED_MQA_LOGITS.oracle(
                first["q"][some].unsqueeze(1),
                first["cache"],
                first["weights"][some],
                first["lens"][some],
                first["block_table"].expand(len(some), -1),
                max_model_len=keys,
            )
            return selection_error(result[some], logits)

        builds: dict[str, Build] = {}
        if peers.indexer is not None:
            by = {"logits, top-k": MQA_LOGITS.function}
            if peers.deep_gemm is not None:
                by["deep_gemm"] = peers.deep_gemm.mqa_logits
            for name, logits in by.items():
                select = partial(partial, gather_score_select, peers.indexer, logits)
                builds[name] = partial(calls_of, select, sets)
        yield Case(
            op=op.name,
            shape=f"{rows} x {keys} keys, top {topk}",
            series=f"{rows} rows, top {topk}",
            at=keys,
            ours=[partial(op.function, **inputs) for inputs in sets],
            peers=builds,
            error=error,
            tolerance=SELECTION_SHORTFALL,
            difference=selection_difference,
            peer_tolerance=SELECTION_DIFFERENCE,
            bytes=moved,
            matrix="fp8",
            flops=2 * int(lens.sum()) * heads * HEAD_DIM,
            note="peers: gather, logits, top-k",
            memory=True,
        )


def gather_score_select(
    vllm_ops: Any, logits_of: Callable[..., torch.Tensor], inputs: dict[str, Any]
) -> torch.Tensor:
    """vLLM's three steps for a chunk of one request: copied keys, fp32 logits, top-k."""
    q, cache, lens = inputs["q"], inputs["cache"], inputs["lens"]
    rows, topk = len(q), inputs["topk"]
    keys = inputs["block_table"].shape[1] * cache.shape[1]
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
    """How far the worst chosen score is below the last that belongs to the best.

    Relative to the root mean square of its row: scores are sums with signs, and where a row sees
    hardly more than it selects the last is near zero.
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
    seen = logits.isfinite()
    size = (logits.masked_fill(~seen, 0).square().sum(1) / seen.sum(1)).sqrt()
    return ((last - worst) / size).max().clamp_min(0).item()


def selection_difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The share of our positions that they have not chosen."""
    other, mine = theirs.sort(1).values, ours.sort(1).values
    places = torch.searchsorted(other, mine).clamp_max(other.shape[1] - 1)
    return (other.gather(1, places) != mine).float().mean().item()


def random_e4m3(gen: torch.Generator, device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=gen, device=device).to(torch.float8_e4m3fn)


def random_cache(pages: int, page: int, gen: torch.Generator, device: torch.device) -> torch.Tensor:
    """An indexer cache uint8 [pages, page, 1, 132] with scales from 2^-3 to 2^3."""
    keys = random_e4m3(gen, device, pages, page, HEAD_DIM)
    spread = torch.randn(pages, page, generator=gen, device=device) * 2
    return pack_indexer_cache(keys, torch.exp2(spread.round().clamp(-3, 3)))
