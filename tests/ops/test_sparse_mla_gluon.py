# SPDX-License-Identifier: Apache-2.0
"""sparse_mla's Gluon kernels on a CPU: what they compute, not how their threads share the work."""

import importlib

import interpreted_gluon
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparse_mla import check, relative_error
from test_sparse_mla_quantised import TOLERANCE, dequantised

from vllm_sm12x.ops import sparse_mla
from vllm_sm12x.ops.sparse_mla import gluon_parts, hopper, mma
from vllm_sm12x.ops.sparse_mla.config import HOPPER, MMA, LaunchPolicy
from vllm_sm12x.ops.sparse_mla.reference import quantised_reference, sparse_mla_reference
from vllm_sm12x.ops.sparse_mla.spec import SparseMlaShape, quantised_output, sparse_mla_inputs

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_sparse_mla runs them natively"
)
# By import_module: the package's attribute of that name is the function.
op = importlib.import_module("vllm_sm12x.ops.sparse_mla")


@pytest.fixture(scope="module", params=["mma", "hopper"])
def config(request):
    """The tile of a kernel, which the op takes meanwhile for more than 32 heads."""
    module, config = {"mma": (mma, MMA), "hopper": (hopper, HOPPER)}[request.param]
    name = f"sparse_mla_{request.param}_kernel"
    kernel = getattr(interpreted_gluon.load(module.__name__, (gluon_parts.__name__,)), name)
    launched = []

    class Recorded:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "has_mma", lambda device: True)
        patch.setattr(op, "has_wgmma", lambda device: config is HOPPER)
        patch.setattr(module, name, Recorded())
        yield config
    assert launched


def check_splits(shape: SparseMlaShape, splits: int, config, seed: int = 0) -> None:
    # Which always takes the widest tile, and up to 4 splits of one tile or more.
    policy = LaunchPolicy(batch_invariant=True, topk_chunk=config.block_n * splits)
    check(sparse_mla_inputs(shape, device="cpu", seed=seed), policy)


@pytest.mark.parametrize(
    "shape, splits",
    [
        (SparseMlaShape(1, heads=128, rows=700), 1),
        (SparseMlaShape(2, heads=33, swa=100, extra=130, rows=300, lens="ragged", holes=0.3), 3),
        (SparseMlaShape(3, heads=40, swa=19, extra=170, extra_block=2, rows=200, table=True), 4),
        (SparseMlaShape(2, heads=70, extra=0, holes=0.5, sink=False, rows=200), 1),
        (SparseMlaShape(4, heads=64, swa=1, extra=0, rows=2), 1),
        (SparseMlaShape(2, heads=36, swa=16, extra=16, holes=1.0, rows=16), 1),
        (SparseMlaShape(2, heads=33, context=1500, extra=300, unpack=True), 1),
        (SparseMlaShape(2, heads=64, swa=70, extra=200, table=True, rows=300, unpack=True), 1),
    ],
    ids=str,
)
def test_shapes(shape, splits, config):
    check_splits(shape, splits, config)


@pytest.mark.parametrize("config", ["mma"], indirect=True)
@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_quantised_result(splits, unpack, config, rounds_to_e4m3):
    shape = SparseMlaShape(
        3, heads=70, swa=40, extra=90, lens="ragged", holes=0.3, rows=99, table=True,
        unpack=unpack,
    )  # fmt: skip
    policy = LaunchPolicy(batch_invariant=True, topk_chunk=config.block_n * splits)
    inputs = sparse_mla_inputs(shape, device="cpu")
    arguments = quantised_output(3, 70, device="cpu")
    out, scale = sparse_mla(**inputs, **arguments, policy=policy), arguments["out_scale"]
    # Values of bf16 are fp32 here, so that the bits are not those of bf16 rows: some values round
    # the other way, by one unit.
    rows = sparse_mla_reference(**inputs)
    want = quantised_reference(rows, arguments["positions"], arguments["cos_sin_cache"])
    assert relative_error(dequantised(out, scale), dequantised(*want)) <= TOLERANCE / 2
    largest = out.float().unflatten(-1, (4, 128)).abs().amax(-1)
    seen = rows.abs().amax(-1) > 0
    assert seen.any() and (largest[seen] >= 224).all() and (largest <= 448).all()


@settings(max_examples=12)
@given(
    shape=st.builds(
        SparseMlaShape,
        tokens=st.integers(1, 3),
        heads=st.integers(33, 70),
        swa=st.integers(1, 140),
        extra=st.integers(0, 140),
        swa_block=st.sampled_from([1, 7, 64]),
        extra_block=st.sampled_from([1, 2, 64]),
        sink=st.booleans(),
        holes=st.sampled_from([0.0, 0.5, 1.0]),
        lens=st.sampled_from([None, "full", "ragged"]),
        padded=st.booleans(),
        rows=st.integers(1, 120),
    ),
    positions=st.sampled_from([{}, {"table": True}, {"table": True, "unpack": True}]),
    splits=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_indices_lengths_and_pages(config, shape, positions, splits, seed):
    if shape.extra:
        shape = SparseMlaShape(**{**vars(shape), **positions})
    check_splits(shape, splits, config, seed)


def test_every_byte_is_dequantised_exactly_but_nan():
    bytes_, scales = np.meshgrid(np.arange(256), np.arange(1, 255), indexing="ij")
    word = (bytes_ * 0x01010101).astype(np.uint32)
    got = interpreted_gluon.run_ptx(gluon_parts._UNPACK_E4M3.value, word, scales.astype(np.uint32))
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    nan = e4m3.isnan()
    assert nan.nonzero().flatten().tolist() == [0x7F, 0xFF]
    e4m3[nan] = torch.tensor([480.0, -480.0], dtype=torch.double)
    want = (e4m3[:, None] * 2.0 ** torch.arange(-126, 128).double()).to(torch.bfloat16)
    for words in got:
        for half in (words & 0xFFFF, words >> 16):
            values = torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
            assert torch.equal(values, want)
