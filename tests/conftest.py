# SPDX-License-Identifier: Apache-2.0
"""What every test shares: where kernels run, the markers, and hypothesis' profile."""

import os
from collections.abc import Iterator

import hypothesis
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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "contract: runs real vLLM, on a host with a made-up GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
