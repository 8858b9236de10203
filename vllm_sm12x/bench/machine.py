# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on. Every result file begins with it."""

import datetime
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def describe_machine(revision: str | None = None) -> dict[str, Any]:
    """GPU, driver, software versions, commit, date and label.

    `label` is "native" on an SM12x GPU, "proxy" on any other one and wherever VLLM_SM12X_ASSUME
    pretends. `revision` (`<commit>` or `<commit>-dirty`) is for a copy of the tree without git.
    `commit` and `dirty` are None when nobody knows them.
    """
    import torch

    import vllm_sm12x
    from vllm_sm12x import knobs
    from vllm_sm12x.device import Device, first_visible_device

    found = first_visible_device()
    device = found if isinstance(found, Device) else None
    is_sm12x = device is not None and device.capability[0] == 12
    revision = revision or _git_revision()
    return {
        "label": "native" if is_sm12x and not knobs.get("VLLM_SM12X_ASSUME") else "proxy",
        "gpu": device.name if device else "none",
        "gpus": torch.cuda.device_count(),
        "capability": list(device.capability) if device else None,
        "driver": device.driver if device else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vllm": _version("vllm"),
        "vllm_sm12x": vllm_sm12x.__version__,
        "commit": revision.removesuffix("-dirty") if revision else None,
        "dirty": revision.endswith("-dirty") if revision else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same in one line."""
    capability = ".".join(map(str, machine["capability"] or ["?"]))
    state = {True: " with changes", False: "", None: ""}[machine["dirty"]]
    return (
        f"{machine['label']}: {machine['gpus']}x {machine['gpu']} ({capability}), "
        f"driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"Triton {machine['triton']}, vLLM {machine['vllm']}, "
        f"vllm-sm12x {machine['vllm_sm12x']} at {machine['commit'] or 'unknown commit'}{state}, "
        f"{machine['date']}"
    )


def write_result(path: Path, machine: dict[str, Any], **result: Any) -> None:
    """Write one result file: the machine first, then what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n", encoding="utf-8")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """`<commit>` or `<commit>-dirty`; None if ROOT is not a git checkout with a commit."""
    git = ["git", "-C", str(ROOT)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
            return None
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None
