# SPDX-License-Identifier: Apache-2.0
"""DeepGEMM as vLLM reaches it. Imports nothing of either until `wrappers` is asked for."""

import importlib.util
import inspect
import math
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def wrappers() -> ModuleType:
    """`vllm.utils.deep_gemm`, whose functions load DeepGEMM when they are first called."""
    from vllm.utils import deep_gemm

    return deep_gemm


def gives_compressed_logits() -> bool:
    """Whether scores of a prefill begin at each row's first key, as DeepGEMM 2.8 has them."""
    # until: vllm>=0.33.
    return "max_seqlen_k" in inspect.signature(wrappers().fp8_fp4_mqa_logits).parameters


def mqa_logits(
    q: "torch.Tensor",
    k: "torch.Tensor",
    k_scale: "torch.Tensor",
    weights: "torch.Tensor",
    ks: "torch.Tensor",
    ke: "torch.Tensor",
) -> "torch.Tensor":
    """fp32 [M, N], unspecified outside each row's [ks, ke); arguments as of `ops.mqa_logits`."""
    score = wrappers().fp8_fp4_mqa_logits
    if gives_compressed_logits():
        # Rows that begin at key 0 are as they are uncompressed, below ks with scores to spare.
        first = ks.new_zeros(ks.shape)
        logits: torch.Tensor = score((q, None), (k, k_scale), weights, first, ke, len(k))
    else:
        logits = score((q, None), (k, k_scale), weights, ks, ke, clean_logits=False)
    return logits


def paged_mqa_logits(
    q: "torch.Tensor",
    cache: "torch.Tensor",
    weights: "torch.Tensor",
    context_lens: "torch.Tensor",
    block_table: "torch.Tensor",
    schedule: "torch.Tensor",
    max_model_len: int,
    clean_logits: bool,
) -> "torch.Tensor":
    """fp32 [B * next_n, max_model_len]; arguments as of `ops.paged_mqa_logits`.

    context_lens is int32 [B, next_n], schedule what get_paged_mqa_logits_metadata gave.
    """
    score = wrappers().fp8_fp4_paged_mqa_logits
    arguments = ((q, None), cache, weights, context_lens, block_table, schedule, max_model_len)
    # until: vllm>=0.33, which never cleans.
    if "clean_logits" in inspect.signature(score).parameters:
        return score(*arguments, clean_logits=clean_logits)
    logits: torch.Tensor = score(*arguments)
    if clean_logits:
        columns = context_lens.new_ones(max_model_len).cumsum(0)
        logits.masked_fill_(columns > context_lens.reshape(-1, 1), -math.inf)
    return logits


def package_folder() -> Path | None:
    """The DeepGEMM that vLLM would import: the installed `deep_gemm`, else vLLM's own copy.

    Found without importing it, because that would initialise CUDA and needs nvcc.
    """
    installed = _folder("deep_gemm")
    if installed is not None:
        return installed
    vllm = _folder("vllm")
    vendored = vllm and vllm / "third_party" / "deep_gemm"
    return vendored if vendored and (vendored / "__init__.py").is_file() else None


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
