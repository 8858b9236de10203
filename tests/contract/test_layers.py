# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: plugin -> changes -> integration -> vllm_api -> vllm; ops know no vLLM."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PACKAGE = Path(__file__).parents[2] / "vllm_sm12x"
LEAVES = {"", "knobs", "device", "log"}  # "" is vllm_sm12x itself
MAY_IMPORT = {
    "knobs": {"log"},
    "device": {"knobs"},
    "log": set(),
    "__init__": set(),
    "ops": {"ops"},
    "tiny_checkpoint": {"tiny_checkpoint", "ops"},
    "vllm_api": {"vllm_api", *LEAVES},
    "integration": {"integration", "vllm_api", "ops", *LEAVES},
    "changes": {"changes", "integration", "vllm_api", *LEAVES},
    "plugin": {"changes", "vllm_api", *LEAVES},
    "preflight": {"preflight", "changes", "integration", "vllm_api", *LEAVES},
    "doctor": {"preflight", "plugin", "changes", "vllm_api", *LEAVES},
    "demo": {"demo", "tiny_checkpoint", "ops", *LEAVES},
    "tune": {"tune", "integration", "vllm_api", *LEAVES},
    "bench": {"bench", "ops", "vllm_api", *LEAVES},
    "cli": {"doctor", "preflight", "demo", "tiny_checkpoint", "tune", "bench", *LEAVES},
    "__main__": {"cli"},
}
# What vLLM, half imported, calls or half-dead machines run: no heavy import at the top of these.
LIGHT = (
    *("plugin", "knobs", "device", "log", "doctor", "preflight", "changes", "cli"),
    *("__init__", "__main__"),
)
HEAVY = {"vllm", "torch", "triton", "numpy", "pynvml", "rich", "safetensors", "tokenizers"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The first part of a module's path below the package."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, anywhere in it, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of_import(name: str) -> str | None:
    """Which room of ours a dotted name leads to; None for somebody else's package."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    below = parts[1] if len(parts) > 1 else ""
    exists = (PACKAGE / below).is_dir() or (PACKAGE / f"{below}.py").is_file()
    return below if exists else ""


def test_every_room_is_known():
    assert {room(file) for file in FILES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    here = room(file)
    for name, line in imported(ast.parse(file.read_text())):
        there = room_of_import(name)
        if there is not None:
            assert there in MAY_IMPORT[here], f"{file}:{line}: {here} must not import {name}"
        elif name.split(".")[0] == "vllm":
            assert here == "vllm_api", f"{file}:{line}: only vllm_api imports {name}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name):
    for file in (file for file in FILES if room(file) == name):
        tops = [node for node in ast.parse(file.read_text()).body if not inside_function(node)]
        for node in tops:
            for imported_name, line in imported(node):
                package = imported_name.split(".")[0]
                assert package not in HEAVY, f"{file}:{line}: {imported_name} at the top"


def inside_function(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_knobs_reads_the_environment(file):
    if file.name == "knobs.py":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("os", "environ"), ("os", "getenv")}, (
                f"{file}:{node.lineno}: read settings through vllm_sm12x.knobs"
            )
