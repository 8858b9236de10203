# SPDX-License-Identifier: Apache-2.0
"""Which GPU the plugin goes by, with NVML's answers made up here."""

from types import SimpleNamespace

import pytest

from vllm_sm12x import device
from vllm_sm12x.device import Device, NoDevice

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is a dependency of vllm-sm12x")

pytestmark = pytest.mark.once

# name, capability, UUID
GPUS = [
    ("NVIDIA H200", (9, 0), "GPU-aaaa1111"),
    ("NVIDIA RTX PRO 6000", (12, 0), "GPU-bbbb2222"),
    ("NVIDIA GB10", (12, 1), "GPU-cccc3333"),
]


@pytest.fixture
def nvml(monkeypatch):
    """Make NVML report `GPUS`; the list can be changed by the test. Counts open sessions."""
    state = SimpleNamespace(gpus=list(GPUS), open=0)

    def enter():
        state.open += 1

    def leave():
        state.open -= 1

    for name, answer in {
        "nvmlInit": enter,
        "nvmlShutdown": leave,
        "nvmlDeviceGetCount": lambda: len(state.gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: state.gpus[index],
        "nvmlDeviceGetName": lambda gpu: gpu[0],
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: list(gpu[1]),
        "nvmlDeviceGetUUID": lambda gpu: gpu[2],
        "nvmlDeviceGetHandleByUUID": lambda uuid: ("MIG", uuid),
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: state.gpus[1],
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=96 * 2**30),
        "nvmlSystemGetDriverVersion": lambda: "580.95",
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_SM12X_ASSUME", raising=False)
    yield state
    assert state.open == 0, "an NVML session was left open"


@pytest.mark.parametrize(
    "visible, name",
    [
        (None, "NVIDIA H200"),
        ("1", "NVIDIA RTX PRO 6000"),
        ("2,0", "NVIDIA GB10"),
        ("GPU-bbbb2222", "NVIDIA RTX PRO 6000"),
        ("GPU-c", "NVIDIA GB10"),
        ("MIG-1234", "NVIDIA RTX PRO 6000"),
    ],
)
def test_first_visible_device(nvml, monkeypatch, visible, name):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    capability = next(gpu[1] for gpu in GPUS if gpu[0] == name)
    assert device.first_visible_device() == Device(name, capability, 96 * 2**30, "580.95")


@pytest.mark.parametrize(
    "visible, reason",
    [
        ("", "hides every GPU"),
        ("-1", "hides every GPU"),
        ("3", "GPU 3, and there are 3"),
        ("GPU-dddd", "'GPU-dddd', which is no GPU here"),
    ],
)
def test_hidden_devices_have_a_reason(nvml, monkeypatch, visible, reason):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = device.first_visible_device()
    assert isinstance(found, NoDevice) and reason in found.reason


def test_no_gpu_and_no_nvml_have_reasons(nvml, monkeypatch):
    nvml.gpus.clear()
    assert device.first_visible_device() == NoDevice("NVML finds no NVIDIA GPU")

    def broken():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", broken)
    assert "Driver Not Loaded" in device.first_visible_device().reason


def test_a_gpu_without_memory_of_its_own_is_a_gpu(nvml, monkeypatch):
    def not_supported(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", not_supported)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert device.first_visible_device() == Device("NVIDIA GB10", (12, 1), None, "580.95")


def test_assumed_capability_needs_a_gpu(nvml, monkeypatch):
    found = device.first_visible_device()
    assert device.effective_capability(found) == (9, 0)
    monkeypatch.setenv("VLLM_SM12X_ASSUME", "12.1")
    assert device.effective_capability(found) == (12, 1)
    assert device.effective_capability(NoDevice("none")) is None


def test_shared_memory_limit_is_99_kib():
    assert device.SM12X_SHARED_MEMORY_BYTES == 99 * 1024
