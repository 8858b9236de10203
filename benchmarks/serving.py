# SPDX-License-Identifier: Apache-2.0
"""Real `vllm serve`, 64 mixed requests over HTTP, 8 at a time, every answer checked."""

import http.client
import json
import math
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from server import (
    MODEL_NAME,
    Attention,
    attention_env,
    check_startup,
    parallel_args,
    vllm_server,
)

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Around the sizes where something changes: one token, the window of 128, the top-k of 512, a
# compressed page of 128 positions, a chunk of prefill.
NAMED_LENGTHS = (1, 2, 127, 128, 129, 511, 513, 2047, 4096, 6000)
LONGEST_PROMPT = 6000
SHARED_PREFIX = 1024
MAX_TOKENS = 64
REQUEST_TIMEOUT = 600.0  # seconds; some releases compile inside their first request


class Mode(str, Enum):
    """How the engine executes the model."""

    CUDAGRAPH = "cudagraph"
    EAGER = "eager"


@dataclass(frozen=True)
class Request:
    """One completion to ask for. `prompt` holds token ids; `logprobs` None asks for none."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    logprobs: int | None

    def body(self) -> dict[str, Any]:
        return {
            "model": MODEL_NAME,
            **asdict(self),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }


@dataclass(frozen=True)
class Answer:
    """What came back. Times in seconds from sending; `problems` in words, none if all is well."""

    prompt_tokens: int
    tokens: int
    first_token_seconds: float | None
    seconds: float
    problems: list[str]


def token_range(model: Path | str) -> range:
    """Token ids that stand for text: special tokens have the ends of a vocabulary."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    vocab = config["vocab_size"]
    return range(vocab // 10, vocab - vocab // 10)


def mixed_requests(count: int, tokens: range, seed: int = 0) -> list[Request]:
    """`count` requests: prompts of 1 to 6,000 tokens, half of the long ones with a shared prefix.

    Half are greedy, a third ask for log-probabilities. The same arguments give the same requests.
    """
    rng = random.Random(seed)
    lengths = list(NAMED_LENGTHS[:count])
    for i in range(count - len(lengths)):
        exponent = rng.uniform(0, math.log(LONGEST_PROMPT))
        lengths.append(round(math.exp(exponent)) if i % 2 else rng.randint(1, LONGEST_PROMPT))
    rng.shuffle(lengths)
    shared = rng.choices(tokens, k=SHARED_PREFIX)

    requests, long_prompts = [], 0
    for i, length in enumerate(lengths):
        prompt = rng.choices(tokens, k=length)
        if length > SHARED_PREFIX:
            long_prompts += 1
            if long_prompts % 2:
                prompt[:SHARED_PREFIX] = shared
        requests.append(
            Request(
                prompt=prompt,
                max_tokens=(1, MAX_TOKENS)[i] if i < 2 else rng.randint(1, MAX_TOKENS),
                temperature=0.0 if i % 2 else 1.0,
                seed=i,
                logprobs=5 if i % 3 == 0 else None,
            )
        )
    return requests


def ask(port: int, request: Request) -> Answer:
    """Send one request and check its answer."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT)
    events: list[dict[str, Any]] = []
    first, problems, done = None, [], False
    try:
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(request.body()),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        if response.status != 200:
            problems.append(f"HTTP {response.status}: {response.read().decode()[:2000]}")
        for line in response if not problems else ():
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                done = True
            elif data:
                events.append(json.loads(data))
                if first is None and events[-1].get("choices"):
                    first = time.perf_counter() - start
    except (OSError, http.client.HTTPException, ValueError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    if not problems:
        problems = check_events(request, events, done)
    return Answer(
        prompt_tokens=len(request.prompt),
        tokens=sum(len(choice.get("token_ids") or ()) for choice in _choices(events)),
        first_token_seconds=first,
        seconds=time.perf_counter() - start,
        problems=problems,
    )


def check_events(request: Request, events: list[dict[str, Any]], done: bool) -> list[str]:
    """What is wrong with the events of a streamed answer, in words."""
    problems = [f"the stream says {event['error']}" for event in events if "error" in event]
    if not done:
        problems.append("the stream ended without [DONE]")
    choices = _choices(events)
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    if reasons != ["length"]:
        problems.append(f"finish reasons {reasons}, expected ['length']")
    tokens = sum(len(choice.get("token_ids") or ()) for choice in choices)
    if tokens != request.max_tokens:
        problems.append(f"{tokens} tokens, expected {request.max_tokens}")
    usage = next((event["usage"] for event in events if event.get("usage")), {})
    counted = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if counted != (len(request.prompt), request.max_tokens):
        expected = (len(request.prompt), request.max_tokens)
        problems.append(f"usage says (prompt, completion) {counted}, expected {expected}")
    if request.logprobs is not None:
        values = [value for choice in choices for value in _token_logprobs(choice)]
        bad = [value for value in values if not _is_log_probability(value)]
        if len(values) != request.max_tokens:
            problems.append(f"{len(values)} log-probabilities, expected {request.max_tokens}")
        if bad:
            problems.append(f"{len(bad)} are no log-probabilities, such as {bad[0]}")
    return problems


def ask_all(port: int, requests: list[Request], concurrency: int) -> tuple[list[Answer], float]:
    """All answers in the order of the requests, and the seconds that they took together."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda request: ask(port, request), requests))
    return answers, time.perf_counter() - start


def _choices(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event.get("choices") or ()]


def _token_logprobs(choice: dict[str, Any]) -> list[float | None]:
    return (choice.get("logprobs") or {}).get("token_logprobs") or []


def _is_log_probability(value: float | None) -> bool:
    # The server replaces -inf by -9999, and NaN by null.
    return value is not None and -9999.0 < value <= 0.0


def _summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    first_tokens = [answer.first_token_seconds for answer in answers]
    known = [value for value in first_tokens if value is not None]
    return {
        "requests": len(answers),
        "failed": sum(bool(answer.problems) for answer in answers),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "output_tokens": sum(answer.tokens for answer in answers),
        "output_tokens_per_second": round(sum(a.tokens for a in answers) / seconds, 1),
        "first_request_ttft_seconds": first_tokens[0],
        "tenth_request_ttft_seconds": first_tokens[9] if len(first_tokens) > 9 else None,
        "median_ttft_seconds": statistics.median(known) if known else None,
    }


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    label: Annotated[Attention, typer.Option(help="The attention to serve with.")],
    json_path: Annotated[Path, typer.Option("--json", help="The result file to write.")],
    mode: Mode = Mode.CUDAGRAPH,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="The same as --mode eager.")
    ] = False,
    cudagraph_mode: Annotated[str | None, typer.Option(help="FULL, PIECEWISE, ...")] = None,
    mtp: Annotated[int, typer.Option(min=0, help="Speculative tokens of the MTP layer.")] = 0,
    tensor_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    concurrency: Annotated[int, typer.Option(min=1)] = 8,
    env: Annotated[list[str] | None, typer.Option(help="K=V for the server; repeatable.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds until it must be healthy.")] = 600,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After --: for vllm serve.")] = None,
) -> None:
    """Serve MODEL, send the requests, check every answer. Exit status 1 if anything is wrong."""
    console = Console()
    if wrong := [item for item in env or () if "=" not in item]:
        raise typer.BadParameter(f"--env takes K=V, got {wrong[0]!r}")
    variables = {**attention_env(label), **dict(item.split("=", 1) for item in env or ())}
    machine = describe_machine(revision)
    if variables.get("VLLM_SM12X_ASSUME"):  # which the server sees, and this process does not
        machine["label"] = "proxy"
    console.print(machine_line(machine), highlight=False)
    mode = Mode.EAGER if enforce_eager else mode
    args = ["--enforce-eager"] if mode is Mode.EAGER else []
    args += parallel_args(tensor_parallel_size, pipeline_parallel_size)
    if cudagraph_mode:
        args += ["--compilation-config", json.dumps({"cudagraph_mode": cudagraph_mode})]
    if mtp:
        speculative = {"method": "mtp", "num_speculative_tokens": mtp}
        args += ["--speculative-config", json.dumps(speculative)]
    args += vllm_args or []
    log = json_path.with_suffix(".server.log")

    todo = mixed_requests(requests, token_range(model))
    with vllm_server(model, log=log, args=args, env=variables, limit_seconds=limit) as server:
        console.print(f"healthy after {server.startup_seconds:.0f} s, log in {log}")
        problems = check_startup(
            server.startup_log, attention=label, cudagraphs=mode is Mode.CUDAGRAPH
        )
        answers, seconds = ask_all(server.port, todo, concurrency)
        problems += server.problems()
        counters = (
            {}
            if server.process.poll() is not None
            else server.counters("vllm:prefix_cache_", "vllm:spec_decode_", "vllm:num_preemptions")
        )
        startup_seconds = server.startup_seconds

    problems += [f"request {i}: {p}" for i, answer in enumerate(answers) for p in answer.problems]
    summary = {"startup_seconds": round(startup_seconds, 1), **_summary(answers, seconds)}
    title = f"vllm serve, {label.value}, {mode.value}, {concurrency} at a time"
    table = Table("measure", "value", title=title)
    for name, value in {**summary, **counters}.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    for problem in problems:
        console.print(f"[red]wrong:[/] {escape(problem)}", highlight=False)
    write_result(
        json_path,
        machine,
        benchmark="serving",
        attention=label,
        mode=mode,
        concurrency=concurrency,
        vllm_args=args,
        env=variables,
        summary=summary,
        counters=counters,
        problems=problems,
        answers=[asdict(answer) for answer in answers],
    )
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()
