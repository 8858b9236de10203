# SPDX-License-Identifier: Apache-2.0
"""The batches that a worker runs before it captures CUDA graphs, so that serving compiles nothing.

Every batch goes the way of requests: scheduler output, metadata, model, drafts, sampler. So it
reaches vLLM's kernels on that way as well as ours, with the strides and alignments of serving.
Token counts are those at which a kernel of ours is launched in another variant, and those that
Triton tells apart: 1, multiples of 16, and others. What no short prompt reaches, the kernels of
long contexts, is launched by itself.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vllm_sm12x import knobs
from vllm_sm12x.integration import indexer, providers, selection, unpacked_rows
from vllm_sm12x.integration.launch_variants import (
    Target,
    Widths,
    launch_policy,
    representatives,
)
from vllm_sm12x.log import get_logger
from vllm_sm12x.ops.launch import multiprocessors
from vllm_sm12x.ops.mqa_logits.config import FEW_KEYS_LIMIT
from vllm_sm12x.ops.sparse_mla import gluon_kernels
from vllm_sm12x.ops.sparse_mla.config import UNPACK_TOKENS

KNOB = "VLLM_SM12X_WARMUP"
SAMPLING_KINDS = (
    "greedy", "random", "top_k", "top_p", "top_k and top_p", "logprobs", "everything",
)  # fmt: skip
# 1, a multiple of 16, and others; and from 8 on vLLM's top-k and top-p take another kernel.
REQUESTS = (1, 2, 3, 5, 8, 16, 17, 32, 33)
TOKENS = (
    1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 48, 63, 64, 65, 128, 129, 256, 257, 512, 513, 1000, 1024,
)  # fmt: skip
# What a short prompt has, and none of the sizes above.
SHORT = 13
# A multiple of 16, for a prompt that joins.
EVEN = 32
# Numbers of blocks to zero that Triton tells apart.
BLOCKS_TO_ZERO = (1, 2, 16)
# Tokens past its prompt that a request has room for: a step's, with up to 15 drafts, and one more.
RESERVE = 17

logger = get_logger(__name__)
_lock = threading.Lock()
_done: set[tuple[str, "Batch"]] = set()


@dataclass(frozen=True)
class Batch:
    """Arguments of `vllm_api.warm_up.Engine.run`."""

    prompts: tuple[int, ...]
    sampling: str = "greedy"
    first_chunk: int | None = None
    drafts: tuple[int, ...] | None = None
    joining: int = 0
    staying: int = 0


def batches(
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    draft_tokens: int,
    state_block: int | None = None,
    prefill_tokens: Iterable[int] = (),
    decode_requests: Iterable[int] = (),
) -> list[Batch]:
    """What to run, small batches first, without repetition.

    Args:
        draft_tokens: k, of each request in a decode step.
        state_block: tokens after which a state is copied to another block.
        prefill_tokens, decode_requests: besides those that vLLM's own kernels tell apart.
    """
    query_len = 1 + draft_tokens
    longest = min(max_num_batched_tokens, max_model_len - RESERVE)
    # One request more joins a decode step, of which each has at least two tokens of prompt.
    room = min(max_num_seqs, max_num_batched_tokens // max(query_len, 2))
    found: list[Batch] = []
    # Of the largest tile of vLLM's MoE kernel both kinds too.
    most = {max_num_batched_tokens - 1, max_num_batched_tokens}
    for tokens in sorted({*TOKENS, *prefill_tokens, *most} - {0}):
        if tokens <= longest:
            found.append(Batch((tokens,)))
        elif tokens <= max_num_batched_tokens:
            found.append(Batch(_split(tokens, longest, max_num_seqs)))
    for requests in sorted({*REQUESTS, *decode_requests, max_num_seqs}):
        if requests > room:
            continue
        prompt = max(2, min(SHORT, max_num_batched_tokens // requests))
        prompts = (prompt,) * requests
        for count in sorted({0, draft_tokens}):
            # torch.compile tells 1 apart, too: vLLM compiles what corrects its counts of tokens for
            # one request after one, some after one, some after some, and one after some.
            staying = int(requests > 1 and count == draft_tokens)
            found.append(Batch(prompts, drafts=(count,) * requests, staying=staying))
        if draft_tokens and requests > 1:
            some = tuple(draft_tokens * (place % 2) for place in range(requests))
            found.append(Batch(prompts, drafts=some))
        joining = min(2 * SHORT + requests % 3, max_num_batched_tokens - requests * query_len)
        if requests < max_num_seqs and joining > query_len:
            for count in sorted({0, draft_tokens}):
                found.append(Batch(prompts, drafts=(count,) * requests, joining=joining))
    # A prompt of a multiple of 16 tokens whose place among the lengths is not one of 16 bytes.
    if max_num_seqs > 1 and max_num_batched_tokens - query_len >= EVEN:
        found.append(Batch((SHORT,), drafts=(draft_tokens,), joining=EVEN))
    chunk = min(64, longest // 2)
    if chunk > 1:
        found += [Batch((2 * chunk + odd,), first_chunk=chunk) for odd in (-1, 0)]
    if state_block is not None and state_block + SHORT <= longest:
        found.append(Batch((state_block + SHORT,), first_chunk=state_block))
    for sampling in SAMPLING_KINDS:
        for requests in REQUESTS[:-2]:
            if requests <= min(room, max_num_batched_tokens // SHORT):
                drafts = (draft_tokens,) * requests
                found.append(Batch((SHORT,) * requests, sampling=sampling, drafts=drafts))
    fitting = [batch for batch in found if max(*batch.prompts, batch.joining) <= longest]
    return list(dict.fromkeys(fitting))


def has_linear_attention(vllm_config: Any) -> bool:
    """Whether layers of the model keep a state by linear attention, as a Gated DeltaNet does.

    vLLM compiles their kernels for its own batches, not for those of speculative decoding.
    """
    text_config = vllm_config.model_config.hf_text_config
    return "linear_attention" in (getattr(text_config, "layer_types", None) or ())


def warm_up(worker: Any) -> None:
    """Run the batches, once in a process. Raises RuntimeError where one fails."""
    from vllm_sm12x.vllm_api import warm_up as steps

    config = worker.vllm_config
    ours = selection.serves(config) and selection.choose(config).ours
    if not (ours or has_linear_attention(config) or knobs.get(KNOB)):
        return
    obstacle = steps.obstacle(worker)
    if obstacle is not None:
        logger.warning("No warm-up by vllm-sm12x: this engine %s.", obstacle)
        return
    with _lock:
        # A second engine of the process finds its kernels compiled where the first had them.
        model = config.model_config.model
        planned = _plan(worker, ours, steps.state_block(worker))
        plan = [batch for batch in planned if (model, batch) not in _done]
        if not plan:
            return
        start = time.perf_counter()
        if ours and providers.on_sm12x_path():
            _launch_long_contexts(config, worker.device)
        if ours:
            steps.launch_prefill_metadata(config, worker.device)
        engine = steps.Engine(worker, RESERVE)
        shown = track(
            plan,
            "Warming up",
            console=Console(stderr=True),
            disable=not steps.is_global_first_rank(),
        )
        with steps.without_graphs(worker):
            engine.zero_blocks(BLOCKS_TO_ZERO)
            for batch in shown:
                try:
                    engine.run(**vars(batch))
                    if ours and sum(batch.prompts) >= UNPACK_TOKENS:
                        with unpacked_rows.packed_only():
                            engine.run(**vars(batch))
                except Exception as error:
                    raise RuntimeError(
                        f"The warm-up failed at {batch}: {type(error).__name__}: {error}; {KNOB}=0 "
                        "leaves it out, and requests wait while kernels compile."
                    ) from error
        steps.finish()
        _done.update((model, batch) for batch in plan)
        logger.info("Warmed up with %d batches in %.1f s.", len(plan), time.perf_counter() - start)


def _plan(worker: Any, ours: bool, state_block: int | None) -> list[Batch]:
    config = worker.vllm_config
    scheduler, speculative = config.scheduler_config, config.speculative_config
    draft_tokens = speculative.num_speculative_tokens if speculative else 0
    own: dict[str, Any] = {}
    if ours:
        most = scheduler.max_num_batched_tokens
        widths, query_len = Widths.of(config), 1 + draft_tokens
        target = Target(
            multiprocessors("worker", worker.device),
            launch_policy(),
            **gluon_kernels(worker.device),
            attention_only=not providers.on_sm12x_path(),
        )

        def of(counts: Iterable[int]) -> list[int]:
            return representatives(widths, counts, target)

        decodes = range(query_len, scheduler.max_num_seqs * query_len + 1, query_len)
        own = {
            "prefill_tokens": of(range(1, most + 1)),
            "decode_requests": [tokens // query_len for tokens in of(decodes)],
        }
    return batches(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=config.model_config.max_model_len,
        draft_tokens=draft_tokens,
        state_block=state_block,
        **own,
    )


def _launch_long_contexts(vllm_config: Any, device: torch.device) -> None:
    """Index scores of more keys than a warm-up's prompt has, and of each kind of row stride."""
    if indexer.in_one_pass() or providers.chosen("mqa_logits").name != "triton":
        return
    heads = vllm_config.model_config.hf_text_config.index_n_heads
    e4m3 = torch.float8_e4m3fn
    score = providers.implementation("mqa_logits")
    for keys in (1, 3, 16, FEW_KEYS_LIMIT + 1, FEW_KEYS_LIMIT + 16):
        limits = torch.zeros(1, dtype=torch.int32, device=device)
        score(
            torch.empty(1, heads, indexer.HEAD_DIM, dtype=e4m3, device=device),
            torch.empty(keys, indexer.HEAD_DIM, dtype=e4m3, device=device),
            torch.empty(keys, device=device),
            torch.empty(1, heads, device=device),
            limits,
            limits,
            out=torch.empty(1, keys, device=device),
        )


def _split(tokens: int, longest: int, requests: int) -> tuple[int, ...]:
    """As few prompts as hold `tokens`, or as many tokens as `requests` prompts hold."""
    full, rest = divmod(tokens, max(1, longest))
    prompts = (longest,) * full + ((rest,) if rest else ())
    return prompts[:requests]
