# SPDX-License-Identifier: Apache-2.0
"""Where sparse_mla takes its Gluon kernels, and where Triton's tiles."""

import importlib
import sys
import types

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from vllm_sm12x.integration.launch_variants import launch_policy
from vllm_sm12x.ops.launch import has_mma, has_wgmma
from vllm_sm12x.ops.sparse_mla.config import (
    CONFIGS,
    HOPPER,
    MMA,
    LaunchPolicy,
    choose,
    choose_unpacked,
)

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes the GPU one of a capability, with kernels compiled for it."""

    def be(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(triton.knobs.runtime, "override_arch", None)

    return be


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
def test_only_hopper_runs_wgmma(gpu, capability):
    gpu(*capability)
    assert has_wgmma(CUDA) == (capability == (9, 0))


@pytest.mark.parametrize("knob, value", [("override_arch", "sm89"), ("interpret", True)])
def test_not_where_kernels_are_compiled_for_another_gpu(gpu, monkeypatch, knob, value):
    gpu(9, 0)
    monkeypatch.setattr(triton.knobs.runtime, knob, value)
    assert not has_wgmma(CUDA)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0), (12, 1)])
def test_mma_runs_from_sm80_on(gpu, capability):
    gpu(*capability)
    assert has_mma(CUDA) == (capability >= (8, 0))
    assert not has_mma(torch.device("cpu"))


def test_mma_runs_where_kernels_are_compiled_for_another_gpu_but_not_interpreted(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(triton.knobs.runtime, "override_arch", "sm89")
    assert has_mma(CUDA)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert not has_mma(CUDA)


def test_a_gluon_that_cannot_be_imported_leaves_tritons_tiles(gpu, monkeypatch):
    gpu(12, 0)
    op = importlib.import_module("vllm_sm12x.ops.sparse_mla")
    op._imports.cache_clear()
    assert op.gluon_kernels(CUDA) == {"mma": True, "wgmma": False}
    # As where Gluon has moved on.
    ampere = "triton.experimental.gluon.language.nvidia.ampere"
    monkeypatch.setitem(sys.modules, ampere, types.ModuleType(ampere))
    monkeypatch.delitem(sys.modules, "vllm_sm12x.ops.sparse_mla.mma")
    op._imports.cache_clear()
    with pytest.warns(RuntimeWarning, match="mma.py needs another Gluon .*cannot import name"):
        found = op.gluon_kernels(CUDA)
    assert found == op.gluon_kernels(CUDA) == {"mma": False, "wgmma": False}
    plan = choose(4096, 64, 640, sms=188, policy=LaunchPolicy(), **found)
    assert plan.config == CONFIGS[4]
    op._imports.cache_clear()


@pytest.mark.parametrize("assumed", ["12.0", "12.1"])
def test_an_engine_that_is_taken_for_sm12x_has_the_tiles_of_sm12x(monkeypatch, assumed):
    monkeypatch.delenv("VLLM_SM12X_ASSUME", raising=False)
    assert launch_policy().wgmma
    monkeypatch.setenv("VLLM_SM12X_ASSUME", assumed)
    assert not launch_policy().wgmma


def configs(heads, tokens=4096, on_hopper=True, mma=True, **policy):
    """What a call of packed and one of unpacked rows take."""
    policy, gpu = LaunchPolicy(**policy), {"sms": 132, "mma": mma, "wgmma": on_hopper}
    plans = (
        choose(tokens, heads, 640, policy=policy, **gpu),
        choose_unpacked(heads, policy=policy, **gpu),
    )
    return {plan.config for plan in plans}


@pytest.mark.parametrize("on_hopper", [False, True])
@pytest.mark.parametrize("heads", [1, 8, 16, 32, 33, 64, 128])
def test_more_than_32_heads_take_one(heads, on_hopper):
    taken = HOPPER if on_hopper else MMA
    assert (configs(heads, on_hopper=on_hopper) == {taken}) == (heads > 32)
    assert (taken in configs(heads, on_hopper=on_hopper)) == (heads > 32)


@given(
    tokens=st.integers(1, 9000),
    heads=st.integers(1, 128),
    invariant=st.booleans(),
    head_block=st.sampled_from([1, 2, 4]),
)
def test_what_is_asked_for_is_not_replaced(tokens, heads, invariant, head_block):
    call = {"heads": heads, "tokens": tokens, "batch_invariant": invariant}
    assert configs(head_block=head_block, **call) == {CONFIGS[head_block]}
    sm12x = configs(on_hopper=False, **call)
    assert configs(wgmma=False, **call) == sm12x and HOPPER not in sm12x
    interpreted = configs(on_hopper=False, mma=False, **call)
    assert interpreted <= set(CONFIGS.values())


def test_a_policy_leaves_triton_its_tile():
    gpu = {"sms": 188, "mma": True}
    taken = choose(4096, 64, 640, policy=LaunchPolicy(), **gpu)
    assert taken.config == MMA
    left = choose(4096, 64, 640, policy=LaunchPolicy(mma=False), **gpu)
    assert left.config == CONFIGS[4]


@given(tokens=st.integers(1, 9000), heads=st.integers(1, 128), wgmma=st.booleans())
def test_in_the_invariant_mode_heads_alone_decide(tokens, heads, wgmma):
    config = choose(
        tokens,
        heads,
        640,
        sms=132,
        policy=LaunchPolicy(batch_invariant=True),
        mma=True,
        wgmma=wgmma,
    ).config
    assert (config == (HOPPER if wgmma else MMA)) == (heads > 32)


@given(st.integers(1, 9000), st.integers(1, 128), st.integers(1, 3000), st.booleans())
def test_a_launch_without_splits_is_of_whole_query_chunks(tokens, heads, query_chunk, wgmma):
    policy = LaunchPolicy(query_chunk=query_chunk)
    for plan in (
        choose(tokens, heads, 640, sms=132, policy=policy, wgmma=wgmma),
        choose_unpacked(heads, sms=132, policy=policy, wgmma=wgmma),
    ):
        assert plan.tokens_per_launch % query_chunk == 0
        if plan.num_splits == 1:
            programs = plan.tokens_per_launch * -(-heads // plan.config.block_h)
            assert programs >= 128 * 132


def test_one_token_keeps_the_tile_of_least_latency():
    gpu = {"sms": 132, "policy": LaunchPolicy()}
    plan = choose(1, 64, 640, **gpu)
    assert plan == choose(1, 64, 640, mma=True, **gpu)
    assert plan == choose(1, 64, 640, mma=True, wgmma=True, **gpu)
