# SPDX-License-Identifier: Apache-2.0
"""What `vllm-sm12x doctor --model` estimates, against what a `vllm serve` log of this machine says.

Give the same parallelism, length and utilization as the server had. The estimate runs in a process
of its own; the exit status is 1 where it could not be made or the log says nothing.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# What vLLM logs at start, on all supported releases; of several ranks the largest counts.
REPORTED = {
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "kv_cache_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "cuda_graphs_gib": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    "kv_cache_tokens": r"KV cache size: ([\d,]+) tokens",
    "max_model_len": r"Maximum concurrency for ([\d,]+) tokens per request",
    "concurrency": r"tokens per request: ([\d.]+)x",
}


def reported(log: str) -> dict[str, float]:
    """The figures of a server's log, by the names of REPORTED; absent where it has none."""
    found = {name: re.findall(pattern, log) for name, pattern in REPORTED.items()}
    return {
        name: max(float(text.replace(",", "")) for text in texts)
        for name, texts in found.items()
        if texts
    }


def estimated(doctor: dict[str, Any]) -> dict[str, float]:
    """The same figures of the doctor's report, for those that it estimates."""
    memory = doctor["preflight"]["memory"]
    figures = {
        "weights_gib": memory["weights_bytes"] / 2**30,
        "kv_cache_gib": memory["kv_cache_bytes"] / 2**30,
        "kv_cache_tokens": memory.get("kv_cache_tokens"),
        "max_model_len": memory.get("max_model_len"),
        "concurrency": memory.get("concurrency"),
    }
    return {name: value for name, value in figures.items() if value is not None}


@app.command()
def main(
    log: Annotated[Path, typer.Argument(help="The log of `vllm serve`.")],
    model: Annotated[str, typer.Option(help="The checkpoint that it served.")],
    tensor_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option()] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Print both, with the ratio, and the overhead that the log implies."""
    console = Console()
    said = reported(log.read_text(errors="replace"))
    length = max_model_len or (int(said["max_model_len"]) if "max_model_len" in said else None)
    options: dict[str, Any] = {
        "--tensor-parallel-size": tensor_parallel_size,
        "--pipeline-parallel-size": pipeline_parallel_size,
        "--max-model-len": length,
        "--gpu-memory-utilization": gpu_memory_utilization,
    }
    command = [sys.executable, "-m", "vllm_sm12x", "doctor", "--json", "--model", model]
    for name, value in options.items():
        command += [] if value is None else [name, str(value)]
    finished = subprocess.run(command, capture_output=True, text=True)
    try:
        doctor = json.loads(finished.stdout)
        estimate = estimated(doctor)
    except (ValueError, KeyError, TypeError):
        console.print(finished.stdout[-2000:], finished.stderr[-2000:])
        raise typer.Exit(1) from None
    memory = doctor["preflight"]["memory"]
    machine = describe_machine(revision)
    console.print(machine_line(machine))
    table = Table("figure", "estimated", "reported", "estimated / reported")
    for name in REPORTED:
        ours, theirs = estimate.get(name), said.get(name)
        ratio = f"{ours / theirs:.3f}" if ours is not None and theirs else "-"
        cells = ["-" if one is None else f"{one:,.2f}" for one in (ours, theirs)]
        table.add_row(name, *cells, ratio)
    console.print(table)
    implied = None
    if {"weights_gib", "kv_cache_gib"} <= said.keys():
        share = memory["gpu_bytes"] * memory["gpu_memory_utilization"] / 2**30
        implied = share - said["weights_gib"] - said["kv_cache_gib"]
        console.print(
            f"overhead: {memory['overhead_bytes'] / 2**30:.2f} GiB estimated, {implied:.2f} implied"
        )
    if json_path is not None:
        write_result(
            json_path,
            machine,
            benchmark="preflight",
            options=options,
            estimated=estimate,
            reported=said,
            overhead_gib={"estimated": memory["overhead_bytes"] / 2**30, "implied": implied},
            findings=doctor["findings"],
        )
    raise typer.Exit(0 if said else 1)


if __name__ == "__main__":
    app()
