# SPDX-License-Identifier: Apache-2.0
"""One prompt of 128K tokens in an engine that is ready for 1M: memory, KV blocks, first token.

The engine runs in this process, so that torch's allocator can be asked in the worker. A short
prompt comes first, and the long one is followed by another as long: what is compiled inside the
requests shows as the difference. Run it again with a smaller --max-model-len to see what depends
on that.
"""

import math
import os
import random
from pathlib import Path
from typing import Annotated, Any

import typer
from logprobs import check_attention
from rich.console import Console
from rich.table import Table
from server import ENGINE_ARGS, Attention, attention_env, offline
from serving import token_range

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MAX_MODEL_LEN = 1 << 20
PROMPT_TOKENS = 1 << 17
DECODE_TOKENS = 32
MAX_NUM_BATCHED_TOKENS = 8192


def engine_args(
    model: Path,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    eager: bool,
    gpu_memory_utilization: float,
) -> dict[str, Any]:
    """Arguments of vllm.LLM."""
    return {
        "model": str(model),
        **ENGINE_ARGS,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enable_chunked_prefill": True,
        "enforce_eager": eager,
        "gpu_memory_utilization": gpu_memory_utilization,
        "disable_log_stats": False,
        "seed": 0,
    }


def ask(llm: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Generate `tokens` greedy tokens. Seconds, and in words what is wrong with the answer."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    answer, metrics = output.outputs[0], output.metrics
    values = [
        step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
    problems = []
    if len(values) != tokens:
        problems.append(f"{len(values)} tokens came, expected {tokens}")
    if broken := [value for value in values if not math.isfinite(value)]:
        problems.append(f"{len(broken)} log-probabilities are not finite")
    return {
        "prompt_tokens": len(prompt),
        "output_tokens": len(values),
        "first_token_seconds": metrics.first_token_latency,
        "decode_seconds": metrics.last_token_ts - metrics.first_token_ts,
        "problems": problems,
    }


def beyond(start: dict[str, int], end: dict[str, int]) -> dict[str, int]:
    """Bytes of one worker beyond weights and KV cache.

    profile: at the peak of vLLM's profiling run, for which it leaves room. standing: when the
    engine is ready (workspaces, graphs' pools). transient: at the peak of the requests, on top of
    that. serving: the two together.
    """
    needed = start["weights"] + start["kv_cache"]
    return {
        "profile": start["profile_peak"],
        "standing": start["allocated"] - needed,
        "transient": end["peak"] - start["allocated"],
        "serving": end["peak"] - needed,
    }


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    attention: Annotated[Attention, typer.Option()],
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
    max_model_len: Annotated[int, typer.Option(min=1)] = MAX_MODEL_LEN,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = PROMPT_TOKENS,
    decode_tokens: Annotated[int, typer.Option(min=1)] = DECODE_TOKENS,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = MAX_NUM_BATCHED_TOKENS,
    eager: Annotated[bool, typer.Option("--eager", "--enforce-eager")] = False,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Of the GPU's memory, for this engine.")
    ] = ENGINE_ARGS["gpu_memory_utilization"],
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Start the engine, send one long prompt. Exit status 1 if its answer is wrong."""
    console = Console()
    if prompt_tokens + decode_tokens > max_model_len:
        raise typer.BadParameter(
            f"--prompt-tokens and --decode-tokens together are {prompt_tokens + decode_tokens}, "
            f"and --max-model-len is {max_model_len}"
        )
    os.environ.update(attention_env(attention), **offline(model))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    machine = describe_machine(revision)
    console.print(machine_line(machine), highlight=False)

    from in_engine import memory_in_use, reset_peak_memory
    from vllm import LLM

    args = engine_args(
        model,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        eager=eager,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    llm = LLM(**args)
    classes = check_attention(llm, attention)
    (start,) = llm.collective_rpc(memory_in_use)
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    console.print(f"attention: {', '.join(classes)}; ready, {blocks} free KV blocks")
    llm.collective_rpc(reset_peak_memory)

    rng, tokens = random.Random(0), token_range(model)
    # Two chunks of prefill, unless the long prompt itself has fewer.
    short = min(max_num_batched_tokens + 100, prompt_tokens)
    first = ask(llm, rng.choices(tokens, k=short), min(4, decode_tokens))
    answer = ask(llm, rng.choices(tokens, k=prompt_tokens), decode_tokens)
    again = ask(llm, rng.choices(tokens, k=prompt_tokens), decode_tokens)
    (end,) = llm.collective_rpc(memory_in_use)

    memory = beyond(start, end)
    problems = first["problems"] + answer["problems"] + again["problems"]
    title = f"{attention.value}: {prompt_tokens} tokens, max_model_len {max_model_len}"
    table = Table("measure", "value", title=title)
    for name in ("weights", "kv_cache"):
        table.add_row(name, f"{start[name] / 2**20:.0f} MiB")
    for name, size in memory.items():
        table.add_row(f"beyond weights and KV cache, {name}", f"{size / 2**20:.0f} MiB")
    table.add_row("free KV blocks", str(blocks))
    table.add_row("first token, short prompt", f"{first['first_token_seconds']:.2f} s")
    table.add_row("first token", f"{answer['first_token_seconds']:.2f} s")
    table.add_row("first token, second long prompt", f"{again['first_token_seconds']:.2f} s")
    table.add_row("buffer that all layers share", f"{end['workspace'] / 2**20:.0f} MiB")
    table.add_row(f"the other {decode_tokens - 1} tokens", f"{answer['decode_seconds']:.2f} s")
    console.print(table)
    for problem in problems:
        console.print(f"[red]wrong:[/] {problem}", highlight=False)
    if json_path:
        write_result(
            json_path,
            machine,
            benchmark="long_context",
            attention=attention.value,
            attention_classes=classes,
            engine_args=args,
            free_kv_blocks=blocks,
            memory_at_start=start,
            memory_at_end=end,
            beyond_weights_and_kv_cache=memory,
            short_prompt=first,
            long_prompt=answer,
            second_long_prompt=again,
            problems=problems,
        )
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()
