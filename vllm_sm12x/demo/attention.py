# SPDX-License-Identifier: Apache-2.0
"""The attention of the tiny model's layers on a CPU: Triton's interpreter against the oracle.

Rows are packed into paged caches and indexed as vLLM does it for prefill, decode and speculative
tokens, and `sparse_mla` is compared with its oracle. So that a wrong index shows too, the oracle is
compared with dense attention over the same rows, which knows masks, and no pages or indices.

Runs as `python -m vllm_sm12x.demo.attention` with TRITON_INTERPRET=1, which Triton reads when it
is imported. The exit status is 0 if every comparison holds, else 1.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from vllm_sm12x.ops import pack_fp8_ds_mla, sparse_mla, unpack_fp8_ds_mla
from vllm_sm12x.ops.sparse_mla.reference import sparse_mla_reference
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA
from vllm_sm12x.tiny_checkpoint.deepseek_v4 import CONFIG

HEADS, HEAD_DIM = CONFIG["num_attention_heads"], CONFIG["head_dim"]
WINDOW, TOP_K = CONFIG["sliding_window"], CONFIG["index_topk"]
SWA_BLOCK, BLOCK = 64, 256  # tokens of a page: vLLM's window cache, and `--block-size 256`
# Oracle and dense attention are both plain torch on the same fp32 rows.
ORACLE_TOLERANCE = 1e-5
# What rows hold that no query may read: far from the others, so that a wrong read shows.
FORBIDDEN = 1e4


@dataclass(frozen=True)
class Request:
    """A sequence of which the positions `first` .. `first + count - 1` are queries now."""

    first: int
    count: int

    @property
    def length(self) -> int:
        return self.first + self.count


@dataclass(frozen=True)
class Phase:
    """One batch. As in vLLM, decodes come first and get a call of their own."""

    name: str
    decodes: tuple[Request, ...] = ()
    prefills: tuple[Request, ...] = ()


# Positions at, before and after the edges of the window (128), of a page (64 and 256 tokens), of a
# compressed row (4 and 128 tokens), and past 4 * 512 tokens, where top-k has to choose.
PHASES = (
    Phase("prefill", prefills=(Request(0, 4), Request(2301, 3))),
    Phase("decode", decodes=(Request(0, 1), Request(127, 1), Request(128, 1), Request(2431, 1))),
    Phase(
        "mixed, q_len 2",
        decodes=(Request(511, 2), Request(2303, 2)),
        prefills=(Request(63, 2),),
    ),
)
LAYER_KINDS = {0: "window only", 4: f"ratio 4, top-{TOP_K}", 128: "ratio 128"}
RATIOS = tuple(sorted(set(CONFIG["compress_ratios"])))


@dataclass(frozen=True)
class Outcome:
    """One layer kind in one phase; errors are ||a - b|| / ||b||."""

    ratio: int
    phase: str
    tokens: int
    candidates: int  # of the token that has most
    kernel_error: float  # sparse_mla against the oracle
    oracle_error: float  # the oracle against dense attention

    @property
    def ok(self) -> bool:
        # A NaN compares false.
        return self.kernel_error <= SPARSE_MLA.tolerance and self.oracle_error <= ORACLE_TOLERANCE


class PagedCache:
    """Packed pages of several requests in shuffled order, and what they hold, unpaged.

    Attributes:
        cache: uint8 [pages, block, 584].
        table: int32 [requests, pages of the longest].
        rows: per request fp32 [length, 512], as the cache's format rounds them.
    """

    def __init__(
        self, lengths: Sequence[int], first_kept: Sequence[int], block: int, gen: torch.Generator
    ) -> None:
        """Random rows from `first_kept` of each request on; those before are forbidden."""
        self.block = block
        pages = [-(-length // block) for length in lengths]
        order = torch.randperm(sum(pages) + 2, generator=gen)
        content = torch.full((len(order), block, HEAD_DIM), FORBIDDEN, dtype=torch.bfloat16)
        # Entries past a request's own pages lead to a page that nobody owns.
        self.table = order[-1].repeat(len(lengths), max(pages, default=0)).to(torch.int32)
        self.rows = []
        for i, (length, kept) in enumerate(zip(lengths, first_kept, strict=True)):
            own, order = order[: pages[i]], order[pages[i] :]
            self.table[i, : pages[i]] = own
            rows = _random_rows(length, gen)
            rows[:kept] = FORBIDDEN
            positions = torch.arange(length)
            content[own[positions // block], positions % block] = rows
            self.rows.append(unpack_fp8_ds_mla(pack_fp8_ds_mla(rows[:, None]))[:, 0])
        self.cache = pack_fp8_ds_mla(content)

    def slots(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        """Global slots of a request's positions."""
        page = self.table[request, positions // self.block]
        return page * self.block + positions % self.block


def _random_rows(count: int, gen: torch.Generator) -> torch.Tensor:
    """bf16 [count, 512]; magnitudes differ from scale tile to scale tile by up to 64 times."""
    rows = torch.randn(count, 8, HEAD_DIM // 8, generator=gen)
    rows *= torch.exp2(torch.randint(-3, 3, (count, 8, 1), generator=gen).float())
    return rows.flatten(1).to(torch.bfloat16)


class Batch:
    """The inputs of one layer of one phase: caches, queries, and each token's candidates."""

    def __init__(self, ratio: int, phase: Phase, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.ratio = ratio
        self.requests = (*phase.decodes, *phase.prefills)
        self.num_prefills = len(phase.prefills)
        self.num_decode_tokens = sum(request.count for request in phase.decodes)
        lengths = [request.length for request in self.requests]
        oldest = [max(0, request.first - WINDOW + 1) for request in self.requests]
        self.window = PagedCache(lengths, oldest, SWA_BLOCK, gen)
        self.tokens = [
            (i, request.first + j)
            for i, request in enumerate(self.requests)
            for j in range(request.count)
        ]
        self.q = torch.randn(len(self.tokens), HEADS, HEAD_DIM, generator=gen).to(torch.bfloat16)
        self.sink = torch.randn(HEADS, generator=gen)
        self.compressed = None
        self.chosen: list[torch.Tensor] = []
        if ratio:
            counts = [length // ratio for length in lengths]
            self.compressed = PagedCache(counts, [0] * len(counts), BLOCK // ratio, gen)
            # Ratio 4 has an indexer that picks 512 of the visible rows; here a random one.
            for _, position in self.tokens:
                visible = torch.randperm((position + 1) // ratio, generator=gen)
                self.chosen.append(visible[:TOP_K] if ratio == 4 else visible.sort().values)

    def calls(self) -> Iterator[dict[str, Any]]:
        """Arguments of `sparse_mla`: one call for the decodes, one for the prefills."""
        end = len(self.tokens)
        for start, stop in ((0, self.num_decode_tokens), (self.num_decode_tokens, end)):
            if start < stop:
                yield self._call(range(start, stop), decode=start < self.num_decode_tokens)

    def _call(self, tokens: range, *, decode: bool) -> dict[str, Any]:
        windows = []
        for i, position in (self.tokens[t] for t in tokens):
            seen = torch.arange(max(0, position - WINDOW + 1), position + 1)
            windows.append(self.window.slots(i, seen))
        arguments: dict[str, Any] = {
            "q": self.q[tokens.start : tokens.stop],
            "swa_cache": self.window.cache,
            "swa_indices": padded(windows, WINDOW),
            "swa_lens": torch.tensor([len(slots) for slots in windows], dtype=torch.int32),
            "sink": self.sink,
            "softmax_scale": HEAD_DIM**-0.5,
        }
        if self.compressed is None:
            return arguments
        chosen = [self.chosen[t] for t in tokens]
        width = max(TOP_K if self.ratio == 4 else 128, *map(len, chosen))
        arguments["extra_cache"] = self.compressed.cache
        if self.ratio == 128 and decode:
            # vLLM hands over global slots and lengths here, positions in all other cases.
            slots = [
                self.compressed.slots(self.tokens[t][0], rows)
                for t, rows in zip(tokens, chosen, strict=True)
            ]
            arguments["extra_indices"] = padded(slots, width)
            arguments["extra_lens"] = torch.tensor([len(x) for x in slots], dtype=torch.int32)
            return arguments
        arguments["extra_indices"] = padded(chosen, width)
        arguments["extra_block_table"] = self.compressed.table
        arguments["request_ids"] = torch.tensor(
            [self.tokens[t][0] for t in tokens], dtype=torch.int32
        )
        return arguments

    def dense(self) -> torch.Tensor:
        """fp64 [T, H, 512]: softmax over all rows of a token's request, masked by position."""
        outputs = []
        for t, (i, position) in enumerate(self.tokens):
            rows = self.window.rows[i].double()
            age = position - torch.arange(len(rows))
            mask = (age >= 0) & (age < WINDOW)
            if self.compressed is not None:
                extra = self.compressed.rows[i].double()
                last_token = (torch.arange(len(extra)) + 1) * self.ratio - 1
                picked = torch.isin(torch.arange(len(extra)), self.chosen[t])
                rows = torch.cat([rows, extra])
                mask = torch.cat([mask, (last_token <= position) & picked])
            scores = self.q[t].double() @ rows.T * HEAD_DIM**-0.5
            scores = scores.masked_fill(~mask, -math.inf)
            with_sink = torch.cat([scores, self.sink.double()[:, None]], 1).softmax(1)
            outputs.append(with_sink[:, :-1] @ rows)
        return torch.stack(outputs)


def padded(rows: list[torch.Tensor], width: int) -> torch.Tensor:
    """int32 [T, width], -1 after each row's end."""
    out = torch.full((len(rows), width), -1, dtype=torch.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def _attend(op: Callable[..., Any], calls: Sequence[dict[str, Any]]) -> torch.Tensor:
    return torch.cat([op(**call) for call in calls])


def check(ratio: int, phase: Phase) -> Outcome:
    """Run one layer kind in one phase and compare."""
    batch = Batch(ratio, phase)
    calls = list(batch.calls())
    got, want = _attend(sparse_mla, calls), _attend(sparse_mla_reference, calls)
    return Outcome(
        ratio=ratio,
        phase=phase.name,
        tokens=len(batch.tokens),
        candidates=max(
            min(position + 1, WINDOW) + (len(batch.chosen[t]) if ratio else 0)
            for t, (_, position) in enumerate(batch.tokens)
        ),
        kernel_error=_relative_error(got, want),
        oracle_error=_relative_error(want, batch.dense()),
    )


def run_attention(
    *,
    ratios: Sequence[int] = RATIOS,
    phases: Sequence[Phase] = PHASES,
    console: Console | None = None,
) -> int:
    """Check every layer kind in every phase, print a table, return the exit status."""
    console = console or Console()
    layers = CONFIG["compress_ratios"][: CONFIG["num_hidden_layers"]]
    console.print(
        f"Attention of the {len(layers)} layers of a tiny DeepSeek V4 (compress ratios "
        f"{', '.join(map(str, layers))}; {HEADS} heads, {HEAD_DIM}-dim rows) in Triton's "
        "interpreter. It takes about a minute."
    )
    outcomes = []
    pairs = [(ratio, phase) for ratio in ratios for phase in phases]
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(pairs))
        for ratio, phase in pairs:
            progress.update(task, description=f"{LAYER_KINDS[ratio]}: {phase.name}")
            outcomes.append(check(ratio, phase))
            progress.advance(task)
    console.print(_table(outcomes))
    console.print(
        "kernel: sparse_mla against the fp32 oracle. oracle: the oracle, which reads the packed "
        "pages, against dense attention over unpaged rows. Errors are relative, in the norm.",
        style="dim",
    )
    failed = sum(not outcome.ok for outcome in outcomes)
    if failed:
        console.print(f"FAILED: {failed} of {len(outcomes)} comparisons are out of tolerance.")
    else:
        console.print(f"All {len(outcomes)} comparisons are within tolerance.")
    return 1 if failed else 0


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("layer kind", "phase"):
        table.add_column(name)
    kernel, oracle = f"kernel\n<= {SPARSE_MLA.tolerance:.0e}", f"oracle\n<= {ORACLE_TOLERANCE:.0e}"
    for name in ("tokens", "candidates", kernel, oracle, "ok"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        table.add_row(
            LAYER_KINDS[outcome.ratio],
            outcome.phase,
            str(outcome.tokens),
            str(outcome.candidates),
            f"{outcome.kernel_error:.1e}",
            f"{outcome.oracle_error:.1e}",
            "yes" if outcome.ok else "NO",
        )
    return table


if __name__ == "__main__":
    sys.exit(run_attention())
