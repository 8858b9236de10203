# SPDX-License-Identifier: Apache-2.0
"""Races sparse_mla against FlashMLA's flash_mla_with_kvcache, in one process, by CUDA graphs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import describe_machine, machine_line, write_result
from rich.console import Console
from rich.table import Table
from timing import interleaved

from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

INPUT_SETS = 3  # caches of 65,536 rows each, so that one set's rows push another's out of L2
Call = Callable[[], torch.Tensor]


def ours(inputs: dict[str, Any]) -> Call:
    """A call of sparse_mla that allocates nothing for its output."""
    out = torch.empty_like(inputs["q"])
    return lambda: SPARSE_MLA.function(**inputs, out=out)


def flash_mla(interface: Any, inputs: dict[str, Any]) -> Call:
    """The same call of FlashMLA: tokens as a batch of single-token queries, one cache head."""
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


def flash_mla_interface(heads: int) -> Any | str:
    """vLLM's FlashMLA module, or in words why it cannot be timed here."""
    if heads not in (64, 128):
        return f"FlashMLA takes 64 or 128 heads, not {heads}"
    try:
        from vllm.third_party.flashmla import flash_mla_interface as interface
        from vllm.v1.attention.ops.flashmla import is_flashmla_sparse_supported
    except ImportError as error:
        return f"FlashMLA cannot be imported: {error}"
    supported, reason = is_flashmla_sparse_supported()
    return interface if supported else f"FlashMLA does not run here: {reason}"


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.float() - expected).norm() / expected.norm()).item()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of an elementwise kernel over 1 GiB.

    Not of `copy_`: in a graph that is a memcpy node, which on an H200 ran at 2.8 TB/s only.
    """
    source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    timing = interleaved({"copy": [lambda: torch.neg(source, out=target)]}, calls=4, rounds=10)
    return 2 * source.nbytes / timing["copy"].median_us * 1e6


def matmul_rate() -> float:
    """FLOP a second of an 8192^3 bf16 matmul."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    timing = interleaved({"matmul": [lambda: torch.mm(a, b, out=out)]}, calls=4, rounds=10)
    return 2 * 8192**3 / timing["matmul"].median_us * 1e6


def measure(shape: Any, interface: Any | str, rates: dict[str, float]) -> dict[str, Any]:
    """One row: errors of every input set first, times only for what is within the tolerance."""
    sets = [SPARSE_MLA.inputs(shape, device="cuda", seed=seed) for seed in range(INPUT_SETS)]
    variants: dict[str, list[Call]] = {"ours": [ours(inputs) for inputs in sets]}
    if not isinstance(interface, str):
        variants["flash_mla"] = [flash_mla(interface, inputs) for inputs in sets]
    errors = dict.fromkeys(variants, 0.0)
    for i, inputs in enumerate(sets):
        expected = SPARSE_MLA.oracle(**inputs)
        for name, calls in variants.items():
            errors[name] = max(errors[name], relative_error(calls[i](), expected))
        del expected
    green = [name for name, error in errors.items() if error <= SPARSE_MLA.tolerance]
    timings = interleaved({name: variants[name] for name in green})
    floor_us = max(shape.bytes / rates["copy"], shape.flops / rates["matmul"]) * 1e6
    return {
        "tokens": shape.tokens,
        "heads": shape.heads,
        "candidates": [shape.swa, shape.extra],
        "error": errors,
        "red": [name for name in errors if name not in green],
        "median_us": {name: timing.median_us for name, timing in timings.items()},
        "iqr_us": {name: timing.iqr_us for name, timing in timings.items()},
        "flops": shape.flops,
        "bytes": shape.bytes,
        "floor_us": floor_us,
    }


def table_cells(row: dict[str, Any]) -> list[str]:
    """The row as the table prints it."""
    medians, spreads = row["median_us"], row["iqr_us"]

    def microseconds(name: str) -> str:
        if name in row["red"]:
            return f"[red]error {row['error'][name]:.1e}[/]"
        return f"{medians[name]:.1f} ± {spreads[name]:.1f}" if name in medians else "-"

    both, mine = len(medians) == 2, medians.get("ours")
    swa, extra = row["candidates"]
    return [
        str(row["tokens"]),
        f"{swa}+{extra}" if extra else str(swa),
        " / ".join(f"{error:.1e}" for error in row["error"].values()),
        microseconds("ours"),
        microseconds("flash_mla"),
        f"{mine / medians['flash_mla']:.2f}" if both else "-",
        f"{row['flops'] / mine / 1e6:.0f}" if mine else "-",
        f"{row['floor_us'] / mine:.0%}" if mine else "-",
    ]


@app.command()
def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
    heads: Annotated[int, typer.Option(min=1, max=128, help="FlashMLA takes 64 and 128.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Time every bench shape of sparse_mla. Exit status 1 if a result is outside the tolerance."""
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("[red]no NVIDIA GPU:[/] torch.cuda.is_available() is False")
        raise typer.Exit(2)
    machine = describe_machine(revision)
    console.print(machine_line(machine), highlight=False)
    interface = flash_mla_interface(heads)
    if isinstance(interface, str):
        console.print(f"{interface}: only sparse_mla is timed")
    rates = {"copy": copy_bandwidth(), "matmul": matmul_rate()}
    console.print(
        f"measured here: copy {rates['copy'] / 1e12:.2f} TB/s, "
        f"8192^3 bf16 matmul {rates['matmul'] / 1e12:.0f} TFLOP/s"
    )
    table = Table(
        *("T", "candidates", "errors", "ours us", "FlashMLA us", "ours/FlashMLA"),
        *("TFLOP/s", "floor/ours"),
        title=f"sparse_mla, {heads} heads: median ± IQR of CUDA-graph replays",
    )
    rows = []
    for shape in SPARSE_MLA.bench:
        rows.append(measure(dataclasses.replace(shape, heads=heads), interface, rates))
        table.add_row(*table_cells(rows[-1]))
        console.print(" ".join(table_cells(rows[-1])))  # a run that is cut short leaves these
    console.print(table)
    if json_path:
        write_result(
            json_path,
            machine,
            benchmark="sparse_mla",
            tolerance=SPARSE_MLA.tolerance,
            flash_mla=interface if isinstance(interface, str) else "timed",
            copy_bytes_per_second=rates["copy"],
            matmul_flops_per_second=rates["matmul"],
            rows=rows,
        )
    raise typer.Exit(1 if any(row["red"] for row in rows) else 0)


if __name__ == "__main__":
    app()
