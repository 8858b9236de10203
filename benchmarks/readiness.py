# SPDX-License-Identifier: Apache-2.0
"""Whether ready means ready: what still compiles after it, and how long the first requests wait.

One run is one `vllm serve` of a checkpoint (and a second one, eager, for the decode steps), under
nine minutes with the tiny one: ten requests one after another, 200 mixed ones that arrive at random
and drain to 1, 2, 3, 5 and 7 running, and the gaps between tokens of a few long answers.
"""

import dataclasses
import http.client
import json
import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from server import (
    Attention,
    Server,
    attention_env,
    check_startup,
    is_deepseek_v4,
    vllm_server,
)
from serving import Answer, Request, ask, token_range

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

FIRST_PROMPT = 500
LONGEST_PROMPT = 8000
DRAINED_TO = (1, 2, 3, 5, 7)
WAVE = 8
# A request of a wave that ends early has so many tokens, one that it drains to so many.
SHORT_ANSWER, LONG_ANSWER = 4, 40
MEAN_ARRIVAL_SECONDS = 0.02
STEPS = 200
STEP_BATCHES = (1, 4, 8)
# vLLM's own monitor says it once for each kernel, with these words in 0.23 to 0.33.
_VLLM_SAYS = re.compile(r"((?:Triton|CuTeDSL|TileLang) [\w ]+) during inference: ([^\s(]+?)[.\s(]")
_GRAPHS_TOOK = re.compile(r"Graph capturing finished in (\S+) secs?, took (\S+) GiB")
_WARMED = re.compile(r"Warmed up with (\d+) batches in (\S+) s")


def wave(drained_to: int, tokens: range, rng: random.Random) -> list[Request]:
    """WAVE requests, of which `drained_to` run on when the others have ended."""
    requests = []
    for place in range(WAVE):
        long = place < drained_to
        longest = rng.choice([40, 1500, LONGEST_PROMPT])
        answer = LONG_ANSWER if long else SHORT_ANSWER
        requests.append(
            Request(
                prompt=rng.choices(tokens, k=rng.randint(1, longest)),
                max_tokens=answer + rng.randint(0, 3),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(2**31),
                logprobs=rng.choice([None, None, 5]),
            )
        )
    rng.shuffle(requests)
    return requests


def in_waves(port: int, tokens: range, count: int, seed: int = 0) -> list[Answer]:
    """All answers to `count` requests: waves one by one, and in a wave they arrive at random."""
    rng = random.Random(seed)
    answers: list[Answer] = []
    with ThreadPoolExecutor(WAVE) as pool:
        while len(answers) < count:
            drained_to = DRAINED_TO[len(answers) // WAVE % len(DRAINED_TO)]
            sent = []
            for request in wave(drained_to, tokens, rng)[: count - len(answers)]:
                sent.append(pool.submit(ask, port, request))
                time.sleep(rng.expovariate(1 / MEAN_ARRIVAL_SECONDS))
            answers += [future.result() for future in sent]
    return answers


def step_seconds(port: int, prompt: list[int], tokens: int) -> list[float]:
    """Seconds from each event of one streamed answer to the next."""
    request = Request(prompt=prompt, max_tokens=tokens, temperature=0.0, seed=0, logprobs=None)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(request.body()), headers)
        times = []
        for line in connection.getresponse():
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]" and json.loads(data).get("choices"):
                times.append(time.perf_counter())
    finally:
        connection.close()
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def decode_steps(port: int, tokens: range, seed: int = 1) -> dict[str, float]:
    """Median milliseconds of a decode step, by the number of requests that decode together."""
    rng = random.Random(seed)
    medians = {}
    for running in STEP_BATCHES:
        prompts = [rng.choices(tokens, k=FIRST_PROMPT) for _ in range(running)]
        with ThreadPoolExecutor(running) as pool:
            steps = list(pool.map(lambda prompt: step_seconds(port, prompt, STEPS), prompts))
        # Others may still prefill during the first steps.
        gaps = [gap for request in steps for gap in request[len(request) // 4 :]]
        if gaps:
            medians[f"decode_step_ms_of_{running}"] = round(1000 * statistics.median(gaps), 3)
    return medians


def after_ready(compile_log: Path, server: Server) -> dict[str, list[str]]:
    """What was compiled after ready: by our watch, and by what vLLM's own monitor says."""
    ours = []
    if compile_log.exists():
        events = [json.loads(line) for line in compile_log.read_text().splitlines()]
        ours = [
            f"{event['kernel']} {event['what']}: {event['detail']}"
            for event in events
            if event["what"] != "ready"
        ]
    text = server.log.read_text(encoding="utf-8", errors="replace")
    said = sorted({f"{match[2]}: {match[1]}" for match in _VLLM_SAYS.finditer(text)})
    return {"watch": ours, "vllm": said}


def startup_facts(log_text: str) -> dict[str, float]:
    """Seconds and GiB that the log gives for graphs and for the warm-up."""
    facts: dict[str, float] = {}
    # The last one counts: newer releases capture once more before, to measure what graphs take.
    for found in _GRAPHS_TOOK.finditer(log_text):
        facts |= {"graphs_seconds": float(found[1]), "graphs_gib": float(found[2])}
    if found := _WARMED.search(log_text):
        facts |= {"warm_up_batches": float(found[1]), "warm_up_seconds": float(found[2])}
    return facts


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    label: Annotated[Attention, typer.Option(help="The attention to serve with.")],
    json_path: Annotated[Path, typer.Option("--json", help="The result file to write.")],
    mtp: Annotated[int, typer.Option(min=0, help="Speculative tokens of the MTP layer.")] = 0,
    cudagraph_mode: Annotated[str | None, typer.Option(help="FULL, PIECEWISE, ...")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 200,
    eager: Annotated[bool, typer.Option(help="Also measure decode steps without graphs.")] = True,
    env: Annotated[list[str] | None, typer.Option(help="K=V for the server; repeatable.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds until it must be healthy.")] = 400,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After --: for vllm serve.")] = None,
) -> None:
    """Serve MODEL and see what the first requests wait for. Exit status 1 if an answer is wrong."""
    console = Console()
    deepseek_v4 = is_deepseek_v4(model)
    if label is Attention.OURS and not deepseek_v4:
        raise typer.BadParameter(f"--label ours takes a DeepSeek V4, and {model} is none")
    compile_log = json_path.with_suffix(".compiles.jsonl")
    compile_log.unlink(missing_ok=True)
    variables = {
        **attention_env(label, deepseek_v4=deepseek_v4),
        "VLLM_SM12X_COMPILE_LOG": str(compile_log.resolve()),
        **dict(item.split("=", 1) for item in env or ()),
    }
    machine = describe_machine(revision)
    if variables.get("VLLM_SM12X_ASSUME"):  # which the server sees, and this process does not
        machine["label"] = "proxy"
    console.print(machine_line(machine), highlight=False)
    args = ["--max-model-len", str(LONGEST_PROMPT + 256)]
    if mtp:
        speculative = {"method": "mtp", "num_speculative_tokens": mtp}
        args += ["--speculative-config", json.dumps(speculative)]
    args += vllm_args or []
    graphs = (
        ["--compilation-config", json.dumps({"cudagraph_mode": cudagraph_mode})]
        if cudagraph_mode
        else []
    )
    with_graphs = [*args, *graphs]
    tokens = token_range(model)
    log = json_path.with_suffix(".server.log")

    with vllm_server(
        model, log=log, args=with_graphs, env=variables, limit_seconds=limit
    ) as server:
        console.print(f"healthy after {server.startup_seconds:.0f} s, log in {log}")
        problems = check_startup(
            server.startup_log,
            attention=label,
            cudagraphs=cudagraph_mode != "NONE",
            deepseek_v4=deepseek_v4,
        )
        rng = random.Random(2)
        answers = [
            ask(server.port, Request(rng.choices(tokens, k=FIRST_PROMPT), 8, 0.0, seed, None))
            for seed in range(10)
        ]
        first_tokens = [answer.first_token_seconds for answer in answers]
        answers += in_waves(server.port, tokens, requests)
        summary: dict[str, Any] = {
            "startup_seconds": round(server.startup_seconds, 1),
            **startup_facts(server.startup_log),
            "first_ttft_seconds": first_tokens[0],
            "tenth_ttft_seconds": first_tokens[9],
            "requests": len(answers),
            "failed": sum(bool(answer.problems) for answer in answers),
        }
        if server.process.poll() is None:
            summary |= decode_steps(server.port, tokens)
        problems += server.problems()
        compiled = after_ready(compile_log, server)
    summary["compiled_after_ready"] = len(compiled["watch"])
    summary["kernels_that_vllm_names"] = len(compiled["vllm"])
    if eager:
        log = json_path.with_suffix(".eager.log")
        plain = [*args, "--enforce-eager"]
        with vllm_server(model, log=log, args=plain, env=variables, limit_seconds=limit) as server:
            steps = decode_steps(server.port, tokens)
        summary |= {f"eager_{name}": value for name, value in steps.items()}

    problems += [f"request {i}: {p}" for i, answer in enumerate(answers) for p in answer.problems]
    table = Table("measure", "value", title=f"readiness, {label.value}, {mtp} draft tokens")
    for name, value in summary.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    for kernel in (compiled["watch"] or compiled["vllm"])[:20]:
        console.print(f"compiled after ready: {escape(kernel)}", highlight=False)
    for problem in problems:
        console.print(f"[red]wrong:[/] {escape(problem)}", highlight=False)
    write_result(
        json_path,
        machine,
        benchmark="readiness",
        attention=label,
        mtp=mtp,
        vllm_args=with_graphs,
        env={**variables, "VLLM_SM12X_COMPILE_LOG": compile_log.name},
        summary=summary,
        first_ten_ttft_seconds=first_tokens,
        compiled_after_ready=compiled,
        problems=problems,
        answers=[dataclasses.asdict(answer) for answer in answers],
    )
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()
