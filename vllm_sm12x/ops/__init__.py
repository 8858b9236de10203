# SPDX-License-Identifier: Apache-2.0
"""The op surface: torch and Triton only, usable without vLLM."""

from vllm_sm12x.ops.fp8_ds_mla import pack_fp8_ds_mla, unpack_fp8_ds_mla
from vllm_sm12x.ops.fp8_einsum import fp8_einsum
from vllm_sm12x.ops.hc_head import hc_head
from vllm_sm12x.ops.hc_post import hc_post
from vllm_sm12x.ops.hc_post_prenorm_gemm import hc_post_prenorm_gemm
from vllm_sm12x.ops.hc_pre import hc_pre
from vllm_sm12x.ops.hc_prenorm_gemm import hc_prenorm_gemm
from vllm_sm12x.ops.mqa_logits import mqa_logits
from vllm_sm12x.ops.paged_mqa_logits import paged_mqa_logits
from vllm_sm12x.ops.paged_mqa_topk import paged_mqa_topk
from vllm_sm12x.ops.sparse_mla import sparse_mla

__all__ = [
    "fp8_einsum",
    "hc_head",
    "hc_post",
    "hc_post_prenorm_gemm",
    "hc_pre",
    "hc_prenorm_gemm",
    "mqa_logits",
    "pack_fp8_ds_mla",
    "paged_mqa_logits",
    "paged_mqa_topk",
    "sparse_mla",
    "unpack_fp8_ds_mla",
]
