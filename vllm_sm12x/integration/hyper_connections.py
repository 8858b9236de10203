# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4's hyper-connections (mHC) in Triton, behind the functions that vLLM's model calls.

Parameters, defaults, shapes and dtypes are those of the TileLang functions that `REPLACEMENTS`
names. hc is the number of residual streams, d the hidden size, "..." any leading dimensions.
`n_splits` and `tile_n` tune TileLang's kernels and mean nothing here.

Unless said otherwise fn is fp32 [hc * (2 + hc), hc * d], hc_scale fp32 [3] and hc_base fp32
[hc * (2 + hc)]; norm_weight [d] adds an RMSNorm to the layer's input, its weight taken as bf16.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_sm12x.integration import providers, selection
from vllm_sm12x.ops.hc_head import hc_head
from vllm_sm12x.ops.hc_post import hc_post
from vllm_sm12x.ops.hc_post_prenorm_gemm import hc_post_prenorm_gemm
from vllm_sm12x.ops.hc_post_prenorm_gemm.config import MOST_TOKENS
from vllm_sm12x.ops.hc_pre import hc_pre
from vllm_sm12x.vllm_api.config import current_config
from vllm_sm12x.vllm_api.envs import batch_invariant


@functools.cache
def prenorm_gemm() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What serves `vllm_sm12x.ops.hc_prenorm_gemm` in this process."""
    return providers.implementation("hc_prenorm_gemm")


@functools.cache
def most_tokens_of_one_kernel() -> int:
    """Up to how many tokens hc_post and hc_prenorm_gemm are one kernel in this process.

    0 where another provider serves the second, or where batches must not matter: which of the two
    ways a token goes depends on how many there are.
    """
    ours = providers.chosen("hc_prenorm_gemm").name == "triton"
    return MOST_TOKENS if ours and not batch_invariant() else 0


@functools.cache
def head() -> Callable[..., torch.Tensor]:
    """`vllm_sm12x.ops.hc_head` as this process launches it."""
    return functools.partial(hc_head, batch_invariant=batch_invariant())


def mhc_pre(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a layer reads from residual bf16 [..., hc, d].

    Returns post_mix fp32 [..., hc, 1], comb_mix fp32 [..., hc, hc], layer_input bf16 [..., d].
    """
    *outer, hc, width = residual.shape
    streams = residual.view(-1, hc, width)
    return _pre(
        outer,
        streams,
        prenorm_gemm()(streams.flatten(1), fn),
        hc_scale,
        hc_base,
        rms_eps=rms_eps,
        pre_eps=hc_pre_eps,
        sinkhorn_eps=hc_sinkhorn_eps,
        post_mult=hc_post_mult_value,
        sinkhorn_iters=sinkhorn_repeat,
        norm_weight=_as_bf16(norm_weight),
        norm_eps=norm_eps,
    )


def mhc_pre_broadcast(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    fn_broadcast: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the first layer reads from residual bf16 [T, d], the same in all streams.

    fn_broadcast fp32 [hc * (2 + hc), d] is fn summed over the streams.

    Returns the residual bf16 [T, hc, d], and post_mix, comb_mix and layer_input of `mhc_pre`.

    Raises ValueError without fn_broadcast.
    """
    if fn_broadcast is None:
        raise ValueError(
            "fn_broadcast: expected fn summed over the streams, got None; vLLM computes it as it "
            "loads weights from a checkpoint"
        )
    tokens, width = residual.shape
    expanded = residual.new_empty((tokens, fn.shape[1] // width, width))
    post_mix, comb_mix, layer_input = hc_pre(
        *prenorm_gemm()(residual, fn_broadcast),
        hc_scale,
        hc_base,
        residual,
        rms_eps=rms_eps,
        pre_eps=hc_pre_eps,
        sinkhorn_eps=hc_sinkhorn_eps,
        post_mult=hc_post_mult_value,
        sinkhorn_iters=sinkhorn_repeat,
        norm_weight=_as_bf16(norm_weight),
        norm_eps=norm_eps,
        expanded=expanded,
    )
    return expanded, post_mix.unsqueeze(-1), comb_mix, layer_input


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
) -> torch.Tensor:
    """The streams bf16 [..., hc, d] after a layer that gave x bf16 [..., d].

    residual is as before the layer, post_layer_mix fp32 [..., hc, 1] or [..., hc], comb_res_mix
    fp32 [..., hc, hc].
    """
    *_, hc, width = residual.shape
    streams = hc_post(
        x.view(-1, width),
        residual.view(-1, hc, width),
        post_layer_mix.view(-1, hc),
        comb_res_mix.view(-1, hc, hc),
    )
    return streams.view(residual.shape)


def mhc_fused_post_pre(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    tile_n: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_post` of one layer, then `mhc_pre` of the next.

    Returns the streams bf16 [..., hc, d], and post_mix, comb_mix and layer_input of `mhc_pre`.
    """
    *outer, hc, width = residual.shape
    after = (
        x.view(-1, width),
        residual.view(-1, hc, width),
        post_layer_mix.view(-1, hc),
        comb_res_mix.view(-1, hc, hc),
    )
    if len(after[0]) <= most_tokens_of_one_kernel():
        streams, parts, sqrsum = hc_post_prenorm_gemm(*after, fn)
    else:
        streams = hc_post(*after)
        parts, sqrsum = prenorm_gemm()(streams.flatten(1), fn)
    mixes_and_input = _pre(
        outer,
        streams,
        (parts, sqrsum),
        hc_scale,
        hc_base,
        rms_eps=rms_eps,
        pre_eps=hc_pre_eps,
        sinkhorn_eps=hc_sinkhorn_eps,
        post_mult=hc_post_mult_value,
        sinkhorn_iters=sinkhorn_repeat,
        norm_weight=_as_bf16(norm_weight),
        norm_eps=norm_eps,
    )
    return streams.view(residual.shape), *mixes_and_input


def hc_head_fused_kernel(
    hs_flat: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """bf16 [T, d] of hs_flat bf16 [T, hc, d]; fn fp32 [hc, hc * d], hc_scale [1], hc_base [hc]."""
    return head()(hs_flat, fn, hc_scale, hc_base, rms_eps=rms_eps, hc_eps=hc_eps)


def register_warmup(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Around vLLM's list of TileLang kernels to compile at start, which takes nvcc.

    A model that is served here calls none of them; others do.
    """
    vllm_config = current_config()
    if vllm_config is None or not selection.serves(vllm_config):
        original(*args, **kwargs)


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "mhc_pre_tilelang": mhc_pre,
    "mhc_pre_broadcast_tilelang": mhc_pre_broadcast,
    "mhc_post_tilelang": mhc_post,
    "mhc_fused_post_pre_tilelang": mhc_fused_post_pre,
    "hc_head_fused_kernel_tilelang": hc_head_fused_kernel,
}


def _pre(
    outer: Sequence[int],
    streams: torch.Tensor,
    products: tuple[torch.Tensor, torch.Tensor],
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hc_pre of streams [T, hc, d] and their products, as `mhc_pre` returns it."""
    hc, width = streams.shape[1:]
    mixes_and_input = hc_pre(*products, hc_scale, hc_base, streams, **settings)
    shapes = ((hc, 1), (hc, hc), (width,))
    post_mix, comb_mix, layer_input = (
        result.view(*outer, *shape) for result, shape in zip(mixes_and_input, shapes, strict=True)
    )
    return post_mix, comb_mix, layer_input


def _as_bf16(weight: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous and bf16, as the kernel takes it; a model's weights are that already."""
    return None if weight is None else weight.to(torch.bfloat16).contiguous()
