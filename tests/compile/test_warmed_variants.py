# SPDX-License-Identifier: Apache-2.0
"""What a serving batch launches is in the warmed set, by Triton's own specialisation.

The ops are called as a worker calls them, with CPU tensors and a driver that is not there; a launch
is recorded by what Triton makes of its arguments, constants and options, and not compiled.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest
import torch
from cross_compile import SMS, _AbsentGpu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_sm12x.integration.launch_variants import Target, Widths, representatives
from vllm_sm12x.ops.hc_post_prenorm_gemm.config import MOST_TOKENS as ONE_KERNEL_TOKENS
from vllm_sm12x.ops.sparse_mla.config import UNPACK_TOKENS, LaunchPolicy

FLASH = Widths(
    heads=64, groups=8, output_rank=1024, hidden=4096, streams=4, candidates=(128, 640, 256)
)
FLASH_TP4 = Widths(
    heads=16, groups=2, output_rank=1024, hidden=4096, streams=4, candidates=(128, 640, 256)
)
FLASH_TP8 = Widths(
    heads=8, groups=1, output_rank=1024, hidden=4096, streams=4, candidates=(128, 640, 256)
)
MOST = 8192
BLOCK_TABLE = torch.empty(256, 37, dtype=torch.int32)


def launches(widths, invariant, wgmma, decodes, prefills, prefilling=1):
    """Keys of everything that a batch with so many tokens of decodes and prefills launches.

    On a GPU with wgmma only the attention is ours.
    """
    from vllm_sm12x.ops import (
        fp8_einsum,
        hc_head,
        hc_post,
        hc_post_prenorm_gemm,
        hc_pre,
        hc_prenorm_gemm,
        launch,
    )
    from vllm_sm12x.ops import sparse_mla as attend

    keys = set()

    def record(self, *args, grid, warmup, **kwargs):
        binder = self.device_caches[driver.active.get_current_device()][-1]
        _, specialisation, options = binder(*args, **{**kwargs, "debug": False})
        keys.add(f"{self.__name__} {specialisation} {options}")

    policy, mode = LaunchPolicy(batch_invariant=invariant), {"batch_invariant": invariant}
    driver._active = _AbsentGpu(90 if wgmma else 120)
    JITFunction.run = record
    # Some ops have imported the function, others its module.
    launch.multiprocessors = attend.__globals__["multiprocessors"] = lambda name, device: SMS
    attend.__globals__["has_mma"] = lambda device: True
    attend.__globals__["has_wgmma"] = lambda device: wgmma

    total = decodes + prefills
    e4m3, bf16, i32 = torch.float8_e4m3fn, torch.bfloat16, torch.int32
    heads, hidden, streams = widths.heads, widths.hidden, widths.streams
    q = torch.empty(total, max(8, heads), 512, dtype=bf16)
    window = torch.empty(4, 64, 584, dtype=torch.uint8)
    lens, requests = torch.empty(MOST * 2, dtype=i32), torch.empty(MOST * 2, dtype=i32)
    top_k = torch.empty(total, 512, dtype=i32)
    for decoding, rows in ((True, slice(0, decodes)), (False, slice(decodes, total))):
        tokens = rows.stop - rows.start
        common = {
            "q": q[rows, :heads], "swa_cache": window, "swa_lens": lens[rows],
            "swa_indices": torch.empty(MOST * 2, 1, 128, dtype=i32)[rows],
            "sink": torch.empty(heads), "softmax_scale": 0.1,
            "out": torch.empty_like(q)[rows, :heads], "policy": policy,
        }  # fmt: skip
        if not tokens:
            continue
        attend(**common)
        by_position = {
            "extra_cache": window, "extra_lens": lens[rows], "request_ids": requests[rows],
            "extra_block_table": BLOCK_TABLE,
        }  # fmt: skip
        wide = torch.empty(MOST * 2, 128, dtype=i32)[rows]
        attend(**common, extra_indices=top_k[rows], **by_position)
        if decoding:
            attend(**common, extra_cache=window, extra_indices=wide, extra_lens=lens[rows])
            continue
        attend(**common, extra_indices=wide, **by_position)
        if tokens < UNPACK_TOKENS or invariant:
            continue
        first = decodes // 3
        by_position |= {
            "extra_block_table": BLOCK_TABLE[first : first + prefilling],
            "unpacked": torch.empty(prefilling, 1 + tokens // 4, 512, dtype=bf16),
            "unpacked_lens": lens[first : first + prefilling],
        }
        for candidates in (top_k[rows], wide):
            attend(**common, extra_indices=candidates, **by_position)
    if wgmma:
        return frozenset(keys)
    depth = heads // widths.groups * 512
    fp8_einsum(
        torch.empty(total, widths.groups, depth, dtype=e4m3),
        torch.empty(total, widths.groups, depth // 128),
        torch.empty(widths.groups, widths.output_rank, depth, dtype=e4m3),
        torch.empty(widths.groups, widths.output_rank // 128, depth // 128),
        **mode,
    )
    residual = torch.empty(total, streams, hidden, dtype=bf16)
    cells = streams * (2 + streams)
    mixing = {
        "rms_eps": 1e-6, "pre_eps": 1e-6, "sinkhorn_eps": 1e-6, "post_mult": 2.0,
        "sinkhorn_iters": 20, "norm_weight": torch.empty(hidden, dtype=bf16), "norm_eps": 1e-6,
    }  # fmt: skip
    scale, base = torch.empty(3), torch.empty(cells)
    products = hc_prenorm_gemm(residual.flatten(1), torch.empty(cells, streams * hidden), **mode)
    hc_pre(*products, scale, base, residual, **mixing)
    first = residual[:, 0].contiguous()
    products = hc_prenorm_gemm(first, torch.empty(cells, hidden), **mode)
    hc_pre(*products, scale, base, first, expanded=torch.empty_like(residual), **mixing)
    after = (first, residual, torch.empty(total, streams), torch.empty(total, streams, streams))
    hc_post(*after)
    if total <= ONE_KERNEL_TOKENS and not invariant:
        mixed, *products = hc_post_prenorm_gemm(*after, torch.empty(cells, streams * hidden))
        hc_pre(*products, scale, base, mixed, **mixing)
    hc_head(
        residual, torch.empty(streams, streams * hidden), torch.empty(1), torch.empty(streams),
        rms_eps=1e-6, hc_eps=1e-6, **mode,
    )  # fmt: skip
    return frozenset(keys)


@pytest.fixture(scope="module")
def record():
    """`record(widths, invariant, wgmma, decodes, prefills)`, where Triton is no interpreter."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TRITON_INTERPRET", raising=False)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    yield lambda *batch: pool.submit(launches, *batch).result()
    pool.shutdown()


@pytest.fixture(scope="module")
def warmed(record):
    """What the batches of the warm-up launch, of which each is of prompts or of decodes."""

    @cache
    def of(widths, invariant, wgmma, query_len):
        policy = LaunchPolicy(batch_invariant=invariant)
        target = Target(SMS, policy, mma=True, wgmma=wgmma, attention_only=wgmma)
        keys = set()
        for tokens in representatives(widths, range(1, MOST + 1), target):
            keys |= record(widths, invariant, wgmma, 0, tokens)
        decodes = range(query_len, 64 * query_len + 1, query_len)
        for tokens in representatives(widths, decodes, target):
            keys |= record(widths, invariant, wgmma, tokens, 0)
        return keys

    return of


@pytest.mark.parametrize("invariant", [False, True], ids=["by size", "batch-invariant"])
@pytest.mark.parametrize(
    "widths, wgmma",
    [(FLASH, False), (FLASH_TP4, False), (FLASH_TP8, False), (FLASH, True)],
    ids=["1", "TP 4", "TP 8", "Hopper"],
)
def test_what_serving_launches_is_warmed(record, warmed, widths, invariant, wgmma):
    @settings(max_examples=40)
    @given(st.integers(0, 64), st.sampled_from([1, 3]), st.integers(0, 4096), st.integers(1, 5))
    @example(1, 1, 0, 1)
    @example(0, 1, 1, 1)
    @example(3, 3, 17, 2)
    @example(64, 3, 4096, 3)
    def check(requests, query_len, prompts, prefilling):
        if requests or prompts:
            batch = record(widths, invariant, wgmma, requests * query_len, prompts, prefilling)
            assert batch <= warmed(widths, invariant, wgmma, query_len)

    check()
