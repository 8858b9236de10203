# SPDX-License-Identifier: Apache-2.0
"""Time per decode step and per prefill token of a served model, and what the GPU spends it on.

`run` serves a checkpoint once and asks it for every context at every batch, with the client of
`vllm bench serve`. `compare` sets two such runs beside each other: ours against stock.
"""

import asyncio
import contextlib
import gzip
import hashlib
import http.client
import importlib
import json
import math
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from server import MODEL_NAME, Attention, Server, attention_env, check_startup, vllm_server
from serving import token_range

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

MAX_NUM_BATCHED_TOKENS = 8192
# Token by token, 64 streams may cost the front end more than a step takes on the GPU.
STREAM_INTERVAL = 8
# Prompts of a context, one after another, whose prefill is timed.
PREFILLS = 3
# How many events of each stream the median needs at least, with all of the batch decoding.
ENOUGH_GAPS = 8
# Answers get longer until the last request of a batch comes before the first one ends.
LONGEST_ANSWER = 8193
ATTEMPTS = 3

PROFILED_STEPS = 20
# The steps that pass until the profiler runs, and those that it records.
PROFILED_ANSWER = 1024
LISTED_KERNELS = 40
COMPARED_ROWS = 40

ProfilePoints = Annotated[
    list[str] | None,
    typer.Option("--profile", help="CONTEXTxBATCH to list the kernels of; repeatable."),
]
ProfilePrefills = Annotated[
    list[int] | None,
    typer.Option("--profile-prefill", help="CONTEXT to list the prefill's kernels of; repeatable."),
]

# The first pattern that a kernel's name has, in lower case, decides. Names are those of this
# plugin, vLLM, FlashMLA, FlashInfer, DeepGEMM, TileLang, cuBLAS, CUTLASS and torch.
GROUPS = {
    "hyper-connections": r"(^|_|:)m?hc_|hyper_conn|sinkhorn|split_terms",
    "fp8_einsum": r"einsum|bhr_hdr|bhd_hdr",
    "moe": r"moe|expert|marlin|grouped|topk_(soft|hash|gating)|routing|matmul_ogs",
    "cache, rope, norm, quantization": (
        r"compress|rope|rotary|norm|quant|insert|gather|cache|partial_states|swa_ind"
        r"|topk_(lens|indices|metadata|swa|ragged)|silu|swiglu"
    ),
    "indexer": r"mqa_logits|mqa_topk|merge_splits|indexer|persistent_topk|topkper|top_k_per_row",
    "attention": r"mla|flash_?fwd|flash_?attn|fmha|split_?kv|sparse_attn",
    "gemm": r"gemm|gemv|cutlass|cublas|nvjet|scaled_mm|block_scaled|splitk_?reduce|matmul",
    "copies": r"^mem(cpy|set)",
}
OTHER = "other"
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events

# vLLM's name of a step: requests without an output token yet and their tokens in this step, then
# the other requests and theirs.
_STEP = re.compile(r"execute_context_(\d+)\((\d+)\)_generation_(\d+)\(\d+\)")
# A token's share of a kernel is small.
DECIMALS = {"step": 1, "token": 3}
SAME_MACHINE = ("gpu", "gpus", "capability", "driver")
VERSIONS = ("cuda", "torch", "triton", "vllm")


def checkpoint_identity(model: Path) -> str:
    """A hash of its JSON files and of the names and sizes of its weights.

    A tiny checkpoint's seed, and whether its drafts hit, are in a JSON file of their own.
    """
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.json")):
        digest.update(file.read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def random_prompts(count: int, context: int, tokens: range, draw: int = 0) -> list[list[int]]:
    """Token ids. Prompts of different contexts, or of another draw, share no beginning."""
    rng = np.random.default_rng((context, draw))
    return rng.integers(tokens.start, tokens.stop, (count, context)).tolist()


def server_args(
    contexts: list[int],
    batches: list[int],
    *,
    mtp: int,
    cudagraph_mode: str | None = None,
    enforce_eager: bool = False,
) -> list[str]:
    """Options of `vllm serve` for these points, in ascending order."""
    args = [
        *("--max-model-len", str(contexts[-1] + LONGEST_ANSWER)),
        *("--max-num-seqs", str(batches[-1])),
        *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
        *("--stream-interval", str(STREAM_INTERVAL)),
    ]
    if enforce_eager:
        args.append("--enforce-eager")
    if cudagraph_mode:
        args += ["--compilation-config", json.dumps({"cudagraph_mode": cudagraph_mode})]
    if mtp:
        speculative = {"method": "mtp", "num_speculative_tokens": mtp}
        args += ["--speculative-config", json.dumps(speculative)]
    return args


def distinct_prompts(batch: int, context: int, own_tokens: int) -> int:
    """How many prompts the requests of a point have together, in `own_tokens` tokens."""
    return PREFILLS if batch == 1 else min(batch, max(1, own_tokens // context))


def whole_intervals(answer: int) -> int:
    """At least `answer` tokens, that after the first one come in whole events of a stream."""
    return 1 + STREAM_INTERVAL * math.ceil((answer - 1) / STREAM_INTERVAL)


def bench(
    server: Server, prompts: list[list[int]], *, answer: int, concurrency: int, log: Path
) -> dict[str, Any]:
    """What `vllm bench serve --save-detailed` reports of one request for each prompt.

    Its command takes text, which the server would tokenize prompt by prompt, and takes longer to
    start than a point to measure: so its client is called here, and prints into `log`.
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    base_url = f"http://127.0.0.1:{server.port}"
    coroutine = benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"{base_url}/v1/completions",
        base_url=base_url,
        model_id=MODEL_NAME,
        model_name=MODEL_NAME,
        tokenizer=None,
        input_requests=[
            SampleRequest(prompt=prompt, prompt_len=len(prompt), expected_output_len=answer)
            for prompt in prompts
        ],
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=["ttft", "tpot", "itl"],
        selected_percentiles=[99.0],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body=None,
        ready_check_timeout_sec=0,
    )
    with log.open("a", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        return asyncio.run(coroutine)


def failures(result: dict[str, Any], answer: int) -> list[str]:
    """What is wrong with the answers that vLLM's client reports, in words."""
    asked = len(result["errors"])
    if result["completed"] < asked:
        why = next((error for error in result["errors"] if error), "no reason given")
        last_lines = "\n".join(why.splitlines()[-8:])
        return [f"{asked - result['completed']} of {asked} requests failed: {last_lines}"]
    lengths = {length for length in result["output_lens"] if length != answer}
    return [f"answers of {sorted(lengths)} tokens, expected {answer}"] if lengths else []


def gaps_together(result: dict[str, Any], batch: int) -> list[float]:
    """Seconds from event to event of each stream while `batch` requests decoded."""
    streams = [
        start + first + np.cumsum([0.0, *gaps])
        for start, first, gaps in zip(
            result["start_times"], result["ttfts"], result["itls"], strict=True
        )
    ]
    begins = np.array([times[0] for times in streams])
    ends = np.array([times[-1] for times in streams])
    return [
        float(end - begin)
        for times in streams
        for begin, end in pairwise(times)
        if np.count_nonzero((begins <= begin) & (ends >= end)) == batch
    ]


def longer_answer(result: dict[str, Any], answer: int) -> int:
    """A length with which the first request, as it decoded in `result`, outlasts the last start."""
    firsts = [
        start + first for start, first in zip(result["start_times"], result["ttfts"], strict=True)
    ]
    token = min(sum(gaps) for gaps in result["itls"]) / (answer - 1)
    return whole_intervals(answer + math.ceil(1.5 * (max(firsts) - min(firsts)) / token))


def metrics(port: int, *names: str) -> dict[str, float]:
    """Values of /metrics by their full names, summed over labels; 0 for one that is not there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    sums = dict.fromkeys(names, 0.0)
    for line in text.splitlines():
        name = re.split(r"[{ ]", line, maxsplit=1)[0]
        if name in sums:
            sums[name] += float(line.rsplit(" ", 1)[1])
    return sums


PREFILL_SUM, PREFILL_COUNT, HITS, PREEMPTIONS, DRAFTS, ACCEPTED = COUNTERS = (
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prefill_time_seconds_count",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_accepted_tokens_total",
)


@contextlib.contextmanager
def counted(port: int, requests: int) -> Iterator[dict[str, float]]:
    """A dictionary that holds, when the block has ended, by how much COUNTERS rose in it."""
    before = metrics(port, *COUNTERS)
    rise: dict[str, float] = {}
    yield rise
    # The server counts a request after it has sent the answer's last event.
    for _ in range(20):
        after = metrics(port, *COUNTERS)
        rise.update({name: after[name] - before[name] for name in COUNTERS})
        if rise[PREFILL_COUNT] >= requests:
            return
        time.sleep(0.1)


def measure(
    server: Server, prompts: list[list[int]], *, batch: int, answer: int, log: Path
) -> dict[str, Any]:
    """One point: `batch` requests at a time, which take turns in `prompts`.

    Batch 1 must be the first that asks for `prompts`: its prefill is timed, and no other's. A point
    that has `problems` has no times.
    """
    asked = [prompts[i % len(prompts)] for i in range(max(batch, len(prompts)))]
    point: dict[str, Any] = {
        "context": len(prompts[0]),
        "batch": batch,
        "requests": len(asked),
        "distinct_prompts": len(prompts),
    }
    problems: list[str] = []
    if batch > 1:
        # From the prefix cache, the prompts then start to decode at nearly the same time.
        result = bench(server, prompts, answer=1, concurrency=batch, log=log)
        problems = failures(result, 1)
    gaps: list[float] = []
    for _ in range(ATTEMPTS if not problems else 0):
        with counted(server.port, len(asked)) as rise:
            result = bench(server, asked, answer=answer, concurrency=batch, log=log)
        problems = failures(result, answer)
        gaps = [] if problems else gaps_together(result, batch)
        if problems or len(gaps) >= ENOUGH_GAPS * batch or answer == LONGEST_ANSWER:
            break
        answer = min(longer_answer(result, answer), LONGEST_ANSWER)
    point |= {"answer": answer, "completed": result["completed"], "problems": problems}
    if problems:
        return point
    if rise[PREEMPTIONS]:
        problems.append(f"{rise[PREEMPTIONS]:.0f} preemptions: the KV cache is too small")
    if len(gaps) < ENOUGH_GAPS * batch:
        problems.append(f"{batch} requests hardly decode together, {len(gaps)} gaps are too few")
    if batch == 1 and rise[HITS]:
        problems.append(f"{rise[HITS]:.0f} tokens of the prompts came from the prefix cache")
    if batch == 1 and rise[PREFILL_COUNT] != len(asked):
        problems.append(f"the server counted {rise[PREFILL_COUNT]:.0f} prefills of {len(asked)}")
    if problems:
        return point
    tokens_per_gap = sum(length - 1 for length in result["output_lens"]) / sum(
        len(itl) for itl in result["itls"]
    )
    tokens_per_step = 1 + (rise[ACCEPTED] / rise[DRAFTS] if rise[DRAFTS] else 0.0)
    steps = [1000 * gap * tokens_per_step / tokens_per_gap for gap in gaps]
    point |= {
        "gaps": len(gaps),
        "tokens_per_gap": tokens_per_gap,
        "tokens_per_step": tokens_per_step,
        "decode_step_ms": statistics.median(steps),
        "decode_step_p99_ms": float(np.percentile(steps, 99)),
    }
    if batch == 1:
        point["ttft_ms"] = 1000 * statistics.median(result["ttfts"])
        # By the engine's clock: its front end reads the request before.
        seconds = rise[PREFILL_SUM] / rise[PREFILL_COUNT]
        point["prefill_us_per_token"] = 1e6 * seconds / point["context"]
    return point


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a chrome trace, .json or .json.gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def group_of(kernel: str) -> str:
    """The row of GROUPS that a kernel belongs to."""
    name = kernel.lower()
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), OTHER)


def longest_first(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def trace_steps(events: Iterable[dict[str, Any]]) -> Counter[tuple[int, int, int]]:
    """How many steps a trace has of (prefilling requests, tokens of those, decoding requests)."""
    names = (e.get("name", "") for e in events if e.get("cat") == "user_annotation")
    found = filter(None, map(_STEP.match, names))
    return Counter((int(step[1]), int(step[2]), int(step[3])) for step in found)


def kernel_times(
    events: Iterable[dict[str, Any]], unit: str, count: int, steps: int
) -> dict[str, Any]:
    """Microseconds of each kernel and group for each of `count` units, the longest first.

    The calls of a kernel are those per step. Kernels that run at the same time on two streams both
    count. Raises ValueError if the trace has no kernel.
    """
    micros: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ON_THE_GPU:
            micros[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    if not micros:
        raise ValueError("the profile has no kernel")
    total = sum(micros.values())
    groups: dict[str, float] = defaultdict(float)
    for name, us in micros.items():
        groups[group_of(name)] += us / count
    us_per = f"us_per_{unit}"
    return {
        "steps": steps,
        us_per: total / count,
        "groups": dict(longest_first(groups)),
        "kernels": [
            {
                "name": name,
                "group": group_of(name),
                us_per: us / count,
                "calls_per_step": calls[name] / steps,
                "share": us / total,
            }
            for name, us in longest_first(micros)[:LISTED_KERNELS]
        ],
    }


def graph_times(events: list[dict[str, Any]]) -> list[float]:
    """Microseconds of each CUDA graph, from the start of its first kernel to the end of its last.

    Unlike a step they leave out the host, and unlike a sum of kernels what runs side by side.
    """
    launches = {
        event["args"]["correlation"] for event in events if event.get("name") == "cudaGraphLaunch"
    }
    spans: dict[int, tuple[float, float]] = {}
    for event in events:
        graph = event.get("args", {}).get("correlation")
        if event.get("cat") in ON_THE_GPU and graph in launches:
            start, end = event["ts"], event["ts"] + event["dur"]
            first, last = spans.get(graph, (start, end))
            spans[graph] = (min(first, start), max(last, end))
    return [end - start for start, end in spans.values()]


def decode_kernel_times(events: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Kernel times per decode step, and where a step is one CUDA graph, the graph's median.

    Raises ValueError if a step of the trace is not one of `batch` decoding requests, if it has no
    step, and as `kernel_times` does.
    """
    steps = trace_steps(events)
    kinds = {(prefilling, decoding) for prefilling, _, decoding in steps}
    if kinds != {(0, batch)}:
        raise ValueError(
            f"the profile has steps of (prefilling, decoding) requests {sorted(kinds)}, "
            f"expected only (0, {batch})"
        )
    count = steps.total()
    times = kernel_times(events, "step", count, count)
    graphs = graph_times(events)
    return {"graph_us": statistics.median(graphs), **times} if len(graphs) == count else times


def prefill_kernel_times(events: list[dict[str, Any]], context: int) -> dict[str, Any]:
    """Kernel times per token of a prompt of `context` tokens, of which the trace has every chunk.

    Raises ValueError if a step of the trace is neither one of one prefilling request nor empty, if
    their prompt tokens are not `context`, and as `kernel_times` does.
    """
    steps = trace_steps(events)
    # With async scheduling, vLLM runs steps without a request until it has the answer. Of an answer
    # of one token it schedules no decode step: the last chunk samples it.
    del steps[0, 0, 0]
    kinds = {(prefilling, decoding) for prefilling, _, decoding in steps}
    if not kinds <= {(1, 0)}:
        raise ValueError(
            f"the profile has steps of (prefilling, decoding) requests {sorted(kinds)}, "
            "expected only (1, 0)"
        )
    tokens = sum(chunk * count for (_, chunk, _), count in steps.items())
    if tokens != context:
        raise ValueError(
            f"the profile has {tokens:,} prompt tokens in {steps.total()} steps, expected "
            f"{context:,}; it ends after {PROFILED_STEPS} steps"
        )
    return {"tokens": tokens, **kernel_times(events, "token", tokens, steps.total())}


def profiler_args(folder: Path) -> list[str]:
    """Options of `vllm serve` for a torch profiler that ends by itself after PROFILED_STEPS."""
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
        "max_iterations": PROFILED_STEPS,
    }
    return ["--profiler-config", json.dumps(config)]


@contextlib.contextmanager
def traced(port: int, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """A list that holds, when the block has ended, the events of a trace of it.

    Raises ValueError if the profiler refuses or writes no trace.
    """
    known = set(folder.rglob("*.json*"))
    events: list[dict[str, Any]] = []
    post(port, "/start_profile")
    yield events
    post(port, "/stop_profile")
    traces = sorted(set(folder.rglob("*.json*")) - known)
    if not traces:
        raise ValueError("the profiler wrote no trace")
    # Of several ranks, the first: all of them do the same.
    events += read_trace(traces[0])


def profile(
    server: Server,
    prompts: list[list[int]],
    folder: Path,
    *,
    batch: int,
    answer: int,
    log: Path,
) -> dict[str, Any]:
    """Kernel times of decode steps of `batch` requests whose prompts the prefix cache has.

    Raises ValueError if the requests do not decode together, and as `traced` and
    `decode_kernel_times` do.
    """
    asked = [prompts[i % len(prompts)] for i in range(batch)]
    running, waiting = "vllm:num_requests_running", "vllm:num_requests_waiting"
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(bench, server, asked, answer=answer, concurrency=batch, log=log)
        while metrics(server.port, running, waiting) != {running: batch, waiting: 0}:
            if answers.done():
                raise ValueError(f"{batch} requests never ran together")
            time.sleep(0.05)
        time.sleep(0.2)  # they run; their last prompt tokens may not be through
        with traced(server.port, folder) as events:
            time.sleep(1.0)
        answers.result()
    return decode_kernel_times(events, batch)


def profile_prefill(
    server: Server, prompt: list[int], folder: Path, *, log: Path
) -> dict[str, Any]:
    """Kernel times of the prefill of a prompt that the prefix cache does not have.

    Raises ValueError if the request fails, and as `traced` and `prefill_kernel_times` do.
    """
    with traced(server.port, folder) as events:
        result = bench(server, [prompt], answer=1, concurrency=1, log=log)
    if wrong := failures(result, 1):
        raise ValueError(wrong[0])
    return prefill_kernel_times(events, len(prompt))


def post(port: int, path: str) -> None:
    """POST without a body. Raises ValueError for a status other than 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, b"")
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"POST {path}: {response.status} {response.read().decode()[:500]}")
    finally:
        connection.close()


def numbers(text: str) -> list[int]:
    """Distinct positive integers of a list like 1,8,32, ascending."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = [0]
    if values[0] < 1:
        raise typer.BadParameter(f"expected positive integers like 1,8,32, got {text!r}")
    return values


def profiled_points(texts: Iterable[str]) -> list[tuple[int, int]]:
    """(context, batch) of each text like 32768x1."""
    points = []
    for text in texts:
        if not (found := re.fullmatch(r"(\d+)x(\d+)", text)):
            raise typer.BadParameter(f"--profile takes CONTEXTxBATCH, got {text!r}")
        points.append((int(found[1]), int(found[2])))
    return points


def wanted_profiles(
    points: list[str] | None, prefills: list[int] | None, contexts: list[int], batches: list[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """The points, and the contexts of prefills, to list the kernels of; all must be measured."""
    profiled = profiled_points(points or ())
    if missed := [p for p in profiled if p[0] not in contexts or p[1] not in batches]:
        raise typer.BadParameter(f"--profile {missed[0][0]}x{missed[0][1]} is not measured")
    prompts = sorted(set(prefills or ()))
    if unknown := [context for context in prompts if context not in contexts]:
        raise typer.BadParameter(f"--profile-prefill {unknown[0]} is not measured")
    return profiled, prompts


def tail(log: Path, lines: int = 20) -> str:
    """The end of what vLLM's client printed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join([f"The end of {log}:", *text.splitlines()[-lines:]])


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def points_table(points: list[dict[str, Any]], title: str) -> Table:
    columns = ("decode step ms", "p99 ms", "prefill us/token", "TTFT ms", "prompts")
    table = Table("context", "batch", *columns, title=title)
    for point in points:
        names = ("decode_step_ms", "decode_step_p99_ms", "prefill_us_per_token", "ttft_ms")
        times = [milliseconds(point.get(name)) for name in names]
        prompts = str(point["distinct_prompts"])
        table.add_row(f"{point['context']:,}", str(point["batch"]), *times, prompts)
    return table


def place(row: dict[str, Any]) -> str:
    """Where a profile was taken, in words. That of a prefill has no batch."""
    return ", ".join(f"{name} {row[name]:,}" for name in ("context", "batch") if name in row)


def kernels_table(profiled: dict[str, Any], unit: str, rows: int = 20) -> Table:
    us_per, decimals = f"us_per_{unit}", DECIMALS[unit]
    title = (
        f"{place(profiled)}: {profiled[us_per]:.{decimals - 1}f} us of kernels a {unit}, "
        f"{profiled['steps']} steps"
    )
    if "graph_us" in profiled:
        title += f", the graph {profiled['graph_us']:.{decimals - 1}f} us"
    table = Table("kernel", "group", f"us a {unit}", "calls a step", "share", title=title)
    for group, us in profiled["groups"].items():
        share = f"{us / profiled[us_per]:.1%}"
        table.add_row("[bold]all[/]", f"[bold]{group}[/]", f"{us:.{decimals}f}", "", share)
    for kernel in profiled["kernels"][:rows]:
        numbers_of_it = (f"{kernel[us_per]:.{decimals}f}", f"{kernel['calls_per_step']:.1f}")
        name = escape(kernel["name"][:60])
        table.add_row(name, kernel["group"], *numbers_of_it, f"{kernel['share']:.1%}")
    return table


def measure_all(
    server: Server,
    contexts: list[int],
    batches: list[int],
    *,
    tokens: range,
    own_tokens: int,
    answer: int,
    log: Path,
    began: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Every point, batches within contexts, so that a larger batch finds prompts in the cache."""
    for context in contexts:
        shares = {batch: distinct_prompts(batch, context, own_tokens) for batch in batches}
        first, *prompts = random_prompts(1 + max(shares.values()), context, tokens)
        # What a first request compiles or allocates, readiness.py measures.
        bench(server, [first], answer=answer, concurrency=1, log=log)
        for batch in batches:
            began(f"{context:,} x {batch}")
            share = prompts[: shares[batch]]
            yield measure(server, share, batch=batch, answer=answer, log=log)


def profile_all(
    server: Server,
    points: list[dict[str, Any]],
    folder: Path,
    *,
    prompts: Callable[[dict[str, Any]], list[list[int]]],
    log: Path,
    began: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Kernel times of points that have been measured, each with `prompts` of it."""
    for point in points:
        context, batch = point["context"], point["batch"]
        began(f"kernels of {context:,} x {batch}")
        answer = whole_intervals(min(point["answer"] + PROFILED_ANSWER, LONGEST_ANSWER))
        kernels = profile(server, prompts(point), folder, batch=batch, answer=answer, log=log)
        yield {"context": context, "batch": batch, **kernels}


def profile_prefills(
    server: Server,
    contexts: list[int],
    folder: Path,
    *,
    prompt: Callable[[int], list[int]],
    log: Path,
    began: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Kernel times of a `prompt` of each context, which nothing has asked for before."""
    for context in contexts:
        began(f"kernels of the prefill of {context:,}")
        yield {"context": context, **profile_prefill(server, prompt(context), folder, log=log)}


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    label: Annotated[Attention, typer.Option(help="The attention to serve with.")],
    json_path: Annotated[Path, typer.Option("--json", help="The result file to write.")],
    contexts: Annotated[str, typer.Option(help="Prompt lengths.")] = "1024,32768,131072",
    batches: Annotated[str, typer.Option(help="Requests at a time.")] = "1,8,32,64",
    output_len: Annotated[
        int, typer.Option(min=65, help="Tokens of an answer; more where a batch needs it.")
    ] = 257,
    own_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of a point, beyond which requests share.")
    ] = 2**20,
    profile_points: ProfilePoints = None,
    prefill_contexts: ProfilePrefills = None,
    mtp: Annotated[int, typer.Option(min=0, help="Speculative tokens of the MTP layer.")] = 0,
    cudagraph_mode: Annotated[str | None, typer.Option(help="FULL, PIECEWISE, NONE, ...")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager")] = False,
    env: Annotated[list[str] | None, typer.Option(help="K=V for the server; repeatable.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds until it must be healthy.")] = 600,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After --: for vllm serve.")] = None,
) -> None:
    """Serve MODEL once and time decode steps and prefill. Exit status 1 if anything is wrong.

    With the defaults the tiny checkpoint takes about four minutes, of which the start of the server
    is one or two; each --profile and --profile-prefill takes half a minute more.
    """
    # Bound now: vLLM's client prints into a log, and the progress must not.
    console = Console(file=sys.stdout)
    if wrong := [item for item in env or () if "=" not in item]:
        raise typer.BadParameter(f"--env takes K=V, got {wrong[0]!r}")
    lengths, sizes = numbers(contexts), numbers(batches)
    profiled, prefills = wanted_profiles(profile_points, prefill_contexts, lengths, sizes)
    variables = {**attention_env(label), **dict(item.split("=", 1) for item in env or ())}
    machine = describe_machine(revision)
    if variables.get("VLLM_SM12X_ASSUME"):  # which the server sees, and this process does not
        machine["label"] = "proxy"
    console.print(machine_line(machine), highlight=False)
    args = server_args(
        lengths, sizes, mtp=mtp, cudagraph_mode=cudagraph_mode, enforce_eager=enforce_eager
    )
    args += vllm_args or []
    mode = "eager" if enforce_eager else cudagraph_mode or "graphs"
    answer = whole_intervals(output_len)
    log, bench_log = json_path.with_suffix(".server.log"), json_path.with_suffix(".bench.log")
    json_path.parent.mkdir(parents=True, exist_ok=True)
    bench_log.write_text("")
    identity = checkpoint_identity(model)

    # Its import takes long; the server takes longer.
    threading.Thread(target=importlib.import_module, args=("vllm.benchmarks.serve",)).start()
    points: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    prefill_profiles: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as traces:
        profiler = profiler_args(Path(traces)) if profiled or prefills else []
        with vllm_server(
            model, log=log, args=[*args, *profiler], env=variables, limit_seconds=limit
        ) as server:
            console.print(f"healthy after {server.startup_seconds:.0f} s, log in {log}")
            problems = check_startup(
                server.startup_log,
                attention=label,
                cudagraphs=mode not in ("eager", "NONE"),
            )
            progress = Progress(
                console=console, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False
            )
            count = len(lengths) * len(sizes) + len(profiled) + len(prefills)
            task = progress.add_task("", total=count)

            def began(what: str) -> None:
                progress.update(task, description=what)

            def write() -> None:
                write_result(
                    json_path,
                    machine,
                    benchmark="engine",
                    attention=label,
                    mode=mode,
                    mtp=mtp,
                    checkpoint=identity,
                    vllm_args=args,
                    env=variables,
                    startup_seconds=round(server.startup_seconds, 1),
                    points=points,
                    profiles=profiles,
                    prefill_profiles=prefill_profiles,
                    problems=problems,
                )

            tokens = token_range(model)

            def measured_prompts(point: dict[str, Any]) -> list[list[int]]:
                return random_prompts(1 + point["distinct_prompts"], point["context"], tokens)[1:]

            def new_prompt(context: int) -> list[int]:
                asked = 1 + max(p["distinct_prompts"] for p in points if p["context"] == context)
                return random_prompts(asked + 1, context, tokens)[-1]

            # Whatever ends it, a signal too, what was measured before is written.
            try:
                with progress:
                    for point in measure_all(
                        server,
                        lengths,
                        sizes,
                        tokens=tokens,
                        own_tokens=own_tokens,
                        answer=answer,
                        log=bench_log,
                        began=began,
                    ):
                        points.append(point)
                        problems += [
                            f"context {point['context']:,}, batch {point['batch']}: {problem}"
                            for problem in point["problems"]
                        ]
                        write()
                        progress.advance(task)
                    # After all times: once it has run, vLLM's profiler marks every step.
                    wanted = [p for p in points if (p["context"], p["batch"]) in profiled]
                    for kernels in profile_all(
                        server,
                        wanted,
                        Path(traces),
                        prompts=measured_prompts,
                        log=bench_log,
                        began=began,
                    ):
                        profiles.append(kernels)
                        write()
                        progress.advance(task)
                    for kernels in profile_prefills(
                        server,
                        prefills,
                        Path(traces),
                        prompt=new_prompt,
                        log=bench_log,
                        began=began,
                    ):
                        prefill_profiles.append(kernels)
                        write()
                        progress.advance(task)
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}\n{tail(bench_log)}")
            problems += server.problems()
            write()

    console.print(points_table(points, f"{label.value}, {mode}, {mtp} draft tokens"))
    for kernels in profiles:
        console.print(kernels_table(kernels, "step"))
    for kernels in prefill_profiles:
        console.print(kernels_table(kernels, "token"))
    for problem in problems:
        console.print(f"[red]wrong:[/] {escape(problem)}", highlight=False)
    raise typer.Exit(1 if problems else 0)


def load_run(path: Path) -> dict[str, Any]:
    """A result file of `run`. Raises ValueError for another one."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("benchmark") != "engine":
        raise ValueError(f"{path} is a result of {result.get('benchmark')!r}, not of 'engine'")
    return result


def by_point(rows: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["context"], row["batch"]): row for row in rows}


def check_pair(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Raise ValueError if the two ran on different machines or served different checkpoints."""
    for name in SAME_MACHINE:
        ours, theirs = first["machine"][name], second["machine"][name]
        if ours != theirs:
            raise ValueError(
                f"the machines differ: {name} is {ours!r} in the first, {theirs!r} in the second"
            )
    if first["checkpoint"] != second["checkpoint"]:
        raise ValueError(
            f"the checkpoints differ: {first['checkpoint']} in the first, "
            f"{second['checkpoint']} in the second"
        )


def ratios(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """For each point with times in both: both times, and the first one's share of the second's.

    Raises ValueError if there is none.
    """
    others, rows = by_point(second["points"]), []
    for key, point in by_point(first["points"]).items():
        other = others.get(key, {})
        row: dict[str, Any] = {"context": key[0], "batch": key[1]}
        for name in ("decode_step_ms", "prefill_us_per_token"):
            if name in point and name in other:
                row[name] = [point[name], other[name]]
                row[f"{name}_ratio"] = point[name] / other[name]
        if len(row) > 2:
            rows.append(row)
    if not rows:
        raise ValueError("they have no time of the same context and batch")
    return rows


def kernels_beside(
    first: dict[str, Any], second: dict[str, Any], unit: str
) -> list[dict[str, Any]]:
    """Microseconds a unit in both, of groups and then of kernels, the longest first; 0 for none."""
    us_per = f"us_per_{unit}"
    mine, others = ({k["name"]: k for k in run["kernels"]} for run in (first, second))
    groups = dict.fromkeys([*first["groups"], *second["groups"]])
    rows = [
        {"group": group, us_per: [run["groups"].get(group, 0.0) for run in (first, second)]}
        for group in groups
    ]
    kernels = [
        {
            "group": (mine.get(name) or others[name])["group"],
            "kernel": name,
            us_per: [run[name][us_per] if name in run else 0.0 for run in (mine, others)],
        }
        for name in dict.fromkeys([*mine, *others])
    ]
    return [row for part in (rows, kernels) for row in sorted(part, key=lambda r: -max(r[us_per]))]


def profiles_beside(
    first: list[dict[str, Any]], second: list[dict[str, Any]], unit: str, console: Console
) -> list[dict[str, Any]]:
    """Print, and return, the kernels of each place that both have a profile of."""
    us_per, decimals = f"us_per_{unit}", DECIMALS[unit]
    others = {place(profile): profile for profile in second}
    pairs = [(mine, others[place(mine)]) for mine in first if place(mine) in others]
    profiles = []
    for mine, other in pairs:
        rows = kernels_beside(mine, other, unit)
        where = {name: mine[name] for name in ("context", "batch") if name in mine}
        profiles.append({**where, "rows": rows})
        totals = " / ".join(f"{run[us_per]:.{decimals - 1}f}" for run in (mine, other))
        title = f"{place(mine)}: {totals} us of kernels a {unit}"
        if all("graph_us" in run for run in (mine, other)):
            graphs = " / ".join(f"{run['graph_us']:.{decimals - 1}f}" for run in (mine, other))
            title += f", the graph {graphs} us"
        table = Table("kernel", "group", f"us a {unit}", f"us a {unit}", title=title)
        for row in rows[:COMPARED_ROWS]:
            name = escape(row["kernel"][:70]) if "kernel" in row else "[bold]all[/]"
            table.add_row(name, row["group"], *(f"{us:.{decimals}f}" for us in row[us_per]))
        console.print(table)
    return profiles


def describe_run(result: dict[str, Any]) -> str:
    return f"{result['attention']}, {result['mode']}, {result['mtp']} draft tokens"


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="OURS.json")],
    second: Annotated[Path, typer.Argument(help="STOCK.json")],
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
) -> None:
    """Set two runs beside each other: times of the first over times of the second."""
    try:
        runs = (load_run(first), load_run(second))
        check_pair(*runs)
        rows = ratios(*runs)
    except ValueError as error:
        print(f"cannot compare {first} and {second}: {error}.", file=sys.stderr)
        raise typer.Exit(1) from None
    console = Console(width=140)
    machine = runs[0]["machine"]
    console.print(machine_line(machine), highlight=False)
    for name in VERSIONS:
        versions = [result["machine"][name] for result in runs]
        if versions[0] != versions[1]:
            console.print(f"[yellow]{name} differs:[/] {versions[0]} and {versions[1]}")
    one, two = map(describe_run, runs)
    table = Table(title=f"{one} / {two}")
    for column in ("context", "batch", "decode step ms", "ratio", "prefill us/token", "ratio"):
        table.add_column(column)
    for row in rows:
        cells = []
        for name in ("decode_step_ms", "prefill_us_per_token"):
            times = " / ".join(map(milliseconds, row.get(name, ())))
            cells += [times, f"{row[f'{name}_ratio']:.2f}x" if times else ""]
        table.add_row(f"{row['context']:,}", str(row["batch"]), *cells)
    console.print(table)
    # Results from before --profile-prefill have no prefill_profiles.
    profiles, prefill_profiles = (
        profiles_beside(*(result.get(key, []) for result in runs), unit, console)
        for key, unit in (("profiles", "step"), ("prefill_profiles", "token"))
    )
    if json_path:
        write_result(
            json_path,
            machine,
            benchmark="engine compare",
            runs={
                path.stem: describe_run(run)
                for path, run in zip((first, second), runs, strict=True)
            },
            points=rows,
            profiles=profiles,
            prefill_profiles=prefill_profiles,
        )


if __name__ == "__main__":
    app()
