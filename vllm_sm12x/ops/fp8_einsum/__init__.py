# SPDX-License-Identifier: Apache-2.0
"""Grouped FP8 matrix product with block scales, 'bhr,hdr->bhd' (README.md)."""

import torch
import triton
import triton.language as tl

from vllm_sm12x.ops import launch
from vllm_sm12x.ops.fp8_einsum.config import HOPPER_BAND, SCALE_BLOCK, LaunchPlan, choose
from vllm_sm12x.ops.fp8_einsum.kernel import fp8_einsum_kernel, fp8_einsum_merge_kernel

_E8M0 = (torch.float8_e8m0fnu, torch.uint8)


def fp8_einsum(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    wgmma: bool = True,
) -> torch.Tensor:
    """out[t,g,d] = sum_r a[t,g,r] a_scale[t,g,r/128] b[g,d,r] b_scale[g,d/128,r/128].

    Products and sums are fp32, rounded once to bf16. Same inputs give the same bits.

    Args:
        a: e4m3 [T, G, R], R a multiple of 128; any strides with contiguous rows.
        a_scale: [T, G, R/128], any strides: fp32, or e8m0 as torch.float8_e8m0fnu or as uint8
            (value b is 2^(b-127), 255 is NaN).
        b: e4m3 [G, D, R], any D; any strides with contiguous rows.
        b_scale: [G, ceil(D/128), R/128], in the form of a_scale; the two may differ in dtype.
        out: bf16 [T, G, D] with contiguous rows to write into; allocated if None.
        batch_invariant: a token's bits do not depend on T; slower.
        wgmma: whether a Hopper GPU may take its kernel of wgmma and TMA, as it does for many
            tokens whose a and b have addresses and strides that are multiples of 16 bytes.

    Returns:
        out.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than above; nothing
            has been launched or written then.
    """
    _check_values("a", a, "[T, G, R]")
    _check_values("b", b, "[G, D, R]")
    tokens, groups, depth = a.shape
    cols = b.shape[1]
    if depth == 0 or depth % SCALE_BLOCK:
        raise ValueError(f"a: expected R a positive multiple of {SCALE_BLOCK}, got {depth}")
    if b.shape != (groups, cols, depth):
        raise ValueError(f"b: expected [{groups}, D, {depth}] (G and R of a), got {list(b.shape)}")
    steps = depth // SCALE_BLOCK
    _check_scale("a_scale", a_scale, (tokens, groups, steps))
    _check_scale("b_scale", b_scale, (groups, triton.cdiv(cols, SCALE_BLOCK), steps))
    if out is not None:
        _check_output(out, (tokens, groups, cols))
    for name, tensor in {"a_scale": a_scale, "b": b, "b_scale": b_scale, "out": out}.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{name}: expected device {a.device} (that of a), got {tensor.device}")
    sms = launch.multiprocessors("a", a.device)

    if out is None:
        out = a.new_empty((tokens, groups, cols), dtype=torch.bfloat16)
    if out.numel():
        plan = choose(
            tokens,
            groups,
            cols,
            steps,
            sms=sms,
            batch_invariant=batch_invariant,
            hopper=wgmma and launch.has_wgmma(a.device) and describable(a) and describable(b),
        )
        run = _launch_hopper if plan.config.hopper else _launch
        run(plan, a, a_scale, b, b_scale, out)
    return out


def _launch(
    plan: LaunchPlan,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    config = plan.config
    tokens, groups, cols = out.shape
    target = out
    if plan.num_splits > 1:
        target = out.new_empty((plan.num_splits, *out.shape), dtype=torch.float32)
    # Without splits there is one, and its stride is never used.
    target_strides = (target.stride(0) if plan.num_splits > 1 else 0, *target.stride()[-3:-1])
    row_tiles = triton.cdiv(tokens, config.block_t)
    col_tiles = triton.cdiv(cols, config.block_d)
    with launch.on_device(a.device):
        fp8_einsum_kernel[(groups * row_tiles * col_tiles, plan.num_splits)](
            a,
            _bytes(a_scale),
            b,
            _bytes(b_scale),
            target,
            tokens,
            cols,
            col_tiles,
            row_tiles,
            a.shape[2] // SCALE_BLOCK,
            plan.steps_per_split,
            *a.stride()[:2],
            *a_scale.stride(),
            *b.stride()[:2],
            *b_scale.stride(),
            *target_strides,
            A_E8M0=a_scale.dtype in _E8M0,
            B_E8M0=b_scale.dtype in _E8M0,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            SCALES_FIRST=(
                triton.next_power_of_2(plan.steps_per_split) if config.scales_first else 0
            ),
            DOT_DTYPE=launch.dot_dtype(tl.float8e4nv),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if plan.num_splits > 1:
            fp8_einsum_merge_kernel[(tokens * groups, triton.cdiv(cols, 512))](
                target,
                out,
                groups,
                cols,
                plan.num_splits,
                *target_strides,
                *out.stride()[:2],
                BLOCK_D=512,
                num_warps=4,
            )


def describable(values: torch.Tensor) -> bool:
    """Whether TMA reads e4m3 values with these first two strides, which are bytes, from there."""
    strides = values.stride()[:2]
    return values.data_ptr() % 16 == 0 and all(s % 16 == 0 and 0 < s < 2**40 for s in strides)


def _launch_hopper(
    plan: LaunchPlan,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    # Not at the top: SM12x needs none of Triton's descriptors.
    from vllm_sm12x.ops.fp8_einsum.hopper import descriptor, fp8_einsum_hopper_kernel

    config = plan.config
    tokens, groups, cols = out.shape
    row_tiles = triton.cdiv(tokens, config.block_t)
    col_tiles = triton.cdiv(cols, config.block_d)
    with launch.on_device(a.device):
        fp8_einsum_hopper_kernel[(groups * row_tiles * col_tiles,)](
            descriptor(a.transpose(0, 1), config.block_t),
            _bytes(a_scale),
            descriptor(b, config.block_d),
            _bytes(b_scale),
            out,
            tokens,
            cols,
            col_tiles,
            row_tiles,
            plan.steps_per_split,
            *a_scale.stride(),
            *b_scale.stride(),
            *out.stride()[:2],
            A_E8M0=a_scale.dtype in _E8M0,
            B_E8M0=b_scale.dtype in _E8M0,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            BAND=HOPPER_BAND,
            DOT_DTYPE=launch.dot_dtype(tl.float8e4nv),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _bytes(scale: torch.Tensor) -> torch.Tensor:
    # Triton has no e8m0 type of its own.
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _check_values(name: str, tensor: torch.Tensor, shape: str) -> None:
    if tensor.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{name}: expected dtype torch.float8_e4m3fn, got {tensor.dtype}")
    if tensor.dim() != 3:
        raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
    if tensor.stride(2) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {tuple(tensor.stride())}")


def _check_scale(name: str, scale: torch.Tensor, shape: tuple[int, int, int]) -> None:
    if scale.dtype != torch.float32 and scale.dtype not in _E8M0:
        raise TypeError(
            f"{name}: expected dtype torch.float32, torch.float8_e8m0fnu or torch.uint8 (e8m0), "
            f"got {scale.dtype}"
        )
    if scale.shape != shape:
        raise ValueError(
            f"{name}: expected {list(shape)}, a scale for {SCALE_BLOCK} values of R, "
            f"got {list(scale.shape)}"
        )


def _check_output(out: torch.Tensor, shape: tuple[int, int, int]) -> None:
    if out.dtype != torch.bfloat16:
        raise TypeError(f"out: expected dtype torch.bfloat16, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out: expected {list(shape)}, got {list(out.shape)}")
    if out.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(f"out: expected contiguous rows, got strides {tuple(out.stride())}")
