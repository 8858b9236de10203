# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x tune`: the fastest configurations of vLLM's FP8 linear GEMM for a model, on this GPU.

Nothing heavy is imported before it is needed: `--estimate` runs on any machine.
"""

import re
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sm12x import device
from vllm_sm12x.tune.errors import TuneError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_sm12x.integration.fp8_config_files import Config
    from vllm_sm12x.tune.records import Records
    from vllm_sm12x.tune.shapes import Model, Shape

DEFAULT_MS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
LARGEST_ALLOWED_M = 65536
# The exit status of a program that an interrupt ended.
INTERRUPTED = 130


def run_tune(
    model: str,
    *,
    tensor_parallel_size: int = 1,
    out: Path | None = None,
    ms: str = DEFAULT_MS,
    shape: str | None = None,
    resume: bool = True,
    time_limit: float | None = None,
    estimate: bool = False,
    console: "Console | None" = None,
) -> int:
    """Tune, or with `estimate` only say what would be done, and return the exit status.

    Args:
        model: a folder, or a name of the Hugging Face hub.
        tensor_parallel_size: GPUs that vLLM shards the model over.
        out: the folder for the files; where the plugin looks for them first, if None.
        ms: numbers of rows, separated by commas.
        shape: NxK, to tune one of the model's shapes.
        resume: keep what an earlier run in that folder measured.
        time_limit: seconds after which no further candidate is begun.

    Raises TuneError.
    """
    from rich.console import Console

    from vllm_sm12x.integration.fp8_config_files import user_folders
    from vllm_sm12x.tune.shapes import read_model

    console = console or Console()
    rows = _numbers_of_rows(ms)
    read = read_model(model, tensor_parallel_size)
    shapes = _chosen(read, shape)
    folder = user_folders()[0] if out is None else out.expanduser()
    for each in shapes:
        if not each.by_rule:
            console.print(
                f"No rule is known for {', '.join(each.layers)}: taken as stored, "
                f"{each.n} x {each.k}, not merged and not sharded.",
                markup=False,
            )
    found = device.first_visible_device()
    if estimate:
        _print_estimate(console, read, shapes, rows, folder, found)
        return 0
    if isinstance(found, device.NoDevice):
        raise TuneError(
            f"Tuning needs an NVIDIA GPU, and there is none to use ({found.reason}); --estimate "
            "lists what would be tuned."
        )
    if found.capability < (8, 9):
        raise TuneError(
            "{} is SM {}.{}, and vLLM's FP8 GEMM needs SM 8.9 or later.".format(
                found.name, *found.capability
            )
        )
    from vllm_sm12x.tune.records import check_writable

    check_writable(folder)
    stop_at = None if time_limit is None else time.monotonic() + time_limit
    try:
        _tune(console, read, shapes, rows, folder, resume, stop_at)
    except KeyboardInterrupt:
        console.print(
            f"Stopped. What was finished is in {folder}; the same command goes on from there.",
            markup=False,
        )
        return INTERRUPTED
    _say_who_reads(console, folder, found)
    return 0


def _numbers_of_rows(ms: str) -> tuple[int, ...]:
    parts = [part.strip() for part in ms.split(",") if part.strip()]
    if not parts or any(
        not part.isdecimal() or not 1 <= int(part) <= LARGEST_ALLOWED_M for part in parts
    ):
        raise TuneError(
            f"--m {ms!r} is not valid: allowed are integers from 1 to {LARGEST_ALLOWED_M}, "
            "separated by commas."
        )
    return tuple(sorted({int(part) for part in parts}))


def _chosen(model: "Model", shape: str | None) -> "Sequence[Shape]":
    if shape is None:
        return model.shapes
    wanted = re.fullmatch(r"(\d+)x(\d+)", shape)
    chosen = [
        each
        for each in model.shapes
        if wanted and (each.n, each.k) == (int(wanted[1]), int(wanted[2]))
    ]
    if not chosen:
        allowed = ", ".join(f"{each.n}x{each.k}" for each in model.shapes)
        raise TuneError(f"--shape {shape} is none of {model.name}; allowed is {allowed}.")
    return chosen


def _print_estimate(
    console: "Console",
    model: "Model",
    shapes: "Sequence[Shape]",
    rows: Sequence[int],
    folder: Path,
    found: device.Device | device.NoDevice,
) -> None:
    from rich import box
    from rich.table import Table

    from vllm_sm12x.integration.fp8_config_files import as_in_file_names, file_name
    from vllm_sm12x.tune.space import candidates

    named = isinstance(found, device.Device)
    name = as_in_file_names(found.name) if isinstance(found, device.Device) else "<this GPU>"
    table = Table("N", "K", "layers", "candidates", "cannot fit", box=box.SIMPLE)
    for each in shapes:
        tried = [candidates(m, model.block, device.SM12X_SHARED_MEMORY_BYTES) for m in rows]
        table.add_row(
            str(each.n),
            str(each.k),
            ", ".join(each.layers),
            str(sum(len(configs) for configs, _ in tried)),
            str(sum(too_large for _, too_large in tried)),
        )
    console.print(table)
    console.print(f"M: {', '.join(map(str, rows))}", markup=False)
    console.print("Files:" if named else "Files, on a machine with a GPU:", markup=False)
    for each in shapes:
        file = folder / file_name(name, each.n, each.k, *model.block)
        console.print(str(file), markup=False, soft_wrap=True, highlight=False)


def _tune(
    console: "Console",
    model: "Model",
    shapes: "Sequence[Shape]",
    rows: Sequence[int],
    folder: Path,
    resume: bool,
    stop_at: float | None,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console.print("Importing vLLM ...", markup=False)
    import torch

    from vllm_sm12x.integration.fp8_config_files import as_in_file_names, default_config
    from vllm_sm12x.tune import measure
    from vllm_sm12x.tune.search import best_for
    from vllm_sm12x.tune.space import candidates, regrouped
    from vllm_sm12x.vllm_api import fp8_configs as stock
    from vllm_sm12x.vllm_api.envs import batch_invariant

    if batch_invariant():
        raise TuneError(
            "VLLM_BATCH_INVARIANT is set, with which vLLM's GEMM reads no configurations: unset it "
            "to tune."
        )
    # The oracle is fp32, not TF32.
    torch.set_float32_matmul_precision("highest")
    limit = measure.shared_memory()
    spaces = {m: candidates(m, model.block, limit) for m in rows}
    made_with = {
        "gpu": as_in_file_names(stock.device_name()),
        "shared_memory": limit,
        **_versions(),
    }
    records = [_records(folder, shape, model.block, made_with, resume) for shape in shapes]
    jobs = [
        (shape, of_shape, m)
        for shape, of_shape in zip(shapes, records, strict=True)
        for m in rows
        if m not in of_shape.by_m or not of_shape.by_m[m].complete
    ]
    of_all = len(shapes) * len(rows)
    if len(jobs) < of_all:
        there = of_all - len(jobs)
        console.print(f"{there} of {of_all} are there from an earlier run.", markup=False)

    def time_is_up() -> bool:
        return stop_at is not None and time.monotonic() >= stop_at

    linear: measure.Linear | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=sum(len(spaces[m][0]) for _, _, m in jobs))
        for shape, of_shape, m in jobs:
            if time_is_up():
                break
            bar.update(task, description=f"N={shape.n} K={shape.k} M={m}")
            if linear is None or (linear.n, linear.k) != (shape.n, shape.k):
                linear = None  # gives its memory back first
                linear = measure.Linear(shape.n, shape.k, model.block)
            default = stock.launched_config(m, shape.n, shape.k, model.block, _nothing)
            configs, too_large = spaces[m]
            measured = best_for(
                measure.GpuTrial(linear, m, limit),
                default_config(default, m),
                configs,
                partial(regrouped, m=m),
                too_large,
                time_is_up=time_is_up,
                advance=partial(bar.advance, task),
            )
            if measured is not None:
                of_shape.add(m, measured, default)
    _print_results(console, shapes, records)
    if time_is_up():
        console.print("The time was up; the same command goes on from here.", markup=False)


def _nothing(*shape: int) -> None:
    """A look-up that finds no file."""


def _records(
    folder: Path, shape: "Shape", block: tuple[int, int], made_with: dict[str, Any], resume: bool
) -> "Records":
    from vllm_sm12x.integration.fp8_config_files import file_name
    from vllm_sm12x.tune.records import Records

    path = folder / file_name(made_with["gpu"], shape.n, shape.k, *block)
    records = Records(path, made_with)
    if resume:
        records.read()
    return records


def _versions() -> dict[str, str]:
    """What the speed of a configuration depends on, besides the GPU."""
    return {name: metadata.version(name) for name in ("vllm", "triton")}


def _print_results(
    console: "Console", shapes: "Sequence[Shape]", records: "Sequence[Records]"
) -> None:
    from rich import box
    from rich.table import Table

    columns = (
        "N",
        "K",
        "M",
        "default us",
        "tuned us",
        "gain",
        "tried",
        "no fit",
        "wrong",
        "config",
    )
    table = Table(*columns, box=box.SIMPLE)
    wrong_defaults = []
    for shape, of_shape in zip(shapes, records, strict=True):
        for m, one in sorted(of_shape.by_m.items()):
            table.add_row(
                str(shape.n),
                str(shape.k),
                str(m),
                f"{one.default_us:.1f}" + ("" if one.default_is_right else " WRONG"),
                f"{one.tuned_us:.1f}",
                f"{one.default_us / one.tuned_us:.2f}x",
                f"{one.tried}" + ("" if one.complete else " (time up)"),
                str(one.did_not_fit),
                str(one.wrong),
                short(one.config) if one.tuned_us != one.default_us else "default",
            )
            if not one.default_is_right:
                wrong_defaults.append(f"N={shape.n} K={shape.k} M={m}")
    console.print(table)
    if wrong_defaults:
        console.print(
            f"The default's results are outside the tolerance for {', '.join(wrong_defaults)}.",
            markup=False,
        )


def short(config: "Config") -> str:
    """A configuration in the order M x N x K, group, warps, stages."""
    tiles = "x".join(str(config[f"BLOCK_SIZE_{axis}"]) for axis in "MNK")
    group, warps, stages = (config[key] for key in ("GROUP_SIZE_M", "num_warps", "num_stages"))
    return f"{tiles} g{group} w{warps} s{stages}"


def _say_who_reads(console: "Console", folder: Path, found: device.Device) -> None:
    from vllm_sm12x.integration.fp8_config_files import user_folders

    if folder.resolve() not in [one.resolve() for one in user_folders()]:
        where = f"VLLM_TUNED_CONFIG_FOLDER={folder} has the files read"
    else:
        where = f"The files in {folder} are read"
    console.print(
        f"{where} wherever vLLM takes its Triton GEMM for FP8 linear layers (--linear-backend "
        "triton), on SM12x with this plugin.",
        markup=False,
        soft_wrap=True,
    )
    capability: Any = device.effective_capability(found)
    if capability[0] != 12:
        console.print(
            f"{found.name} is not SM12x, where the plugin leaves vLLM's configurations as they "
            "are: nobody reads these files here.",
            markup=False,
            soft_wrap=True,
        )
