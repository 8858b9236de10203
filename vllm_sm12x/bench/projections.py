# SPDX-License-Identifier: Apache-2.0
"""The output projection and the hyper-connections, the GEMMs of which DeepGEMM has too."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vllm_sm12x.bench.case import (
    Call,
    Case,
    calls_of,
    deep_gemm_peer,
    input_sets,
    oracle_error,
    relative_error,
)
from vllm_sm12x.ops.fp8_einsum.spec import FP8_EINSUM, Fp8EinsumShape
from vllm_sm12x.ops.hc_head.spec import HC_HEAD
from vllm_sm12x.ops.hc_post import hc_post
from vllm_sm12x.ops.hc_post_prenorm_gemm.spec import HC_POST_PRENORM_GEMM, HcPostPrenormGemmShape
from vllm_sm12x.ops.hc_prenorm_gemm import hc_prenorm_gemm
from vllm_sm12x.ops.hc_prenorm_gemm.spec import HC_PRENORM_GEMM, HcPrenormGemmShape
from vllm_sm12x.ops.launch import multiprocessors
from vllm_sm12x.ops.op_spec import OpSpec
from vllm_sm12x.vllm_api.peers import Peers

# How far DeepGEMM may be from ours, and why it may.
EINSUM_DIFFERENCE = 2**-7  # two roundings to bf16, on top of an FP8 MMA's 14 bits of a sum
PRENORM_DIFFERENCE = 2e-3  # tf32 has 11 bits, ours are fp32 products
TWO_KERNELS = "ours, in two kernels"


def fp8_einsum_cases(
    peers: Peers, device: torch.device, shapes: Sequence[Fp8EinsumShape] = FP8_EINSUM.bench
) -> Iterator[Case]:
    """The output projection, in the layouts that vLLM's quantiser writes."""
    op = FP8_EINSUM
    for shape in shapes:
        tokens = shape.tokens
        sets = []
        for seed in range(input_sets(shape.bytes, device)):
            inputs = op.inputs(shape, device=device, seed=seed)
            # [G, T, R] in memory, and scales [G, R/128, T] with T padded to 16 bytes.
            inputs["a"] = inputs["a"].transpose(0, 1).contiguous().transpose(0, 1)
            scale = inputs["a_scale"]
            groups, steps = scale.shape[1:]
            padded = scale.new_zeros(groups, steps, -(-tokens // 4) * 4)
            padded[..., :tokens] = scale.permute(1, 2, 0)
            inputs["a_scale"] = padded.permute(2, 0, 1)[:tokens]
            sets.append(inputs)
        out = torch.empty(tokens, shape.groups, shape.cols, dtype=torch.bfloat16, device=device)
        # An output of its own, so that the two can be compared.
        invariant = partial(op.function, out=torch.empty_like(out), batch_invariant=True)
        yield Case(
            op=op.name,
            shape=f"T {tokens}, {shape.groups} groups",
            series=f"{shape.groups} groups",
            at=tokens,
            ours=[partial(op.function, **inputs, out=out) for inputs in sets],
            peers=deep_gemm_peer(peers, deep_gemm_einsum, sets),
            error=partial(oracle_error, op, sets[0]),
            tolerance=op.tolerance,
            difference=lambda theirs, ours: relative_error(ours, theirs.float()),
            peer_tolerance=EINSUM_DIFFERENCE,
            matrix="fp8",
            bytes=shape.bytes,
            flops=shape.flops,
            copy_share=0.6 if (tokens, shape.groups) == (1, 8) else None,
            invariant=partial(calls_of, _calls_with(invariant), sets),
        )


def deep_gemm_einsum(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's output projection makes it on SM90: fp32 scales, recipe (1, 128, 128)."""
    groups, cols, depth = inputs["b"].shape
    wrappers = deep_gemm.wrappers()
    b_scale = wrappers.transform_sf_into_required_layout(
        sf=inputs["b_scale"],
        mn=cols,
        k=depth,
        recipe=(1, 128, 128),
        num_groups=groups,
        is_sfa=False,
    )
    out = inputs["a"].new_empty((inputs["a"].shape[0], groups, cols), dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        wrappers.fp8_einsum(
            "bhr,hdr->bhd",
            (inputs["a"], inputs["a_scale"]),
            (inputs["b"], b_scale),
            out,
            recipe=(1, 128, 128),
        )
        return out

    return call


def hc_prenorm_gemm_cases(
    peers: Peers,
    device: torch.device,
    shapes: Sequence[HcPrenormGemmShape] = HC_PRENORM_GEMM.bench,
) -> Iterator[Case]:
    """The hyper-connections' GEMM; each input set is a layer with weights of its own."""
    op = HC_PRENORM_GEMM
    for shape in shapes:
        count = input_sets(shape.bytes, device)
        sets = [op.inputs(shape, device=device, seed=seed) for seed in range(count)]
        builds = deep_gemm_peer(peers, deep_gemm_prenorm, sets)
        builds["torch"] = partial(calls_of, torch_prenorm, sets)
        yield Case(
            op=op.name,
            shape=f"T {shape.tokens}, K {shape.depth}",
            series=f"K {shape.depth}",
            at=shape.tokens,
            ours=[partial(op.function, **inputs) for inputs in sets],
            peers=builds,
            error=partial(prenorm_error, sets[0]),
            tolerance=op.tolerance,
            difference=prenorm_difference,
            peer_tolerance=PRENORM_DIFFERENCE,
            bytes=shape.bytes,
            flops=shape.flops,
            copy_share=0.7 if (shape.tokens, shape.depth) == (4096, 16_384) else None,
            invariant=partial(
                calls_of, _calls_with(partial(op.function, batch_invariant=True)), sets
            ),
        )


def deep_gemm_prenorm(deep_gemm: Any, inputs: dict[str, Any]) -> Call:
    """The call as vLLM's mhc_pre makes it, with its number of splits."""
    x, fn = inputs["x"], inputs["fn"]
    tokens, depth = x.shape
    splits = vllm_splits(tokens, depth, sms=multiprocessors("x", x.device))
    out = torch.empty(splits, tokens, len(fn), device=x.device)
    sqrsum = torch.empty(splits, tokens, device=x.device)
    multiply = deep_gemm.wrappers().tf32_hc_prenorm_gemm

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        multiply(x, fn, out, sqrsum, splits)
        return out, sqrsum

    return call


def vllm_splits(tokens: int, depth: int, *, sms: int) -> int:
    """vLLM's compute_num_split with the tiles of DeepGEMM's kernel, 64 x 64."""
    return max(1, min(sms // -(-tokens // 64), -(-depth // 64) // 4))


def torch_prenorm(inputs: dict[str, Any]) -> Call:
    """The same by torch, in fp32."""

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        rows = inputs["x"].float()
        return (rows @ inputs["fn"].T)[None], rows.square().sum(-1)[None]

    return call


def prenorm_error(inputs: dict[str, Any], result: tuple) -> float:
    """The error against the oracle, which has one split."""
    return prenorm_difference(HC_PRENORM_GEMM.oracle(**inputs), result)


def prenorm_difference(theirs: tuple, ours: tuple) -> float:
    """The larger relative difference of the two results, each summed over its splits."""
    pairs = zip(ours, theirs, strict=True)
    return max(relative_error(mine.sum(0), other.sum(0)) for mine, other in pairs)


def hc_post_prenorm_gemm_cases(
    peers: Peers,
    device: torch.device,
    shapes: Sequence[HcPostPrenormGemmShape] = HC_POST_PRENORM_GEMM.bench,
) -> Iterator[Case]:
    """From a layer to the next in one kernel, against the two that do the same."""
    op = HC_POST_PRENORM_GEMM
    for shape in shapes:
        count = input_sets(shape.bytes, device)
        sets = [op.inputs(shape, device=device, seed=seed) for seed in range(count)]
        yield Case(
            op=op.name,
            shape=f"T {shape.tokens}, {shape.streams} x {shape.width}",
            series=f"{shape.streams} x {shape.width}",
            at=shape.tokens,
            ours=[partial(op.function, **inputs) for inputs in sets],
            peers={TWO_KERNELS: partial(calls_of, in_two_kernels, sets)},
            error=partial(post_prenorm_error, sets[0]),
            tolerance=op.tolerance,
            difference=post_prenorm_difference,
            peer_tolerance=op.tolerance,
            bytes=shape.bytes,
            flops=shape.flops,
        )


def in_two_kernels(inputs: dict[str, Any]) -> Call:
    """hc_post, and hc_prenorm_gemm of the streams that it wrote."""
    inputs = dict(inputs)
    fn, splits = inputs.pop("fn"), inputs.pop("num_splits")

    def call() -> tuple[torch.Tensor, ...]:
        streams = hc_post(**inputs)
        return streams, *hc_prenorm_gemm(streams.flatten(1), fn, num_splits=splits)

    return call


def post_prenorm_error(inputs: dict[str, Any], result: tuple) -> float:
    """The error against the oracle, which has one split."""
    return post_prenorm_difference(HC_POST_PRENORM_GEMM.oracle(**inputs), result)


def post_prenorm_difference(theirs: tuple, ours: tuple) -> float:
    """The largest relative difference of the streams, and of the sums over splits."""
    streams = relative_error(ours[0], theirs[0].float())
    return max(streams, prenorm_difference(theirs[1:], ours[1:]))


def hc_mix_cases(
    op: OpSpec, peers: Peers, device: torch.device, shapes: Sequence[Any] | None = None
) -> Iterator[Case]:
    """What surrounds the GEMM (hc_pre, hc_post, hc_head), against the oracle's torch code."""

    invariant = partial(op.function, batch_invariant=True) if op is HC_HEAD else None
    for shape in op.bench if shapes is None else shapes:
        count = input_sets(shape.bytes, device)
        sets = [op.inputs(shape, device=device, seed=seed) for seed in range(count)]
        yield Case(
            op=op.name,
            shape=f"T {shape.tokens}, {shape.streams} x {shape.width}",
            series=f"{shape.streams} x {shape.width}",
            at=shape.tokens,
            ours=[partial(op.function, **inputs) for inputs in sets],
            peers={"torch": partial(calls_of, _calls_with(op.oracle), sets)},
            error=partial(results_error, op, sets[0]),
            tolerance=op.tolerance,
            difference=results_difference,
            peer_tolerance=op.tolerance,
            bytes=shape.bytes,
            flops=shape.flops,
            invariant=invariant and partial(calls_of, _calls_with(invariant), sets),
        )


def _calls_with(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Call]:
    """Makes of a set of inputs the call of `function` with it."""
    return lambda inputs: partial(function, **inputs)


def results_error(op: OpSpec, inputs: dict[str, Any], results: Any) -> float:
    """The largest relative error of one result or some."""
    return results_difference(op.oracle(**inputs), results)


def results_difference(theirs: Any, ours: Any) -> float:
    """The largest relative difference of the results, which are one tensor or some."""
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    pairs = zip(ours, theirs, strict=True)
    return max(relative_error(mine, other.float()) for mine, other in pairs)
