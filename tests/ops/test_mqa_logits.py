# SPDX-License-Identifier: Apache-2.0
"""mqa_logits against its fp32 oracle: interpreter on a CPU, native on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_scores import assert_scores, magnitudes

from vllm_sm12x.ops import mqa_logits
from vllm_sm12x.ops.mqa_logits import config
from vllm_sm12x.ops.mqa_logits.reference import mqa_logits_reference
from vllm_sm12x.ops.mqa_logits.spec import MQA_LOGITS, MqaLogitsShape, mqa_logits_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(inputs: dict) -> torch.Tensor:
    """Run into NaN-poisoned output and compare with the oracle."""
    shape = (inputs["q"].shape[0], inputs["k"].shape[0])
    out = torch.full(shape, math.nan, device=DEVICE)
    assert mqa_logits(**inputs, out=out) is out
    assert_scores(out, mqa_logits_reference(**inputs), magnitudes(mqa_logits_reference, inputs))
    return out


def test_the_oracle_is_the_formula():
    """A row computed with Python numbers, term by term."""
    inputs = mqa_logits_inputs(MqaLogitsShape(2, 5, heads=3, ranges="full"), device="cpu")
    inputs["ks"][1], inputs["ke"][1] = 1, 4
    q, k = inputs["q"].double().tolist(), inputs["k"].double().tolist()
    logits = mqa_logits_reference(**inputs).tolist()
    for n in range(5):
        total = 0.0
        for h in range(3):
            score = sum(a * b for a, b in zip(q[1][h], k[n], strict=True))
            total += inputs["weights"][1, h].item() * max(score, 0.0)
        want = total * inputs["k_scale"][n].item() if 1 <= n < 4 else -math.inf
        assert logits[1][n] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("shape", MQA_LOGITS.small, ids=str)
def test_small_shapes(shape):
    check(mqa_logits_inputs(shape, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", MQA_LOGITS.full, ids=str)
def test_model_shapes(shape):
    check(mqa_logits_inputs(shape, device=DEVICE))


def test_the_tile_for_many_keys(monkeypatch):
    monkeypatch.setattr(config, "FEW_KEYS_LIMIT", 0)
    check(mqa_logits_inputs(MqaLogitsShape(66, 200, heads=5, ranges="random"), device=DEVICE))


@settings(max_examples=20)
@given(
    shape=st.builds(
        MqaLogitsShape,
        rows=st.integers(1, 40),
        keys=st.integers(1, 300),
        heads=st.integers(1, 128),
        ranges=st.sampled_from(["causal", "full", "random"]),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_range(shape, seed):
    check(mqa_logits_inputs(shape, device=DEVICE, seed=seed))


def test_rows_without_keys_are_all_minus_infinity():
    inputs = mqa_logits_inputs(MqaLogitsShape(4, 150, heads=2), device=DEVICE)
    inputs["ks"] = torch.tensor([5, 9, -3, 150], dtype=torch.int32, device=DEVICE)
    inputs["ke"] = torch.tensor([5, 2, 0, 400], dtype=torch.int32, device=DEVICE)
    assert (check(inputs) == -math.inf).all()


def test_keys_outside_the_ranges_do_not_matter():
    """Never-written memory holds any byte, NaN too; here it fills every key that no row sees."""
    inputs = mqa_logits_inputs(MqaLogitsShape(3, 400, heads=4, ranges="full"), device=DEVICE)
    inputs["ks"][:], inputs["ke"][:] = 140, 250
    want = mqa_logits(**inputs)
    for outside in (slice(0, 140), slice(250, 400)):
        inputs["k"][outside] = math.nan
        inputs["k_scale"][outside] = math.nan
    assert torch.equal(mqa_logits(**inputs), want)
    assert want[:, 140:250].isfinite().all()


def test_strided_arguments_and_output():
    inputs = mqa_logits_inputs(MqaLogitsShape(3, 50, heads=6), device=DEVICE)
    want = mqa_logits_reference(**inputs)
    magnitude = magnitudes(mqa_logits_reference, inputs)
    for name, width in (("q", 160), ("k", 144), ("weights", 11)):
        tensor = inputs[name]
        wide = torch.zeros(*tensor.shape[:-1], width, device=DEVICE).to(tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        inputs[name] = wide[..., : tensor.shape[-1]]
    out = torch.full((3, 70), math.nan, device=DEVICE)
    mqa_logits(**inputs, out=out[:, 10:60])
    assert_scores(out[:, 10:60], want, magnitude)
    assert out[:, :10].isnan().all() and out[:, 60:].isnan().all(), "wrote past its columns"


def test_query_and_key_addresses_beyond_32_bits():
    """Rows whose element offsets do not fit 32 bits: int32 arithmetic would touch other memory."""
    inputs = mqa_logits_inputs(MqaLogitsShape(2, 3, heads=2, ranges="full"), device=DEVICE)
    want = mqa_logits_reference(**inputs)
    magnitude = magnitudes(mqa_logits_reference, inputs)
    far = 2**31 + 64
    storage = torch.empty(far + 256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    q = storage.as_strided((2, 2, 128), (far, 128, 1))
    q.copy_(inputs["q"])
    assert_scores(mqa_logits(**{**inputs, "q": q}), want, magnitude)
    keys = storage.as_strided((3, 128), (far // 2, 1))
    keys.copy_(inputs["k"])
    assert_scores(mqa_logits(**{**inputs, "k": keys}), want, magnitude)


BAD = {
    "q dtype": ("q", lambda t: t.float(), TypeError, "q: expected dtype torch.float8_e4m3fn"),
    "q heads": ("q", lambda t: t.repeat(1, 65, 1), ValueError, "q: expected from 1 to 128 heads"),
    "q dim": ("q", lambda t: t[..., :64], ValueError, r"q: expected shape \[any, any, 128\]"),
    "k shape": ("k", lambda t: t[:, :64], ValueError, "k: expected shape"),
    "k rows": ("k", lambda t: t.t().contiguous().t(), ValueError, "k: expected contiguous rows"),
    "scale dtype": ("k_scale", lambda t: t.half(), TypeError, "k_scale: expected dtype"),
    "scale length": ("k_scale", lambda t: t[:3], ValueError, "k_scale: expected shape"),
    "weights": ("weights", lambda t: t[:, :1], ValueError, "weights: expected shape"),
    "ks dtype": ("ks", lambda t: t.long(), TypeError, "ks: expected dtype torch.int32"),
    "ke length": ("ke", lambda t: t[:1], ValueError, "ke: expected shape"),
    "out shape": ("out", lambda t: t[:, :3], ValueError, "out: expected shape"),
    "device": ("ke", lambda t: t.to("meta"), ValueError, "ke: expected device"),
}


@pytest.mark.parametrize("name, alter, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_before_anything_is_written(name, alter, error, message):
    inputs = mqa_logits_inputs(MqaLogitsShape(2, 8, heads=2), device=DEVICE)
    out = inputs["out"] = torch.full((2, 8), math.nan, device=DEVICE)
    inputs[name] = alter(inputs[name])
    with pytest.raises(error, match=message):
        mqa_logits(**inputs)
    assert out.isnan().all()
