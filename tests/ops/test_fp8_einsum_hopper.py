# SPDX-License-Identifier: Apache-2.0
"""fp8_einsum's kernel of wgmma and TMA: in the interpreter on a CPU, natively on a Hopper GPU."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fp8_einsum import DEVICE, check, check_far_addresses, exact_inputs, module, nan_output

from vllm_sm12x.ops import fp8_einsum, launch
from vllm_sm12x.ops.fp8_einsum import describable
from vllm_sm12x.ops.fp8_einsum.config import (
    CONFIGS,
    HOPPER,
    INVARIANT,
    MANY,
    SCALE_BLOCK,
    LaunchPlan,
    choose,
)
from vllm_sm12x.ops.fp8_einsum.reference import fp8_einsum_reference
from vllm_sm12x.ops.fp8_einsum.spec import Fp8EinsumShape, fp8_einsum_inputs

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not launch.has_wgmma(torch.device(DEVICE)),
    reason="needs a Hopper GPU, or Triton's interpreter",
)
# Enough tokens for HOPPER by the op's own choice; the interpreter is taken for 8 multiprocessors.
MANY_TOKENS, COLS = {"cpu": (301, 200), "cuda": (1031, 1000)}[DEVICE]


@pytest.fixture
def plans():
    """The plans of the calls so far, by the op's own choice on a GPU with wgmma."""
    taken = []

    def record(*args, **kwargs):
        taken.append(choose(*args, **kwargs))
        return taken[-1]

    with (
        mock.patch.object(module, "choose", record),
        mock.patch.object(launch, "has_wgmma", return_value=True),
    ):
        yield taken


def always(steps: int):
    """Meanwhile every call of so many steps takes HOPPER."""
    return mock.patch.object(module, "choose", return_value=LaunchPlan(HOPPER, 1, steps))


def padded(values: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The same values in rows that have NaN before and after them."""
    size = (*values.shape[:2], before + values.shape[2] + after)
    wide = torch.full(size, 0x7F, dtype=torch.uint8, device=DEVICE).view(values.dtype)
    return wide[..., before : before + values.shape[2]].copy_(values)


@settings(max_examples=15)
@given(
    shape=st.builds(
        Fp8EinsumShape,
        tokens=st.integers(1, 140),
        groups=st.integers(1, 3),
        cols=st.integers(1, 300),
        depth=st.integers(1, 6).map(lambda steps: SCALE_BLOCK * steps),
        a_scale=st.sampled_from(["fp32", "e8m0", "uint8"]),
        b_scale=st.sampled_from(["fp32", "e8m0", "uint8"]),
        transposed=st.booleans(),
    ),
    groups_first=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_scale_form(shape, groups_first, seed):
    inputs = fp8_einsum_inputs(shape, device=DEVICE, seed=seed)
    if groups_first:
        inputs["a"] = inputs["a"].transpose(0, 1).contiguous().transpose(0, 1)
    with always(shape.depth // SCALE_BLOCK):
        check(inputs)


@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
def test_the_op_takes_it_for_many_tokens(plans, scales):
    shape = Fp8EinsumShape(
        MANY_TOKENS, groups=2, cols=COLS, depth=384, a_scale=scales, b_scale=scales
    )
    check(fp8_einsum_inputs(shape, device=DEVICE))
    assert [plan.config for plan in plans] == [HOPPER]


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["fp32", "e8m0"])
@pytest.mark.parametrize("tokens", [4096, 4161, 8192])
def test_model_widths(plans, tokens, scales):
    for cols in (1000, 1024):
        shape = Fp8EinsumShape(
            tokens, cols=cols, a_scale=scales, b_scale=scales, transposed=scales == "e8m0"
        )
        check(fp8_einsum_inputs(shape, device=DEVICE))
    assert [plan.config for plan in plans] == [HOPPER] * 2


@pytest.mark.parametrize("band", [1, 2, 64])
def test_every_tile_is_computed_in_bands_of_any_size(band):
    inputs = exact_inputs(321, 2, 300, 256)
    with always(2), mock.patch.object(module, "HOPPER_BAND", band):
        got = fp8_einsum(**inputs, out=nan_output(inputs))
    want = fp8_einsum_reference(**inputs)
    assert want.abs().max() <= 256 and want.any()
    assert torch.equal(got.float(), want)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    "before, after, taken",
    [(0, 0, True), (16, 32, True), (16, 0, True), (0, 8, False), (8, 8, False), (1, 2, False)],
)
def test_what_tma_cannot_describe_takes_the_other_kernel(plans, name, before, after, taken):
    inputs = exact_inputs(MANY_TOKENS, 2, COLS, 256)
    inputs[name] = padded(inputs[name], before, after)
    got = fp8_einsum(**inputs, out=nan_output(inputs))
    assert [plan.config for plan in plans] == [HOPPER if taken else MANY]
    assert torch.equal(got.float(), fp8_einsum_reference(**inputs))


def test_one_group_expanded_to_many_is_not_described():
    values = torch.zeros(4, 1, 128, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    assert describable(values)
    assert not describable(values.expand(4, 2, 128))


def test_addresses_beyond_two_gib():
    with always(1):
        check_far_addresses()


def test_an_e8m0_nan_reaches_its_row_only():
    inputs = fp8_einsum_inputs(Fp8EinsumShape(3, 1, 8, 256, a_scale="uint8"), device=DEVICE)
    inputs["a_scale"][1, 0, 1] = 255
    with always(2):
        nan = fp8_einsum(**inputs).isnan()
    assert nan[1].all() and not nan[0].any() and not nan[2].any()


@pytest.mark.parametrize("mode", [{"batch_invariant": True}, {"wgmma": False}], ids=str)
def test_not_where_it_is_excluded(plans, mode):
    inputs = fp8_einsum_inputs(Fp8EinsumShape(MANY_TOKENS, 2, COLS, 128), device=DEVICE)
    fp8_einsum(**inputs, **mode)
    assert [plan.config for plan in plans] == [INVARIANT if "batch_invariant" in mode else MANY]


@given(
    tokens=st.integers(1, 9000),
    groups=st.integers(1, 16),
    cols=st.integers(1, 4096),
    steps=st.integers(1, 64),
    sms=st.sampled_from([8, 78, 132]),
)
def test_fewer_tokens_keep_their_plan(tokens, groups, cols, steps, sms):
    plan = choose(tokens, groups, cols, steps, sms=sms)
    on_hopper = choose(tokens, groups, cols, steps, sms=sms, hopper=True)
    assert plan.config in CONFIGS
    assert on_hopper in (plan, LaunchPlan(HOPPER, 1, steps))
