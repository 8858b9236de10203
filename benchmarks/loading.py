# SPDX-License-Identifier: Apache-2.0
"""A checkpoint larger than memory, loaded cold: lazily, by vLLM's prefetch, and read ahead of.

Needs root and no GPU. The checkpoint lies on an ext4 file system of its own, in an image behind a
loop device with direct I/O, so that only its own page cache exists; it is mounted anew before each
load. vLLM's iterator reads it under a memory cgroup that this process joins after its imports: page
cache and buffers count, the libraries do not. Every tensor, or an eighth of it as one of eight
ranks takes, is copied out. Bytes are those that the loop device was asked for.
"""

import itertools
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MIB = 2**20
# What drives have by default; a loop device may have another value.
READ_AHEAD_KIB = 128
EXPERTS = 5
SHAPES = {"w1": (1024, 4096), "w2": (4096, 1024), "w3": (1024, 4096)}
MODES = ("lazy", "vLLM's prefetch", "ours", "ours, shared memory")


def write_checkpoint(folder: Path, shards: int) -> int:
    """Shards of some 62 MiB with the names, the dtypes' sizes and the order of MoE experts."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4 * MIB,), dtype=torch.uint8, generator=generator)
    for shard in range(shards):
        tensors = {}
        for expert, (name, (rows, columns)) in itertools.product(range(EXPERTS), SHAPES.items()):
            prefix = f"layers.{shard}.ffn.experts.{expert}.{name}"
            tensors[f"{prefix}.weight"] = noise.view(rows, columns).clone()
            tensors[f"{prefix}.scale"] = torch.ones(rows // 4, columns // 32)
        save_file(tensors, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors")
    os.sync()
    return sum(file.stat().st_size for file in folder.iterdir())


def command(*arguments: str | Path) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip()


class Disk:
    """A mounted ext4 file system in an image file."""

    def __init__(self, folder: Path, size: int, undo: ExitStack) -> None:
        image, self.path = folder / "disk.img", folder / "mounted"
        with image.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
        undo.callback(image.unlink)
        command("mkfs.ext4", "-q", "-F", "-m", "0", image)
        self.device = command("losetup", "--direct-io=on", "--find", "--show", image)
        undo.callback(command, "losetup", "--detach", self.device)
        self._block = Path("/sys/block", Path(self.device).name)
        (self._block / "queue/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
        self.path.mkdir()
        undo.callback(self.path.rmdir)
        command("mount", self.device, self.path)
        undo.callback(command, "umount", self.path)

    def forget(self) -> None:
        """Mount again: nothing of it is cached."""
        command("umount", self.path)
        command("mount", self.device, self.path)

    def bytes_read(self) -> int:
        return 512 * int((self._block / "stat").read_text().split()[2])


@contextmanager
def memory_limit(size: int) -> Iterator[Path]:
    """This process in a cgroup of its own (v2, else v1); yields the cgroup's folder."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    root = Path("/sys/fs/cgroup" if v2 else "/sys/fs/cgroup/memory")
    relative = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::" if v2 else "") and (v2 or ":memory:" in line)
    )
    before = root / relative.strip("/")
    group = root / f"vllm_sm12x_loading_{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(size))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def cached_bytes(group: Path) -> int:
    statistics_of = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(statistics_of.get("file") or statistics_of["cache"])


def wait_for_prefetch() -> None:
    """vLLM's background thread outlives the load, and must not read in the next one."""
    while any("_run_prefetch" in thread.name for thread in threading.enumerate()):
        time.sleep(0.1)


def copy_out(weights: Iterator[tuple[str, torch.Tensor]], ranks: int) -> int:
    """What a model does with the weights; returns the bytes copied."""
    targets: dict[Any, torch.Tensor] = {}
    copied = 0
    for name, tensor in weights:
        dimension = 1 if ".w2." in name else 0
        tensor = tensor.narrow(dimension, 0, tensor.shape[dimension] // ranks)
        target = targets.setdefault((tensor.shape, tensor.dtype), torch.empty_like(tensor))
        copied += target.copy_(tensor).nbytes
    return copied


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="On a drive, for the image.")] = Path("/var/tmp"),
    shards: Annotated[int, typer.Option(help="Of some 62 MiB each.")] = 40,
    limit_mib: Annotated[int, typer.Option(help="Memory for page cache and buffers.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Loads of each kind, taking turns.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Compare the ways to load. The exit status is 1 where ours is slower than vLLM's."""
    from vllm.model_executor.model_loader import weight_utils

    from vllm_sm12x.integration import loading

    console = Console()
    machine = describe_machine(revision)
    console.print(machine_line(machine), highlight=False)
    limit = limit_mib * MIB
    # vLLM looks at the root of the cgroup file system, as a container shows it, and not at ours.
    loading.stock.available_ram_bytes = lambda: limit
    options = {
        "safetensors_prefetch_num_threads": weight_utils.DEFAULT_SAFETENSORS_PREFETCH_NUM_THREADS,
        "safetensors_prefetch_block_size": weight_utils.DEFAULT_SAFETENSORS_PREFETCH_BLOCK_SIZE,
    }
    stock = weight_utils.safetensors_weights_iterator
    ways = dict(
        zip(
            MODES,
            (
                partial(stock, safetensors_load_strategy="lazy"),
                partial(stock, safetensors_load_strategy="prefetch"),
                partial(loading.weights, stock, memory_is_shared=False),
                partial(loading.weights, stock, memory_is_shared=True),
            ),
            strict=True,
        )
    )
    runs: list[dict[str, Any]] = []
    with ExitStack() as undo:
        work = Path(undo.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        disk = Disk(work, shards * 66 * MIB + 256 * MIB, undo)
        size = write_checkpoint(disk.path / "checkpoint", shards)
        files = sorted(map(str, (disk.path / "checkpoint").iterdir()))
        group = undo.enter_context(memory_limit(limit))
        for _, ranks, (mode, way) in itertools.product(range(repeats), (1, 8), ways.items()):
            disk.forget()
            before, start = disk.bytes_read(), time.perf_counter()
            copied = copy_out(way(files, False, **options), ranks)
            seconds, cached = time.perf_counter() - start, cached_bytes(group)
            wait_for_prefetch()
            run = {
                "mode": mode,
                "ranks": ranks,
                "seconds": seconds,
                "bytes_read": disk.bytes_read() - before,
                "bytes_copied": copied,
                "bytes_cached_at_end": cached,
            }
            runs.append(run)
    rows = summary(runs)
    table = Table("ranks", "mode", "seconds", "(min - max)", "read, MiB", "cached at the end, MiB")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            row["mode"],
            f"{row['seconds']:.1f}",
            f"{row['fastest']:.1f} - {row['slowest']:.1f}",
            f"{row['bytes_read'] / MIB:.0f}",
            f"{row['bytes_cached_at_end'] / MIB:.0f}",
        )
    console.print(f"checkpoint {size / MIB:.0f} MiB, memory limit {limit_mib} MiB")
    console.print(table)
    if json_path:
        write_result(
            json_path,
            machine,
            benchmark="loading",
            host={"kernel": os.uname().release, "cpus": os.cpu_count()},
            file_system="ext4",
            device_read_ahead_kib=READ_AHEAD_KIB,
            checkpoint_bytes=size,
            memory_limit_bytes=limit,
            options=options,
            summary=rows,
            runs=runs,
        )
    by_key = {(row["ranks"], row["mode"]): row for row in rows}
    ours = [by_key[ranks, mode] for ranks in (1, 8) for mode in MODES[2:]]
    others = {ranks: [by_key[ranks, mode] for mode in MODES[:2]] for ranks in (1, 8)}
    worse = any(
        row["seconds"] > min(other["seconds"] for other in others[row["ranks"]]) for row in ours
    )
    raise typer.Exit(1 if worse else 0)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the repeats of each kind, with the extremes of the time."""
    rows = []
    for ranks, mode in itertools.product((1, 8), MODES):
        same = [run for run in runs if (run["ranks"], run["mode"]) == (ranks, mode)]
        seconds = [run["seconds"] for run in same]
        medians = {
            key: statistics.median(run[key] for run in same)
            for key in ("seconds", "bytes_read", "bytes_copied", "bytes_cached_at_end")
        }
        rows.append(
            {
                "ranks": ranks,
                "mode": mode,
                **medians,
                "fastest": min(seconds),
                "slowest": max(seconds),
            }
        )
    return rows


if __name__ == "__main__":
    app()
