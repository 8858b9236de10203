# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x demo`: what the plugin does, shown on whatever machine this is."""

import subprocess
import sys

from vllm_sm12x import device


def run_demo(*, gpu: bool | None = None) -> int:
    """Serve a tiny DeepSeek V4 on a GPU, or check its attention path on the CPU.

    Args:
        gpu: True: on the GPU, and an error without one; False: on the CPU; None: on the GPU if
            there is one that the kernels run on.

    Returns:
        The exit status: 0 only if everything that was shown is right.
    """
    from rich.console import Console

    console = Console()
    found = device.first_visible_device()
    unusable = _why_not(found)
    if gpu is None:
        gpu = unusable is None
        if unusable:
            console.print(f"No GPU to serve on: {unusable}.", markup=False)
    if not gpu:
        # Triton decides at its import whether it is the interpreter: a process of its own.
        interpreted = ["env", "TRITON_INTERPRET=1", sys.executable]
        return subprocess.run([*interpreted, "-m", "vllm_sm12x.demo.attention"]).returncode
    if isinstance(found, device.NoDevice) or unusable:
        console.print(f"The demo cannot run on a GPU: {unusable}.", markup=False)
        return 1
    from vllm_sm12x.demo.serving import run_serving

    return run_serving(found, console=console)


def _why_not(found: device.Device | device.NoDevice) -> str | None:
    """Why the kernels cannot run on this device, None if they can."""
    if isinstance(found, device.NoDevice):
        return found.reason
    if found.capability < device.MINIMUM_CAPABILITY:
        return "{} is SM {}.{}, and the kernels need SM {}.{}".format(
            found.name, *found.capability, *device.MINIMUM_CAPABILITY
        )
    return None
