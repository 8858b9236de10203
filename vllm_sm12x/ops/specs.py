# SPDX-License-Identifier: Apache-2.0
"""One row per op: function, oracle, inputs, shapes, tolerance: for tests, compile gate, benches."""

from vllm_sm12x.ops.fp8_einsum.spec import FP8_EINSUM
from vllm_sm12x.ops.hc_head.spec import HC_HEAD
from vllm_sm12x.ops.hc_post.spec import HC_POST
from vllm_sm12x.ops.hc_post_prenorm_gemm.spec import HC_POST_PRENORM_GEMM
from vllm_sm12x.ops.hc_pre.spec import HC_PRE
from vllm_sm12x.ops.hc_prenorm_gemm.spec import HC_PRENORM_GEMM
from vllm_sm12x.ops.mqa_logits.spec import MQA_LOGITS
from vllm_sm12x.ops.paged_mqa_logits.spec import PAGED_MQA_LOGITS
from vllm_sm12x.ops.paged_mqa_topk.spec import PAGED_MQA_TOPK
from vllm_sm12x.ops.sparse_mla.spec import SPARSE_MLA

SPECS = (
    SPARSE_MLA,
    FP8_EINSUM,
    HC_PRENORM_GEMM,
    HC_PRE,
    HC_POST,
    HC_POST_PRENORM_GEMM,
    HC_HEAD,
    MQA_LOGITS,
    PAGED_MQA_LOGITS,
    PAGED_MQA_TOPK,
)
