# SPDX-License-Identifier: Apache-2.0
"""The op surface: torch and Triton only, usable without vLLM."""

from vllm_sm12x.ops.fp8_ds_mla import pack_fp8_ds_mla, unpack_fp8_ds_mla
from vllm_sm12x.ops.sparse_mla import sparse_mla

__all__ = ["pack_fp8_ds_mla", "sparse_mla", "unpack_fp8_ds_mla"]
