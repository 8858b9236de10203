# SPDX-License-Identifier: Apache-2.0
"""Two served engines on one GPU, in turns: time per decode step and per prefill token.

`engine.py` measures one engine after another, minutes apart, and a step of a small model is as long
as the host needs for it. Here both are up before the first point, and each point is measured of one
and at once of the other, in rounds that begin with either; one idles while the other works.
"""

import importlib
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from engine import (
    ProfilePoints,
    ProfilePrefills,
    bench,
    checkpoint_identity,
    distinct_prompts,
    measure,
    numbers,
    profile_all,
    profile_prefills,
    profiler_args,
    profiles_beside,
    random_prompts,
    server_args,
    wanted_profiles,
    whole_intervals,
)
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from server import Attention, Server, attention_env, check_startup, vllm_server
from serving import token_range

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

TIMES = {"decode_step_ms": "decode step ms", "prefill_us_per_token": "prefill us/token"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def turns(
    contexts: list[int], batches: list[int], rounds: int
) -> Iterator[tuple[int, int, int, int]]:
    """(round, context, batch, side) in order: each point of both sides before the next one.

    Batches within contexts, since a larger batch finds its prompts in the prefix cache.
    """
    for draw in range(rounds):
        for context in contexts:
            for batch in batches:
                for side in (0, 1) if draw % 2 == 0 else (1, 0):
                    yield draw, context, batch, side


def beside(measured: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Of each point the times of all rounds, [first side, second side], and the ratio's median.

    A ratio is of two times of one round. A point with a problem in any round has no times.
    """
    points: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for point in measured:
        points.setdefault((point["context"], point["batch"]), []).append(point)
    rows = []
    for (context, batch), of_point in points.items():
        row: dict[str, Any] = {"context": context, "batch": batch}
        for name in TIMES:
            times = [
                [p[name] for p in of_point if p["side"] == side and name in p] for side in (0, 1)
            ]
            if any(len(each) != rounds for each in times):
                continue
            ratios = [mine / other for mine, other in zip(*times, strict=True)]
            row[name] = times
            row[f"{name}_ratio"] = statistics.median(ratios)
            row[f"{name}_ratios"] = [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def result_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Medians of both sides, and the ratio with its lowest and highest value."""
    table = Table("context", "batch", title=title)
    for label in TIMES.values():
        table.add_column(label)
        table.add_column("ratio (lowest to highest)")
    for row in rows:
        cells = []
        for name in TIMES:
            if name not in row:
                cells += ["", ""]
                continue
            low, high = row[f"{name}_ratios"]
            cells.append(" / ".join(f"{statistics.median(times):.3f}" for times in row[name]))
            cells.append(f"{row[f'{name}_ratio']:.2f}x ({low:.2f} to {high:.2f})")
        table.add_row(f"{row['context']:,}", str(row["batch"]), *cells)
    return table


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    json_path: Annotated[Path, typer.Option("--json", help="The result file to write.")],
    first: Annotated[Attention, typer.Option(help="Whose times are divided.")] = Attention.OURS,
    second: Annotated[Attention, typer.Option(help="By whose.")] = Attention.STOCK,
    contexts: Annotated[str, typer.Option(help="Prompt lengths.")] = "1024,32768",
    batches: Annotated[str, typer.Option(help="Requests at a time.")] = "1,32",
    rounds: Annotated[int, typer.Option(min=1, help="How often each point is measured.")] = 4,
    output_len: Annotated[int, typer.Option(min=65, help="Tokens of an answer.")] = 257,
    own_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of a point, beyond which requests share.")
    ] = 2**18,
    profile_points: ProfilePoints = None,
    prefill_contexts: ProfilePrefills = None,
    mtp: Annotated[int, typer.Option(min=0, help="Speculative tokens of the MTP layer.")] = 0,
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache of each engine.")] = 16,
    limit: Annotated[float, typer.Option(help="Seconds until both must be healthy.")] = 600,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After --: for vllm serve.")] = None,
) -> None:
    """Serve MODEL twice and time both in turns. Exit status 1 if anything is wrong.

    Both engines and their KV caches have to fit on the GPU together.
    """
    console = Console(file=sys.stdout)
    lengths, sizes = numbers(contexts), numbers(batches)
    profiled, prefills = wanted_profiles(profile_points, prefill_contexts, lengths, sizes)
    labels = (first, second)
    machine = describe_machine(revision)
    if Attention.PROXY in labels:
        machine["label"] = "proxy"
    console.print(machine_line(machine), highlight=False)
    args = [
        *server_args(lengths, sizes, mtp=mtp),
        *("--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))),
        *(vllm_args or ()),
    ]
    json_path.parent.mkdir(parents=True, exist_ok=True)
    bench_log = json_path.with_suffix(".bench.log")
    bench_log.write_text("")
    threading.Thread(target=importlib.import_module, args=("vllm.benchmarks.serve",)).start()
    measured: list[dict[str, Any]] = []
    problems: list[str] = []
    # Of each side.
    profiles: list[list[dict[str, Any]]] = [[], []]
    prefill_profiles: list[list[dict[str, Any]]] = [[], []]
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in labels]
        logs = [json_path.with_suffix(f".{i}.{label.value}.log") for i, label in enumerate(labels)]
        starting = [
            vllm_server(
                model,
                log=log,
                args=[*args, *(profiler_args(folder) if profiled or prefills else ())],
                env=attention_env(label),
                limit_seconds=limit,
            )
            for label, log, folder in zip(labels, logs, folders, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            servers: list[Server] = list(pool.map(stack.enter_context, starting))
        for label, server in zip(labels, servers, strict=True):
            console.print(f"{label.value}: healthy after {server.startup_seconds:.0f} s")
            problems += check_startup(server.startup_log, attention=label, cudagraphs=True)
        tokens = token_range(model)

        def write() -> None:
            write_result(
                json_path,
                machine,
                benchmark="engine race",
                attention=[label.value for label in labels],
                mtp=mtp,
                rounds=rounds,
                checkpoint=checkpoint_identity(model),
                vllm_args=args,
                startup_seconds=[round(server.startup_seconds, 1) for server in servers],
                points=beside(measured, rounds),
                measured=measured,
                profiles=profiles,
                prefill_profiles=prefill_profiles,
                problems=problems,
            )

        # Whatever ends it, what was measured before is written.
        try:
            # What a first request compiles or allocates, readiness.py measures.
            for context in lengths:
                for server in servers:
                    warm = random_prompts(1, context, tokens, rounds)
                    bench(server, warm, answer=output_len, concurrency=1, log=bench_log)
            order = list(turns(lengths, sizes, rounds))
            for draw, context, batch, side in track(order, "in turns", console=console):
                share = distinct_prompts(batch, context, own_tokens)
                point = measure(
                    servers[side],
                    random_prompts(share, context, tokens, draw),
                    batch=batch,
                    answer=whole_intervals(output_len),
                    log=bench_log,
                )
                measured.append({"round": draw, "side": side, **point})
                where = (
                    f"{labels[side].value}, round {draw + 1}, context {context:,}, batch {batch}"
                )
                problems += [f"{where}: {problem}" for problem in point["problems"]]
                write()
            # After all times: once it has run, vLLM's profiler marks every step.
            for side, server in enumerate(servers):
                of_last_round = [
                    p for p in measured if (p["round"], p["side"]) == (rounds - 1, side)
                ]
                for kernels in profile_all(
                    server,
                    [p for p in of_last_round if (p["context"], p["batch"]) in profiled],
                    folders[side],
                    prompts=lambda p: random_prompts(
                        p["distinct_prompts"], p["context"], tokens, rounds - 1
                    ),
                    log=bench_log,
                    began=console.print,
                ):
                    profiles[side].append(kernels)
                    write()
                for kernels in profile_prefills(
                    server,
                    prefills,
                    folders[side],
                    prompt=lambda context: random_prompts(1, context, tokens, rounds + 1)[0],
                    log=bench_log,
                    began=console.print,
                ):
                    prefill_profiles[side].append(kernels)
                    write()
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        for label, server in zip(labels, servers, strict=True):
            problems += [f"{label.value}: {problem}" for problem in server.problems()]
        write()

    drafts = f", {mtp} draft tokens" if mtp else ""
    title = f"{first.value} / {second.value}, medians of {rounds} rounds{drafts}"
    console.print(result_table(beside(measured, rounds), title))
    profiles_beside(*profiles, "step", console)
    profiles_beside(*prefill_profiles, "token", console)
    for problem in problems:
        console.print(f"[red]wrong:[/] {escape(problem)}", highlight=False)
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()
