# SPDX-License-Identifier: Apache-2.0
"""How many compressed rows each token of a batch sees, in one kernel.

vLLM builds this metadata for each group of KV caches, five times in a decode step with a draft. As
nine operations of torch that was 1.2 of 16 ms of the host, with a profiler.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops.launch import on_device

COMPRESS_RATIOS = (4, 128)
_BLOCK = 256
_POINTERS = [
    "requests_ptr",
    "seq_lens_ptr",
    "starts_ptr",
    "valid_ptr",
    "first_ptr",
    "second_ptr",
]


# What changes from batch to batch must not compile another variant while requests wait.
@triton.jit(do_not_specialize=["tokens", "num_requests"], do_not_specialize_on_alignment=_POINTERS)
def _candidate_limits_kernel(
    requests_ptr,
    seq_lens_ptr,
    starts_ptr,
    valid_ptr,
    first_ptr,
    second_ptr,
    tokens,
    num_requests,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    # Of a padded token the request is left over from another step.
    request = tl.load(requests_ptr + token, mask=inside, other=0)
    request = tl.minimum(tl.maximum(request, 0), num_requests - 1)
    end = tl.load(starts_ptr + request + 1, mask=inside, other=0)
    position = tl.load(seq_lens_ptr + request, mask=inside, other=0) - end + token
    valid = tl.load(valid_ptr + token, mask=inside, other=0) != 0
    seen = tl.where(valid, position + 1, 0)
    tl.store(first_ptr + token, seen // FIRST, mask=inside)
    tl.store(second_ptr + token, seen // SECOND, mask=inside)


def candidate_limits(metadata: Any, buffers: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Compressed rows that each token sees: (position + 1) // ratio, 0 for a padded token.

    Args:
        metadata: vLLM's sliding-window metadata: seq_lens int32 [R], query_start_loc int32 [R + 1],
            token_to_req_indices int32 [T], is_valid_token bool [at least T].
        buffers: compress ratio -> int32 [at least T], for each of COMPRESS_RATIOS. Written.

    Returns:
        The first T elements of the buffers.
    """
    requests = metadata.token_to_req_indices
    tokens = requests.shape[0]
    if tokens:
        with on_device(requests.device):
            _candidate_limits_kernel[(triton.cdiv(tokens, _BLOCK),)](
                requests,
                metadata.seq_lens,
                metadata.query_start_loc,
                metadata.is_valid_token.view(torch.uint8),
                *(buffers[ratio] for ratio in COMPRESS_RATIOS),
                tokens,
                metadata.seq_lens.shape[0],
                *COMPRESS_RATIOS,
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return {ratio: buffer[:tokens] for ratio, buffer in buffers.items()}
