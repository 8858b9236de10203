# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x bench`: our ops against the best that this GPU has, in one process.

CUDA-graph replays that take turns, inputs rotated beyond L2, medians with their spread. Each result
is compared with the fp32 oracle and with the peers first; a row that is outside a tolerance gets no
time. Each row also says how near it is to what this GPU allows, by rates that are measured here.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_sm12x.bench.as_sm12x import run_as_sm12x
from vllm_sm12x.bench.attention import sparse_mla_cases
from vllm_sm12x.bench.case import Case
from vllm_sm12x.bench.indexer import mqa_logits_cases, paged_mqa_logits_cases, paged_mqa_topk_cases
from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result
from vllm_sm12x.bench.projections import (
    fp8_einsum_cases,
    hc_mix_cases,
    hc_post_prenorm_gemm_cases,
    hc_prenorm_gemm_cases,
)
from vllm_sm12x.bench.race import measure
from vllm_sm12x.bench.report import (
    COLUMNS,
    draw,
    markdown_table,
    obstacle_to_drawing,
    table_cells,
)
from vllm_sm12x.bench.timing import measured_rates
from vllm_sm12x.ops.hc_head.spec import HC_HEAD
from vllm_sm12x.ops.hc_post.spec import HC_POST
from vllm_sm12x.ops.hc_pre.spec import HC_PRE
from vllm_sm12x.vllm_api.peers import find_peers

INVARIANT = "ours, batch-invariant"
BENCHMARK = "ops"  # what a result file says that it is
CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "sparse_mla": sparse_mla_cases,
    "fp8_einsum": fp8_einsum_cases,
    "hc_prenorm_gemm": hc_prenorm_gemm_cases,
    "hc_pre": partial(hc_mix_cases, HC_PRE),
    "hc_post": partial(hc_mix_cases, HC_POST),
    "hc_post_prenorm_gemm": hc_post_prenorm_gemm_cases,
    "hc_head": partial(hc_mix_cases, HC_HEAD),
    "mqa_logits": mqa_logits_cases,
    "paged_mqa_logits": paged_mqa_logits_cases,
    "paged_mqa_topk": paged_mqa_topk_cases,
}


def run_bench(
    ops: Sequence[str],
    *,
    json_path: Path | None,
    plot: Path | None,
    markdown: bool,
    show: Path | None,
    revision: str | None,
    batch_invariant: bool = False,
    as_sm12x: bool = False,
) -> int:
    """The command; its exit status: 1 where a result is red or a floor missed, 2 where none can be.

    Args:
        ops: names of `CASES`; none: all.
        json_path, plot: files to write.
        markdown: print the table for a document as well.
        show: a result file to print and draw instead of measuring.
        batch_invariant: race ours also with a token's bits the same in any batch.
        as_sm12x: Triton kernels as SM12x would run them, on a GPU that is none.
    """
    console = Console(width=max(Console().width, 140))
    if unknown := [op for op in ops if op not in CASES]:
        console.print(f"[red]unknown op[/] {', '.join(unknown)}; there are {', '.join(CASES)}")
        return 2
    if plot and (obstacle := obstacle_to_drawing(plot)):
        console.print(escape(obstacle))
        return 2
    if show:
        result = json.loads(show.read_text(encoding="utf-8"))
        if result.get("benchmark") != BENCHMARK:
            console.print(f"{show} is no result of `vllm-sm12x bench`")
            return 2
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if as_sm12x:
            try:
                run_as_sm12x(device)
            except ValueError as error:
                console.print(f"[red]--as-sm12x:[/] {escape(str(error))}")
                return 2
        machine = describe_machine(revision) | {"triton_code": "SM12x" if as_sm12x else "native"}
        names = list(ops) or list(CASES)
        result = _race(console, device, machine, names, json_path, batch_invariant)
    else:
        console.print("[red]no NVIDIA GPU:[/] torch.cuda.is_available() is False")
        return 2
    if markdown:
        print(markdown_table(result["rows"]), end="")
    if plot:
        draw(result, plot)
        console.print(f"drawn: {plot}")
    return 1 if any(row["red"] or row["missed"] for row in result["rows"]) else 0


def _race(
    console: Console,
    device: torch.device,
    machine: dict[str, Any],
    ops: Sequence[str],
    json_path: Path | None,
    batch_invariant: bool,
) -> dict[str, Any]:
    """Measure; the file has what is done so far, should the run be cut short."""
    began = time.monotonic()
    console.print(machine_line(machine), highlight=False)
    if machine["triton_code"] == "SM12x":
        console.print("Triton kernels as SM12x would run them")
    peers = find_peers()
    for name, why in peers.absent.items():
        console.print(escape(f"no {name}: {why}"))
    rates = measured_rates()
    console.print(
        f"measured here: copy {rates['copy'] / 1e12:.2f} TB/s, 8192^3 matmul "
        f"{rates['bf16'] / 1e12:.0f} TFLOP/s in bf16, {rates['fp8'] / 1e12:.0f} in FP8"
    )
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": BENCHMARK,
        "title": machine_line(machine),
        "absent": peers.absent,
        "rates": rates,
        "rows": rows,
    }
    table = Table(*COLUMNS, title="medians ± IQR of CUDA-graph replays")
    for op in ops:
        for case in CASES[op](peers, device):
            if batch_invariant and case.invariant:
                case = replace(case, peers={**case.peers, INVARIANT: case.invariant})
            rows.append(measure(case, rates))
            cells = table_cells(rows[-1])
            table.add_row(*cells)
            line = " ".join(cell.replace("\n", ", ") for cell in cells)
            console.print(f"{time.monotonic() - began:5.0f} s {line}", soft_wrap=True)
            del case
            gc.collect()
            torch.cuda.empty_cache()
            if json_path:
                write_result(json_path, machine, **result)
    console.print(table)
    return result
