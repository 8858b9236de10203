# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x`: each command imports what it needs when it runs, so that `doctor` always can."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vllm_sm12x import __version__

app = typer.Typer(
    name="vllm-sm12x",
    help="DeepSeek V4 sparse attention for SM12x GPUs on stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """The options that belong to no command."""


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint's folder or id: what it would get here, and what fits."),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="With --model.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="With --model.")] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="With --model; else the largest that fits.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="With --model; else vLLM's default.")
    ] = None,
    recipes: Annotated[
        bool, typer.Option("--recipes", help="Add the commands that others serve with.")
    ] = False,
) -> None:
    """Show what the plugin does on this machine, and why. Exit 0 healthy, 1 degraded, 2 broken."""
    from vllm_sm12x.doctor import run_doctor
    from vllm_sm12x.preflight import Request

    request = None
    if model is not None:
        request = Request(
            model,
            tensor_parallel_size,
            pipeline_parallel_size,
            max_model_len,
            gpu_memory_utilization,
        )
    raise typer.Exit(run_doctor(as_json=json, request=request, recipes=recipes))


@app.command()
def demo() -> None:
    """Serve a tiny DeepSeek V4 and ask it something; without a GPU, check its attention path."""
    from vllm_sm12x.demo import run_demo

    raise typer.Exit(run_demo())


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops, as in sparse_mla; all.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="The result file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture to write, as in bench.png.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table as well.")] = False,
    show: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Print and draw this result; nothing is measured."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
    batch_invariant: Annotated[
        bool, typer.Option(help="Race ours also as under VLLM_BATCH_INVARIANT=1.")
    ] = False,
    as_sm12x: Annotated[
        bool, typer.Option(help="On a Hopper GPU: Triton kernels as SM12x would run them.")
    ] = False,
) -> None:
    """Race the ops against FlashMLA, DeepGEMM, FlashInfer and torch, as far as they run here."""
    from vllm_sm12x.bench import run_bench

    status = run_bench(
        ops or (),
        json_path=json,
        plot=plot,
        markdown=markdown,
        show=show,
        revision=revision,
        batch_invariant=batch_invariant,
        as_sm12x=as_sm12x,
    )
    raise typer.Exit(status)


class TinyModelName(str, Enum):
    """The models of `tiny_checkpoint.MODELS`."""

    DEEPSEEK_V4 = "deepseek-v4"
    QWEN3_NEXT = "qwen3-next"


@app.command("tiny-checkpoint")
def tiny_checkpoint(
    path: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[
        TinyModelName, typer.Option(help="deepseek-v4: 1.44 GB. qwen3-next (GDN): 0.93 GB.")
    ] = TinyModelName.DEEPSEEK_V4,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random weights.")] = 0,
    successors: Annotated[
        bool,
        typer.Option(
            "--successors",
            help="Every token has a likely successor that the MTP layer knows: most drafts are "
            "accepted. deepseek-v4 only.",
        ),
    ] = False,
) -> None:
    """Write a small checkpoint with random weights in a model's released format."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from vllm_sm12x.tiny_checkpoint import MODELS, write_tiny_checkpoint

    with Progress(BarColumn(), DownloadColumn(), TextColumn("{task.description}")) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        try:
            written = write_tiny_checkpoint(
                MODELS[model.value], path, seed=seed, successors=successors, progress=show
            )
        except (OSError, ValueError) as error:
            bar.stop()
            typer.echo(error, err=True)
            raise typer.Exit(1) from None
    typer.echo(written)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="As for `vllm serve`: shapes are those of one GPU.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write; by default where the plugin looks first."),
    ] = None,
    m: Annotated[
        str | None, typer.Option(help="Numbers of rows to tune for, as in 1,2,4,8.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Only this shape, as in 1536x4096.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep what an earlier run measured.")] = True,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Begin nothing after so many seconds.")
    ] = None,
    estimate: Annotated[bool, typer.Option(help="Only list what would be done; no GPU.")] = False,
) -> None:
    """Find the fastest configurations of vLLM's FP8 linear GEMM for a model, on this GPU."""
    from vllm_sm12x.tune import DEFAULT_MS, run_tune
    from vllm_sm12x.tune.errors import TuneError

    try:
        status = run_tune(
            model,
            tensor_parallel_size=tensor_parallel_size,
            out=out,
            ms=DEFAULT_MS if m is None else m,
            shape=shape,
            resume=resume,
            time_limit=time_limit,
            estimate=estimate,
        )
    except TuneError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(status)
