# SPDX-License-Identifier: Apache-2.0
"""Which batches get CUDA graphs under speculative decoding, and in which mode.

A decode batch of r requests with k draft tokens each is r * (1 + k) tokens. vLLM captures 1, 2, 4
and multiples of 8 tokens, rounds them up to multiples of 1 + k, and pads a batch to the next size,
so with k = 2 four requests run as six: a third of the step is for nobody, and hangs of padded
requests are what the field reports (jasl/vllm-ds4-sm120-harness; vLLM #51593).
"""

import logging
import weakref
from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any, NamedTuple

from vllm_sm12x import device, knobs
from vllm_sm12x.log import get_logger, once

ALLOW = "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH"
# With up to so many requests each number of them has a graph of its own.
ALL_COUNTS = 64
# Beyond, (requests up to, in steps of). 56 sizes for 256 requests, 2 graphs each in
# FULL_AND_PIECEWISE; the harness measured 2.04 GiB for 134 graphs on an RTX PRO 6000.
PROGRESSION = ((32, 1), (64, 4), (128, 8), (256, 16))
# Where FULL_AND_PIECEWISE with speculation hung within 20 requests five times of five, and
# FULL_DECODE_ONLY never and at no cost (vLLM #40969): a GB10.
DECODE_ONLY_CAPABILITY = (12, 1)

logger = get_logger(__name__)


class LeftOpen(NamedTuple):
    """What the user has not decided by `--compilation-config`, before vLLM fills it in."""

    config: Callable[[], Any]  # a weak reference to the VllmConfig
    mode: bool
    sizes: bool


_left_open: ContextVar[LeftOpen | None] = ContextVar("cuda_graphs_left_open", default=None)


def request_counts(max_num_seqs: int) -> list[int]:
    """Numbers of requests, ascending, whose decode batches get a graph that fits them."""
    if max_num_seqs <= ALL_COUNTS:
        return list(range(1, max_num_seqs + 1))
    counts: list[int] = []
    last = 0
    for end, step in PROGRESSION:
        counts += range(last + step, end + 1, step)
        last = end
    most = min(max_num_seqs, last)
    return [count for count in counts if count < most] + [most]


def capture_sizes(
    *, max_num_seqs: int, query_len: int, stock: Collection[int], max_num_batched_tokens: int
) -> list[int]:
    """Tokens of the batches to capture, ascending.

    Args:
        query_len: tokens of a request in a decode batch, 1 + k.
        stock: what vLLM captures by itself. Kept where no decode batch comes: below one request's
            tokens, and above those of max_num_seqs requests.
        max_num_batched_tokens: no batch is larger.
    """
    requests = min(max_num_seqs, max_num_batched_tokens // query_len)
    if not requests:
        return sorted(stock)
    decode = {count * query_len for count in request_counts(requests)}
    return sorted(decode | {size for size in stock if not query_len <= size <= max(decode)})


def note_what_is_open(vllm_config: Any) -> None:
    """Before vLLM decides on graphs: remember what the user has left open."""
    compilation = vllm_config.compilation_config
    given = [
        value is not None
        for value in (compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size)
    ]
    # Both are set in a copy of a config that vLLM has filled in before.
    _left_open.set(
        None
        if all(given)
        else LeftOpen(
            weakref.ref(vllm_config),
            mode=compilation.cudagraph_mode is None,
            sizes=not any(given),
        )
    )


def settle(vllm_config: Any) -> None:
    """After vLLM has decided: what the user left open becomes what suits speculative decoding."""
    left_open = _left_open.get()
    _left_open.set(None)
    if left_open is None or left_open.config() is not vllm_config:
        return
    query_len = _query_len(vllm_config)
    compilation = vllm_config.compilation_config
    if query_len == 1 or not compilation.cudagraph_capture_sizes:
        return
    why = _settle_mode(compilation, left_open)
    sizes = compilation.cudagraph_mode.decode_mode().name == "FULL" and _settle_sizes(
        vllm_config, left_open, query_len
    )
    graphs = f"; {sizes}" if sizes else ""
    mode = compilation.cudagraph_mode.name
    said = f"CUDA graphs with {query_len - 1} draft tokens: {mode}, {why}{graphs}."
    once(logger, logging.INFO, said)


def rule_of_mode(capability: tuple[int, int] | None) -> str | None:
    """Why vLLM's FULL_AND_PIECEWISE becomes FULL_DECODE_ONLY under speculation; None: it stays."""
    if capability != DECODE_ONLY_CAPABILITY or knobs.given(ALLOW):
        return None
    return "as FULL_AND_PIECEWISE hangs on SM 12.1 (vLLM #40969)"


def _settle_mode(compilation: Any, left_open: LeftOpen) -> str:
    from vllm_sm12x.vllm_api.compilation import CUDAGraphMode

    if not left_open.mode:
        return "by --compilation-config"
    rule = rule_of_mode(device.effective_capability(device.first_visible_device()))
    if rule is not None and compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        return rule
    return f"kept by {ALLOW}=1" if knobs.given(ALLOW) else "vLLM's default"


def _settle_sizes(vllm_config: Any, left_open: LeftOpen, query_len: int) -> str:
    from vllm_sm12x.vllm_api.compilation import splits_tokens_among_ranks

    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    stock = compilation.cudagraph_capture_sizes
    if not left_open.sizes:
        return f"sizes by --compilation-config: {', '.join(map(str, stock))} tokens"
    if splits_tokens_among_ranks(compilation):
        return "sizes are vLLM's, multiples of the tensor-parallel size"
    sizes = capture_sizes(
        max_num_seqs=scheduler.max_num_seqs,
        query_len=query_len,
        stock=stock,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
    )
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = sizes[-1]
    counts = [size // query_len for size in sizes if size % query_len == 0]
    counts = [count for count in counts if count <= scheduler.max_num_seqs]
    return (
        f"{len(sizes)} sizes to {sizes[-1]} tokens (vLLM's own: {len(stock)} to {stock[-1]}), of "
        f"them {len(counts)} for decode batches of up to {counts[-1] if counts else 0} requests"
    )


def _query_len(vllm_config: Any) -> int:
    """Tokens of a request in a decode batch; 1 where that is not one number, as with drafts whose
    number depends on the batch."""
    speculative = vllm_config.speculative_config
    if speculative is None or getattr(speculative, "num_speculative_tokens_per_batch_size", None):
        return 1
    return 1 + (speculative.num_speculative_tokens or 0)
