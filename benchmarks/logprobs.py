# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced log-probabilities of one attention against another's.

`collect` runs the model offline and writes, for every prompt, the log-probabilities of given
tokens: through prefill (prompt_logprobs) and, for the last tokens again, through decode (forced
token by token). `compare` sets runs beside each other; two stock runs are the noise floor.

With --mtp decode is greedy instead. `collect --forced` forces a run without speculation to the
tokens that were chosen so, and `compare` then shows what speculation changed.
"""

import json
import os
import random
import sys
import zipfile
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from server import ENGINE_ARGS, Attention, attention_env, offline
from serving import token_range

from vllm_sm12x.bench.machine import ROOT, describe_machine, machine_line, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

PROMPT_LENGTHS = (300, 1000, 2500, 6000)
TEXT_LENGTH = 1500
# More than one page of 128 compressed positions and one window of 128: decode crosses both.
DECODE_TOKENS = 160
# Smaller than the longest prompt, so that prefill is chunked and mixed with decode.
MAX_NUM_BATCHED_TOKENS = 2048


def forced_sequences(tokens: range, text_tokens: list[int], decode_tokens: int) -> list[list[int]]:
    """Token ids, one list a prompt: random ones from a fixed seed, then those of a text."""
    rng = random.Random(0)
    sequences = [rng.choices(tokens, k=length + decode_tokens) for length in PROMPT_LENGTHS]
    return [*sequences, text_tokens[: TEXT_LENGTH + decode_tokens]]


def greedy_sequences(
    path: Path, *, model: str, seed: int, tokens: range, decode_tokens: int
) -> list[list[int]]:
    """Token ids of the run at `path`, one list a prompt; the model chose the last `decode_tokens`.

    Raises ValueError unless `collect` wrote the file, with --mtp and with this model, seed and
    prompts. The text's prompt is not compared: only the engine has the tokenizer.
    """
    try:
        run = load_run(path)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} is not a file that collect wrote") from None
    if run["meta"]["forced"]:
        raise ValueError(f"{path} has forced tokens, and --forced takes those of a run with --mtp")
    for name, wanted in (("model", model), ("seed", seed)):
        found = run["meta"]["engine_args"][name]
        if found != wanted:
            raise ValueError(f"{path} is of {name} {found}, and this run is of {wanted}")
    counts = {len(decoded) + 1 for decoded in run["decode"]}
    if counts != {decode_tokens}:
        found = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"{path} has --decode-tokens {found}, and this run has {decode_tokens}")
    sequences = [ids.tolist() for ids in run["tokens"]]
    expected = forced_sequences(tokens, [], decode_tokens)
    if [s[:-decode_tokens] for s in sequences[:-1]] != [s[:-decode_tokens] for s in expected[:-1]]:
        raise ValueError(f"{path} has other prompts than this run")
    return sequences


def engine_args(
    model: Path,
    *,
    eager: bool,
    cudagraph_mode: str | None,
    mtp: int,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
) -> dict[str, Any]:
    """Arguments of vllm.LLM. Scheduling is synchronous, so that runs batch the same way."""
    args: dict[str, Any] = {
        "model": str(model),
        **ENGINE_ARGS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "enforce_eager": eager,
        "async_scheduling": False,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": False,
        "seed": 0,
    }
    if cudagraph_mode:
        args["compilation_config"] = {"cudagraph_mode": cudagraph_mode}
    if mtp:
        # vLLM refuses custom logits processors together with speculation.
        args["speculative_config"] = {"method": "mtp", "num_speculative_tokens": mtp}
    else:
        args["logits_processors"] = ["in_engine:ForcedTokens"]
    return args


def decode(
    llm: Any, prompts: list[list[int]], forced: list[list[int]] | None, count: int
) -> tuple[list[list[int]], list[np.ndarray], list[np.ndarray]]:
    """Generate `count` tokens after each prompt, all prompts in one batch.

    Returns the tokens, their log-probabilities, and those of the most likely token of each step.
    With `forced` the tokens are those; without, the greedy ones.
    """
    from in_engine import FORCED_TOKENS
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            logprobs=1,
            extra_args={FORCED_TOKENS: forced[i]} if forced else None,
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    if forced and tokens != forced:
        raise RuntimeError("the engine generated other tokens than the forced ones")
    steps = [output.outputs[0].logprobs for output in outputs]
    values = [_values(ids, table) for ids, table in zip(tokens, steps, strict=True)]
    # logprobs=1: vLLM's table of a step has the generated token and the most likely one.
    best = [np.array([max(x.logprob for x in step.values()) for step in table]) for table in steps]
    return tokens, values, best


def prefill(llm: Any, sequences: list[list[int]]) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each sequence, from its second one on."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False)
    return [
        _values(ids[1:], output.prompt_logprobs[1:])
        for ids, output in zip(sequences, outputs, strict=True)
    ]


def _values(tokens: list[int], steps: Any) -> np.ndarray:
    """The log-probability of each token, of vLLM's table of tokens for each step."""
    return np.array([step[token].logprob for token, step in zip(tokens, steps, strict=True)])


def check_attention(llm: Any, attention: Attention) -> list[str]:
    """The attention classes in the model. Raises RuntimeError if they are not those asked for."""
    from in_engine import attention_classes

    classes = sorted({name for names in llm.apply_model(attention_classes) for name in names})
    ours = [name.startswith("vllm_sm12x.") for name in classes]
    if not classes or not all(mine == (attention is not Attention.STOCK) for mine in ours):
        raise RuntimeError(f"asked for {attention.value} attention, but the model has {classes}")
    return classes


def save_run(
    path: Path,
    meta: dict[str, Any],
    sequences: list[list[int]],
    prefilled: list[np.ndarray],
    decoded: list[np.ndarray],
    best: list[np.ndarray],
) -> None:
    """Write one run.

    `decoded[i]` belongs to the last tokens of `sequences[i]`, `best[i]` to the most likely tokens
    in their places.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"meta": np.array(json.dumps({**meta, "prompts": len(sequences)}))}
    for i, tokens in enumerate(sequences):
        arrays |= {f"tokens_{i}": np.array(tokens), f"prefill_{i}": prefilled[i]}
        arrays |= {f"decode_{i}": decoded[i], f"best_{i}": best[i]}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_run(path: Path) -> dict[str, Any]:
    """A run as `save_run` wrote it: meta, and lists tokens, prefill, decode, best.

    Files from before --forced have no `best`.
    """
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        kinds = ["tokens", "prefill", "decode", *(["best"] if "best_0" in file else [])]
        lists = {kind: [file[f"{kind}_{i}"] for i in range(meta["prompts"])] for kind in kinds}
    return {"name": path.stem, "meta": meta, **lists}


def statistics(a: list[np.ndarray], b: list[np.ndarray]) -> dict[str, float]:
    """Distribution of |a - b| over all tokens; bias is the mean of a - b, with its standard error.

    Raises ValueError for lists of other shapes, and for values that are not finite.
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        raise ValueError("the two runs have log-probabilities of different numbers of tokens")
    difference = np.concatenate(a).astype(np.float64) - np.concatenate(b)
    if not np.isfinite(difference).all():
        raise ValueError(f"{(~np.isfinite(difference)).sum()} differences are not finite")
    size = np.abs(difference)
    return {
        "tokens": len(size),
        "mean": size.mean(),
        "p50": np.percentile(size, 50),
        "p99": np.percentile(size, 99),
        "max": size.max(),
        "bias": difference.mean(),
        "bias_standard_error": difference.std(ddof=1) / len(difference) ** 0.5,
    }


def gap_statistics(best: list[np.ndarray], chosen: list[np.ndarray]) -> dict[str, float | None]:
    """How often a chosen token is not the most likely one, and how far it is from that then.

    Both are log-probabilities of one run, one array a prompt. The quantiles of best - chosen, in
    nats, are over those `not_best` tokens only, and None where there are none.
    """
    gap = np.concatenate(best).astype(np.float64) - np.concatenate(chosen)
    below = gap[gap > 0]
    return {
        "tokens": len(gap),
        "not_best": len(below),
        "p50": np.percentile(below, 50) if len(below) else None,
        "p90": np.percentile(below, 90) if len(below) else None,
        "max": below.max() if len(below) else None,
    }


def greedy_gaps(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows: each run's greedy tokens (--mtp), in the runs forced to them and in that run itself.

    The row of the run itself is the control: what chose the tokens chose the most likely ones.
    """
    return [
        {"greedy": greedy["name"], "run": run["name"], **gap_statistics(run["best"], run["decode"])}
        for greedy in runs
        if not greedy["meta"]["forced"]
        for run in runs
        if run is greedy or (run["meta"]["forced"] and same_tokens(greedy, run))
        if "best" in run
    ]


def same_tokens(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs have the same tokens, prompt by prompt."""
    return len(a["tokens"]) == len(b["tokens"]) and all(
        map(np.array_equal, a["tokens"], b["tokens"])
    )


def compare_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the comparison: each run against the next one, and decode against prefill in each.

    A run of tokens that the model chose itself (--mtp) has the first kind of row only beside one
    that was forced to such tokens. Raises ValueError if runs to compare have different tokens.
    """
    rows = []
    for a, b in pairwise(runs):
        greedy = [not run["meta"]["forced"] for run in (a, b)]
        forced_to = [run["meta"].get("forced_to") for run in (a, b)]
        if any(greedy) and not any(forced_to):
            continue
        if not same_tokens(a, b):
            raise ValueError(f"{a['name']} and {b['name']} have different tokens")
        pair = f"{a['name']} - {b['name']}"
        rows += [
            {"pair": pair, "path": path, **statistics(a[path], b[path])}
            for path in ("prefill", "decode")
        ]
    for run in runs:
        pairs = zip(run["prefill"], run["decode"], strict=True)
        prefilled = [everything[-len(decoded) :] for everything, decoded in pairs]
        row = statistics(run["decode"], prefilled)
        rows.append({"pair": run["name"], "path": "decode - prefill", **row})
    return rows


@app.command()
def collect(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    attention: Annotated[Attention, typer.Option()],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    eager: Annotated[bool, typer.Option("--eager", "--enforce-eager")] = False,
    cudagraph_mode: Annotated[str | None, typer.Option(help="FULL, PIECEWISE, ...")] = None,
    mtp: Annotated[
        int, typer.Option(min=0, help="Speculative tokens; decode is greedy then, not forced.")
    ] = 0,
    forced: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Force the tokens of this --mtp run."),
    ] = None,
    decode_tokens: Annotated[int, typer.Option(min=2)] = DECODE_TOKENS,
    tensor_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Our layer, its kernel replaced by the fp32 oracle.")
    ] = False,
    dump: Annotated[
        Path | None, typer.Option(help="Instead: VLLM_TRITON_MLA_SPARSE_DUMP=1 to this file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Run the model once and write its log-probabilities."""
    console = Console()
    if oracle and (attention is not Attention.OURS or not eager):
        raise typer.BadParameter("--oracle needs --attention ours and --eager")
    if forced and mtp:
        raise typer.BadParameter("--forced takes a file of --mtp, but is for a run without it")
    args = engine_args(
        model,
        eager=eager,
        cudagraph_mode=cudagraph_mode,
        mtp=mtp,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )
    tokens = token_range(model)
    sequences = None
    if forced:
        try:
            sequences = greedy_sequences(
                forced,
                model=args["model"],
                seed=args["seed"],
                tokens=tokens,
                decode_tokens=decode_tokens,
            )
        except ValueError as error:
            raise typer.BadParameter(f"{error}.") from None
    os.environ.update(attention_env(attention), **offline(model))
    # The engine in this process: requests reach it in one order, and runs batch the same way.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if dump:
        if dump.exists():
            raise typer.BadParameter(f"--dump takes a new file, and {dump} exists")
        os.environ["VLLM_TRITON_MLA_SPARSE_DUMP"] = "1"
        os.environ["VLLM_TRITON_MLA_SPARSE_DUMP_PATH"] = str(dump)
    machine = describe_machine(revision)
    console.print(machine_line(machine), highlight=False)

    from vllm import LLM

    if oracle:
        from in_engine import use_oracle

        use_oracle()
    llm = LLM(**deepcopy(args))  # 0.23 puts its own objects into a speculative_config
    classes = check_attention(llm, attention)
    console.print(f"attention: {', '.join(classes)}")

    if sequences is None:
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        text_tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)
        sequences = forced_sequences(tokens, text_tokens, decode_tokens)
    prompts = [sequence[:-decode_tokens] for sequence in sequences]
    given = None if mtp else [sequence[-decode_tokens:] for sequence in sequences]
    if dump:
        expect_dump(console, llm, prompts, dump)
        return
    # Decode first: no prompt is in the prefix cache yet.
    generated, decoded, best = decode(llm, prompts, given, decode_tokens)
    sequences = [prompt + answer for prompt, answer in zip(prompts, generated, strict=True)]
    prefilled = prefill(llm, sequences)
    counters = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }
    meta = {
        "machine": machine,
        "attention": "oracle" if oracle else attention.value,
        "attention_classes": classes,
        "forced": not mtp,
        "forced_to": forced.name if forced else None,
        "engine_args": args,
        "counters": counters,
    }
    # The first generated token comes from the end of prefill.
    decoded_later, best_later = ([values[1:] for values in kind] for kind in (decoded, best))
    save_run(out, meta, sequences, prefilled, decoded_later, best_later)
    if counters:
        console.print(counters)
    everything = np.concatenate([*prefilled, *decoded])
    broken = int((~np.isfinite(everything)).sum())
    console.print(
        f"{out}: {len(sequences)} prompts, {len(everything)} log-probabilities, "
        f"mean {everything.mean():.4f}, {broken} not finite"
    )
    raise typer.Exit(1 if broken else 0)


def expect_dump(console: Console, llm: Any, prompts: list[list[int]], dump: Path) -> None:
    """Generate until the dump ends the engine. Raises RuntimeError if it does not, or not so."""
    from vllm import SamplingParams

    try:
        llm.generate({"prompt_token_ids": prompts[0]}, SamplingParams(max_tokens=2), use_tqdm=False)
    except Exception as error:
        console.print(f"ended with {type(error).__name__}: {escape(str(error))}")
        if str(dump) not in str(error):
            raise
    else:
        raise RuntimeError("VLLM_TRITON_MLA_SPARSE_DUMP=1 did not end the request")
    lines = [json.loads(line) for line in dump.read_text(encoding="utf-8").splitlines()]
    console.print(escape(f"{dump}: {len(lines)} JSON lines, the first is {lines[0]}"))


def gap_table(gaps: list[dict[str, Any]]) -> Table:
    """The rows of `greedy_gaps` as they are printed."""
    table = Table(
        *("greedy tokens of", "in", "tokens", "not the most likely", "p50", "p90", "max"),
        title="Greedy tokens that are not the most likely ones: log-prob of those minus theirs",
    )
    for row in gaps:
        names = ("p50", "p90", "max")
        spread = ["-" if row[name] is None else f"{row[name]:.2e}" for name in names]
        counts = [str(row["tokens"]), str(row["not_best"])]
        table.add_row(row["greedy"], row["run"], *counts, *spread)
    return table


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="OURS.npz STOCK.npz [STOCK_AGAIN.npz], or MTP.npz FORCED_TO_IT.npz"),
    ],
    json_path: Annotated[Path | None, typer.Option("--json", help="The result file.")] = None,
) -> None:
    """Set runs beside each other: each against the next one, and decode against prefill in each.

    Of greedy tokens (--mtp): how many a run forced to them finds not the most likely ones.
    """
    loaded = [load_run(path) for path in runs]
    try:
        rows = compare_runs(loaded)
    except ValueError as error:
        print(f"cannot compare: {error}.", file=sys.stderr)
        raise typer.Exit(1) from None
    console = Console(width=120)
    machine = loaded[0]["meta"]["machine"]
    console.print(machine_line(machine), highlight=False)
    table = Table(
        *("runs", "path", "tokens", "mean", "p50", "p99", "max", "bias ± standard error"),
        title="|difference| of log-probabilities of the same tokens",
    )
    for row in rows:
        spread = [f"{row[name]:.2e}" for name in ("mean", "p50", "p99", "max")]
        bias = f"{row['bias']:+.1e} ± {row['bias_standard_error']:.1e}"
        table.add_row(row["pair"], row["path"], str(row["tokens"]), *spread, bias)
    console.print(table)
    gaps = greedy_gaps(loaded)
    if gaps:
        console.print(gap_table(gaps))
    if json_path:
        metas = {run["name"]: run["meta"] for run in loaded}
        write_result(json_path, machine, benchmark="logprobs", runs=metas, rows=rows, gaps=gaps)


if __name__ == "__main__":
    app()
