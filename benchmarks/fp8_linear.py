# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton GEMM for FP8 linear layers: its default, ours for M <= 8, and both against fp32.

Both configurations run at every M, so that it shows where each of them is the better one. Then
`vllm-sm12x tune` runs on one shape, and its file is read back by vLLM's own reader.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result
from vllm_sm12x.integration.fp8_config_files import SMALL_M, SMALL_M_CHANGES
from vllm_sm12x.tune import run_tune
from vllm_sm12x.tune.measure import GpuTrial, Linear, shared_memory
from vllm_sm12x.vllm_api import fp8_configs as stock

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BLOCK = (128, 128)
# DeepSeek-V4-Flash on one GPU, by vLLM's names. The tiny checkpoint has the same attention.
SHAPES = {
    "fused_wqa_wkv": (1536, 4096),
    "wq_b": (32768, 1024),
    "indexer.wq_b": (8192, 1024),
    "wo_b": (4096, 8192),
    "shared gate_up_proj": (4096, 4096),
    "shared down_proj": (4096, 2048),
}
MS = (1, 2, 4, 8, 16, 64)
TUNED = "indexer.wq_b"


def measure_shape(name: str, n: int, k: int, limit: int) -> list[dict[str, Any]]:
    """Both configurations at every M: microseconds, and errors to fp32."""
    linear = Linear(n, k, BLOCK)
    rows = []
    for m in MS:
        default = stock.launched_config(m, n, k, BLOCK, lambda *shape: None)
        small = {**default, **SMALL_M_CHANGES}
        trial = GpuTrial(linear, m, limit)
        judged = [trial.judge(config) for config in (default, small)]
        again = [trial.run(config) for config in (default, small)]
        default_us, small_us = trial.final_times([default, small])
        rows.append(
            {
                "layer": name,
                "n": n,
                "k": k,
                "m": m,
                "default_us": default_us,
                "small_us": small_us,
                "gain": default_us / small_us,
                "in_force": "small" if m <= SMALL_M else "default",
                "default_error": judged[0].error,
                "small_error": judged[1].error,
                "right": [one.right for one in judged],
                "bitwise_equal": torch.equal(*again),
            }
        )
    return rows


def tune_one(model: Path, folder: Path, seconds: float, console: Console) -> dict[str, Any]:
    """The whole path of `vllm-sm12x tune` for one shape, and what vLLM's own reader makes of it."""
    n, k = SHAPES[TUNED]
    status = run_tune(
        str(model), out=folder, ms="1,16", shape=f"{n}x{k}", time_limit=seconds, console=console
    )
    # vLLM's reader looks into a folder `configs` beside its module.
    reader = stock.fp8_utils.get_w8a8_block_fp8_configs.__wrapped__
    with mock.patch.object(stock.fp8_utils, "__file__", str(folder.parent / "fp8_utils.py")):
        read = reader(n, k, *BLOCK)
    notes = [json.loads(file.read_text()) for file in sorted(folder.glob("measured/*.json"))]
    return {"status": status, "read_by_vllm": read, "measured": notes}


def write_headers(folder: Path) -> Path:
    """A checkpoint with one FP8 layer, of the shape to tune: tuning reads nothing else of it."""
    from safetensors.torch import save_file

    n, k = SHAPES[TUNED]
    name = f"layers.2.attn.{TUNED}"
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    weight = torch.zeros(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.ones(n // BLOCK[0], k // BLOCK[1])
    save_file({f"{name}.weight": weight, f"{name}.scale": scales}, folder / "model.safetensors")
    return folder


@app.command()
def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    revision: Annotated[str | None, typer.Option(help="The commit of a tree without git.")] = None,
    tune_seconds: Annotated[float, typer.Option(help="For tuning; 0 leaves it out.")] = 30,
) -> None:
    """Measure, check, tune one shape. Exit status 1 if a result is wrong."""
    console = Console(width=140)
    machine = describe_machine(revision)
    console.print(machine_line(machine), markup=False, soft_wrap=True)
    torch.set_float32_matmul_precision("highest")
    limit = shared_memory()
    rows = [row for name, (n, k) in SHAPES.items() for row in measure_shape(name, n, k, limit)]
    columns = ("layer", "N", "K", "M", "default us", "small us", "gain", "in force", "error",
               "small error", "same bits")  # fmt: skip
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(
            row["layer"],
            str(row["n"]),
            str(row["k"]),
            str(row["m"]),
            f"{row['default_us']:.1f}",
            f"{row['small_us']:.1f}",
            f"{row['gain']:.2f}x",
            row["in_force"],
            f"{row['default_error']:.1e}" + ("" if row["right"][0] else " WRONG"),
            f"{row['small_error']:.1e}" + ("" if row["right"][1] else " WRONG"),
            "yes" if row["bitwise_equal"] else "no",
        )
    console.print(table)
    result: dict[str, Any] = {"shared_memory": limit, "rows": rows}
    if tune_seconds:
        with tempfile.TemporaryDirectory() as scratch:
            model, out = Path(scratch) / "model", Path(scratch) / "configs"
            model.mkdir()
            result["tune"] = tune_one(write_headers(model), out, tune_seconds, console)
    if json_path is not None:
        write_result(json_path, machine, **result)
    wrong = [f"{row['layer']} M={row['m']}" for row in rows if not all(row["right"])]
    if wrong:
        console.print(f"Outside the tolerance: {', '.join(wrong)}.", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
