# SPDX-License-Identifier: Apache-2.0
"""Where a prefill's compressed rows are unpacked: in the memory that vLLM's layers share.

The tokens of a prefill read the same rows, up to 512 of them each: unpacked once, they need not be
dequantised once for each token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from vllm_sm12x.integration.candidate_limits import COMPRESS_RATIOS
from vllm_sm12x.ops.fp8_ds_mla import HEAD_DIM
from vllm_sm12x.ops.sparse_mla.config import unpacks
from vllm_sm12x.vllm_api.workspace import workspace

# 256 MiB: one request of 1,048,576 tokens, in a layer of ratio 4.
MOST_ROWS = 2**18

_packed_only = False


class PrefillRows(NamedTuple):
    """The compressed rows that a batch's prefills have in layers of one ratio.

    Attributes:
        most: what none of them has more of, known to the host.
        lens: int32 [prefills].
    """

    most: int
    lens: torch.Tensor


def capacity(max_model_len: int) -> int:
    """Rows to have room for: those of two requests of the longest context, at the lowest ratio."""
    return min(MOST_ROWS, 2 * -(-max_model_len // min(COMPRESS_RATIOS)))


def reserve(rows: int) -> None:
    """Have room for `rows`; in a profile run, before the memory is measured and then fixed."""
    workspace(((rows, HEAD_DIM), torch.bfloat16))


def prefill_rows(metadata: Any, longest: int) -> dict[int, PrefillRows]:
    """By compress ratio.

    Args:
        metadata: vLLM's sliding-window metadata of a batch with prefills.
        longest: tokens that none of its prefills' requests has more of.
    """
    decodes = metadata.num_decodes
    lens = metadata.seq_lens[decodes : decodes + metadata.num_prefills]
    return {ratio: PrefillRows(longest // ratio, lens // ratio) for ratio in COMPRESS_RATIOS}


def room(rows: PrefillRows, *, tokens: int, width: int, capacity: int) -> torch.Tensor | None:
    """bf16 [prefills, most, 512] for `sparse_mla` to unpack into; None where it should not.

    Args:
        tokens, width: of the prefills together, and of each one's list of candidates.
        capacity: rows that there is room for.
    """
    requests = len(rows.lens)
    needed = requests * rows.most
    if _packed_only or needed > capacity or not unpacks(tokens, width, needed):
        return None
    (unpacked,) = workspace(((requests, rows.most, HEAD_DIM), torch.bfloat16))
    return unpacked


@contextmanager
def packed_only() -> Iterator[None]:
    """Prefills read packed rows meanwhile, as in a request whose rows are too many."""
    global _packed_only
    _packed_only = True
    try:
        yield
    finally:
        _packed_only = False
