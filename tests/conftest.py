# SPDX-License-Identifier: Apache-2.0
"""What every test shares: where kernels run, the markers, and hypothesis' profile."""

import os
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# vLLM imports humming, which then has a compiler build its launcher, again in each process that
# starts where that fails.
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")

if not HAS_GPU:
    # Triton reads this when a kernel is decorated, so it must be set before any test module loads.
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """torch.empty holds NaN, so that an element that no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def rounds_to_e4m3() -> Iterator[None]:
    """Triton's interpreter converts fp32 to e4m3 as a GPU does, to the nearest.

    until: it does so itself (test_sparse_mla_quantised.py). Where rounding carries into the
    exponent it loses the carry: 1.99 becomes 1.
    """
    if HAS_GPU:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float

    def convert(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return stock(values, source, target, rounding)
        rounded = torch.from_numpy(values.view(np.float32)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    convert.stock = stock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "contract: runs real vLLM, on a host with a made-up GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
