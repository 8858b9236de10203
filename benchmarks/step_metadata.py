# SPDX-License-Identifier: Apache-2.0
"""What the attention metadata of a step takes the host, with and without one of our changes.

`attention.token_to_request` is on and off in turns of steps of one engine, the whole SM12x path.
Eager: a CUDA graph keeps the buffer in which the mapping was when it was captured. Then every
mapping that a builder gets is compared with what the step's request lengths say.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from engine import numbers, random_prompts
from rich.console import Console
from rich.table import Table
from server import Attention, attention_env, engine_args, offline
from serving import token_range

from vllm_sm12x.bench.machine import describe_machine, machine_line, write_result

CHANGE = "attention.token_to_request"
TURN = 16  # steps
CONTEXT = 512
CHECKED_ANSWER = 128
# Of each state, that a median needs.
ENOUGH_STEPS = 4 * TURN

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class Turns:
    """Steps of a V1 model runner, in turns with and without the change.

    Attributes:
        micros: (requests, whether the change was on) -> microseconds of each step's metadata.
        asked, wrong: mappings that were checked and not right, by whether the change was on.
        checking: whether they are; it waits for the GPU.
    """

    def __init__(
        self, shared: Callable[..., torch.Tensor], alone: Callable[..., torch.Tensor]
    ) -> None:
        self.shared, self.alone = shared, alone
        self.steps = 0
        self.checking = False
        self.micros: dict[tuple[int, bool], list[float]] = defaultdict(list)
        self.asked: Counter[bool] = Counter()
        self.wrong: Counter[bool] = Counter()

    @property
    def on(self) -> bool:
        return self.steps // TURN % 2 == 0

    def metadata(self, original: Callable[..., Any], runner: Any, *args: Any, **more: Any) -> Any:
        """Around the runner's method. Drafts that follow belong to this step."""
        self.steps += 1
        start = time.perf_counter()
        result = original(runner, *args, **more)
        micros = 1e6 * (time.perf_counter() - start)
        if not self.checking:
            self.micros[runner.input_batch.num_reqs, self.on].append(micros)
        return result

    def mapping(self, common: Any, buffer: torch.Tensor) -> torch.Tensor:
        """In place of CommonAttentionMetadata's method."""
        mapping = (self.shared if self.on else self.alone)(common, buffer)
        if self.checking:
            lengths = common.query_start_loc_cpu.diff().long()
            right = torch.arange(len(lengths)).repeat_interleave(lengths)
            right = right[: common.num_actual_tokens].tolist()
            self.asked[self.on] += 1
            self.wrong[self.on] += mapping[: len(right)].tolist() != right
        return mapping

    def rows(self) -> list[dict[str, Any]]:
        """Medians and quartiles of each number of requests that had enough steps of both."""
        rows = []
        for requests in sorted({requests for requests, _ in self.micros}):
            both = [self.micros[requests, on] for on in (True, False)]
            if min(map(len, both)) < ENOUGH_STEPS:
                continue
            quartiles = [np.percentile(micros, (25, 50, 75)).tolist() for micros in both]
            rows.append(
                {
                    "requests": requests,
                    "steps": [len(micros) for micros in both],
                    "with_us": quartiles[0],
                    "without_us": quartiles[1],
                    "ratio": quartiles[0][1] / quartiles[1][1],
                }
            )
        return rows


def take_turns() -> Turns:
    """Put Turns into this process' vLLM. Raises ValueError where the change is not active."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_sm12x import changes

    (outcome,) = [one for one in changes.report() if one.change.name == CHANGE]
    if outcome.state.value != "active":
        raise ValueError(f"{CHANGE} is {outcome.state.value}: {outcome.detail}")
    shared = CommonAttentionMetadata.token_to_req_indices
    turns = Turns(shared, shared.__wrapped__)
    build = GPUModelRunner._build_attention_metadata

    def metadata(runner: Any, *args: Any, **more: Any) -> Any:
        return turns.metadata(build, runner, *args, **more)

    def mapping(common: Any, buffer: torch.Tensor) -> torch.Tensor:
        return turns.mapping(common, buffer)

    GPUModelRunner._build_attention_metadata = metadata
    CommonAttentionMetadata.token_to_req_indices = mapping
    return turns


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="The checkpoint's directory.")],
    json_path: Annotated[Path, typer.Option("--json", help="The result file to write.")],
    batches: Annotated[str, typer.Option(help="Requests at a time.")] = "1,8,32",
    output_len: Annotated[
        int, typer.Option(min=2 * ENOUGH_STEPS, help="Tokens of an answer.")
    ] = 320,
    mtp: Annotated[int, typer.Option(min=0, help="Speculative tokens of the MTP layer.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Commit, for a tree without git.")] = None,
) -> None:
    """Time metadata, then check mappings. Exit status 1 if one with the change is wrong."""
    console = Console()
    sizes = numbers(batches)
    os.environ.update(attention_env(Attention.PROXY), **offline(model))
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_SM12X_WARMUP": "0"}
    machine = {**describe_machine(revision), "label": "proxy"}
    console.print(machine_line(machine), highlight=False)

    from vllm import LLM, SamplingParams

    args = {**engine_args(model), "max_num_seqs": sizes[-1], "enforce_eager": True}
    if mtp:
        args["speculative_config"] = {"method": "mtp", "num_speculative_tokens": mtp}
    llm = LLM(str(model), **args)
    turns = take_turns()
    prompts = [
        {"prompt_token_ids": prompt}
        for prompt in random_prompts(sizes[-1], CONTEXT, token_range(model))
    ]

    def answer(batch: int, tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        llm.generate(prompts[:batch], params, use_tqdm=False)

    answer(sizes[-1], 2 * TURN)  # what first steps compile
    turns.micros.clear()
    for size in sizes:
        answer(size, output_len)
    turns.checking = True
    answer(min(4, sizes[-1]), CHECKED_ANSWER)

    rows = turns.rows()
    title = f"attention metadata of a step, {mtp} draft tokens: medians and quartiles"
    table = Table("requests", "with, us", "without, us", "ratio", title=title)
    for row in rows:
        cells = [
            f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
            for low, median, high in (row["with_us"], row["without_us"])
        ]
        table.add_row(str(row["requests"]), *cells, f"{row['ratio']:.2f}")
    console.print(table)
    problems = [] if rows else ["no number of requests had steps enough of the V1 model runner"]
    for on, state in ((True, "with"), (False, "without")):
        console.print(f"mappings {state} the change: {turns.wrong[on]} of {turns.asked[on]} wrong")
    if turns.wrong[True] or not turns.asked[True]:
        problems.append(f"{turns.wrong[True]} of {turns.asked[True]} mappings are wrong")
    write_result(
        json_path,
        machine,
        benchmark="step metadata",
        mtp=mtp,
        rows=rows,
        checked=[turns.asked[True], turns.asked[False]],
        wrong=[turns.wrong[True], turns.wrong[False]],
        problems=problems,
    )
    for problem in problems:
        console.print(f"[red]wrong:[/] {problem}", highlight=False)
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    app()
