# SPDX-License-Identifier: Apache-2.0
"""The GPU that vLLM will use, asked from NVML: CUDA must stay untouched before vLLM forks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_sm12x import knobs

# CUDA programming guide, technical specifications per compute capability: 99 KiB of shared memory
# per thread block on 12.x, against 163 KiB and more on data-centre parts.
SM12X_SHARED_MEMORY_BYTES = 101_376
# Conversions from e4m3, which the attention's kernels use, begin with SM89.
MINIMUM_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Device:
    """One GPU. Memory in bytes, None where NVML has no number: a GB10 shares the host's memory."""

    name: str
    capability: tuple[int, int]
    total_memory: int | None
    driver: str


@dataclass(frozen=True)
class NoDevice:
    """There is no GPU to use, and why."""

    reason: str


def first_visible_device() -> Device | NoDevice:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, by index or UUID; never initialises CUDA."""
    try:
        import pynvml
    except ImportError as error:
        return NoDevice(f"nvidia-ml-py cannot be imported: {error}")
    visible = knobs.cuda_visible_devices()
    first = None if visible is None else visible.split(",")[0].strip()
    try:
        with _nvml(pynvml):
            handle = _handle(pynvml, first)
            if isinstance(handle, NoDevice):
                return handle
            return Device(
                name=pynvml.nvmlDeviceGetName(handle),
                capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                total_memory=_total_memory(pynvml, handle),
                driver=pynvml.nvmlSystemGetDriverVersion(),
            )
    except pynvml.NVMLError as error:
        return NoDevice(f"NVML says: {error}")


def effective_capability(device: Device | NoDevice) -> tuple[int, int] | None:
    """What policy and dispatch go by: VLLM_SM12X_ASSUME if set, else the device's own.

    None without a GPU, which no assumption replaces.
    """
    if isinstance(device, NoDevice):
        return None
    return knobs.get("VLLM_SM12X_ASSUME") or device.capability


@contextmanager
def _nvml(pynvml) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _total_memory(pynvml, handle) -> int | None:
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except pynvml.NVMLError_NotSupported:
        return None


def _handle(pynvml, entry: str | None):
    """The NVML handle of one CUDA_VISIBLE_DEVICES entry (None: the variable is unset)."""
    count = pynvml.nvmlDeviceGetCount()
    if count == 0:
        return NoDevice("NVML finds no NVIDIA GPU")
    if entry is None:
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    if entry in ("", "-1"):
        return NoDevice("CUDA_VISIBLE_DEVICES hides every GPU")
    if entry.isdecimal():
        if int(entry) >= count:
            return NoDevice(f"CUDA_VISIBLE_DEVICES names GPU {entry}, and there are {count}")
        return pynvml.nvmlDeviceGetHandleByIndex(int(entry))
    if entry.startswith("MIG-"):
        instance = pynvml.nvmlDeviceGetHandleByUUID(entry)
        return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
    for index in range(count):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        if pynvml.nvmlDeviceGetUUID(handle).startswith(entry):  # CUDA takes any unique prefix
            return handle
    return NoDevice(f"CUDA_VISIBLE_DEVICES names {entry!r}, which is no GPU here")
