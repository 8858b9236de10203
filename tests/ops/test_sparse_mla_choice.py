# SPDX-License-Identifier: Apache-2.0
"""Where sparse_mla takes the kernel for Hopper, and where the tiles of SM12x."""

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from vllm_sm12x.integration.launch_variants import launch_policy
from vllm_sm12x.ops.launch import has_wgmma
from vllm_sm12x.ops.sparse_mla.config import (
    CONFIGS,
    HOPPER,
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


@pytest.mark.parametrize("assumed", ["12.0", "12.1"])
def test_an_engine_that_is_taken_for_sm12x_has_the_tiles_of_sm12x(monkeypatch, assumed):
    monkeypatch.delenv("VLLM_SM12X_ASSUME", raising=False)
    assert launch_policy().wgmma
    monkeypatch.setenv("VLLM_SM12X_ASSUME", assumed)
    assert not launch_policy().wgmma


def configs(heads, tokens=4096, on_hopper=True, **policy):
    """What a call of packed and one of unpacked rows take."""
    policy, gpu = LaunchPolicy(**policy), {"sms": 132, "wgmma": on_hopper}
    plans = (
        choose(tokens, heads, 640, policy=policy, **gpu),
        choose_unpacked(heads, policy=policy, **gpu),
    )
    return {plan.config for plan in plans}


@pytest.mark.parametrize("heads", [1, 8, 16, 32, 33, 64, 128])
def test_more_than_32_heads_take_it(heads):
    assert (configs(heads) == {HOPPER}) == (heads > 32)
    assert (HOPPER in configs(heads)) == (heads > 32)


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


@given(tokens=st.integers(1, 9000), heads=st.integers(1, 128))
def test_in_the_invariant_mode_heads_alone_decide(tokens, heads):
    config = choose(
        tokens, heads, 640, sms=132, policy=LaunchPolicy(batch_invariant=True), wgmma=True
    ).config
    assert (config == HOPPER) == (heads > 32)


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
    plan = choose(1, 64, 640, sms=132, policy=LaunchPolicy(), wgmma=True)
    assert plan == choose(1, 64, 640, sms=132, policy=LaunchPolicy(), wgmma=False)
