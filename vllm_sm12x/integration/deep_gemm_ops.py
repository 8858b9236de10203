# SPDX-License-Identifier: Apache-2.0
"""The ops of `vllm_sm12x.ops` on DeepGEMM, through vLLM's wrappers of it.

Arguments and results are those of our ops, with these exceptions: the scores of keys that a row of
`mqa_logits` does not see are whatever was in memory, not -inf; scores given an `out` are copied to
it; and `hc_prenorm_gemm` multiplies in TF32.
"""

import torch

from vllm_sm12x.ops.launch import multiprocessors
from vllm_sm12x.vllm_api import deep_gemm

# Rows of one request that DeepGEMM's paged kernel takes in one go outside the SM100 family
# (vLLM's DeepseekV32IndexerMetadataBuilder flattens above it too).
MAX_NEXT_N = 2
# (rows of a, rows of b, depth) that share one scale.
SCALE_RECIPE = (1, 128, 128)


def mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.mqa_logits`, fp32 [M, N], unspecified outside each row's [ks, ke)."""
    return _into(out, deep_gemm.mqa_logits(q.contiguous(), k, k_scale, weights, ks, ke))


def paged_mqa_logits(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_model_len: int,
    clean_logits: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.paged_mqa_logits`, fp32 [B * next_n, max_model_len], unspecified past each row's
    context unless `clean_logits`."""
    requests, next_n, heads, head_dim = q.shape
    lens = context_lens
    if lens.dim() == 1:
        steps = torch.arange(1 - next_n, 1, dtype=torch.int32, device=lens.device)
        lens = lens.unsqueeze(1) + steps
    lens = lens.clamp(min=0)
    if next_n > MAX_NEXT_N:
        q = q.reshape(requests * next_n, 1, heads, head_dim)
        lens = lens.reshape(-1, 1)
        block_table = block_table.repeat_interleave(next_n, dim=0)
    sms = multiprocessors("q", q.device)
    schedule = deep_gemm.wrappers().get_paged_mqa_logits_metadata(lens, cache.shape[1], sms)
    logits = deep_gemm.paged_mqa_logits(
        q.contiguous(), cache, weights, lens, block_table, schedule, max_model_len, clean_logits
    )
    return _into(out, logits)


def fp8_einsum(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.fp8_einsum`, bf16 [T, G, D].

    On SM10x and SM12x DeepGEMM packs scales as UE8M0, which holds powers of two only.
    """
    if out is None:
        out = a.new_empty((*a.shape[:2], b.shape[1]), dtype=torch.bfloat16)
    if out.numel():
        deep_gemm.wrappers().fp8_einsum(
            "bhr,hdr->bhd",
            (a, _as_fp32(a_scale)),
            (b, _as_fp32(b_scale)),
            out,
            recipe=SCALE_RECIPE,
        )
    return out


def hc_prenorm_gemm(
    x: torch.Tensor, fn: torch.Tensor, *, num_splits: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.hc_prenorm_gemm`, fp32 [S, T, N] and [S, T]; the products are TF32."""
    tokens, depth = x.shape
    splits = num_splits or _prenorm_splits(tokens, depth, multiprocessors("x", x.device))
    out = x.new_empty((splits, tokens, fn.shape[0]), dtype=torch.float32)
    sqrsum = x.new_empty((splits, tokens), dtype=torch.float32)
    if tokens:
        deep_gemm.wrappers().tf32_hc_prenorm_gemm(x, fn, out, sqrsum, splits)
    return out, sqrsum


def _prenorm_splits(tokens: int, depth: int, sms: int) -> int:
    """vLLM's compute_num_split with the tiles of DeepGEMM's kernel, 64 tokens by 64 of K."""
    return max(1, min(sms // -(-tokens // 64), -(-depth // 64) // 4)) if tokens else 1


def _as_fp32(scale: torch.Tensor) -> torch.Tensor:
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def _into(out: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    return logits if out is None else out.copy_(logits)
