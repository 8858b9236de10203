# SPDX-License-Identifier: Apache-2.0
"""The vLLM releases that the tests run on: pyproject.toml's extras, as uv.lock resolves them."""

from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Pin:
    """One release, by the extra of pyproject.toml that asks for it, with what it brings."""

    extra: str
    vllm: str
    torch: str
    triton: str
    is_default: bool


def pins() -> list[Pin]:
    """Every pin, in pyproject.toml's order, which is oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {(row["name"], row.get("version")): row for row in lock["package"]}

    def brought(dependency: str, name: str, version: str) -> str:
        """The version of `dependency` that one release of `name` is locked with."""
        rows = locked[name, version]["dependencies"]
        (row,) = (row for row in rows if row["name"] == dependency)
        # uv leaves out the version of what is locked once only.
        return row.get("version") or next(key[1] for key in locked if key[0] == dependency)

    rows = []
    for extra, requirements in project["project"]["optional-dependencies"].items():
        if extra.startswith("vllm-"):
            (requirement,) = requirements
            vllm = requirement.removeprefix("vllm==")
            torch = brought("torch", "vllm", vllm)
            triton = brought("triton", "torch", torch)
            is_default = extra == project["tool"]["vllm-sm12x"]["default"]
            rows.append(Pin(extra, vllm, torch, triton, is_default))
    return rows


def markdown_table() -> str:
    """README.md's table of the pins."""
    rows = ["| vLLM | torch | Triton |", "| --- | --- | --- |"]
    rows += [f"| {pin.vllm} | {pin.torch} | {pin.triton} |" for pin in pins()]
    return "\n".join(rows) + "\n"
