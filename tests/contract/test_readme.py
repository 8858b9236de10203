# SPDX-License-Identifier: Apache-2.0
"""The README's tables are those of the code."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from vllm_sm12x import knobs
from vllm_sm12x.changes import CHANGES

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")
    with pytest.MonkeyPatch.context() as monkeypatch:
        # As for a script that Python runs from its folder.
        monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        return _loaded()


def _loaded():
    spec = importlib.util.spec_from_file_location(
        "update_readme", ROOT / "scripts/update_readme.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_up_to_date(script):
    text = (ROOT / "README.md").read_text()
    assert script.updated(text) == text, "run scripts/update_readme.py"


@pytest.mark.parametrize("old", ["", "old\n"])
def test_old_tables_are_replaced_and_the_rest_stays(script, old):
    text = "".join(
        f"before {name}\n<!-- begin:{name} -->\n{old}<!-- end:{name} -->\nafter {name}\n"
        for name in ("pins", "changes", "settings")
    )
    new = script.updated(text)
    assert "\nold\n" not in new
    assert [new.count(table()) for table in script.TABLES.values()] == [1, 1, 1]
    assert all(f"`{change.name}`" in new for change in CHANGES)
    assert all(f"`{knob.name}`" in new for knob in knobs.KNOBS)
    assert all(
        f"{place} {name}\n" in new for place in ("before", "after") for name in script.TABLES
    )
    assert script.updated(new) == new


@pytest.mark.parametrize("text", ["", "<!-- begin:pins -->\n<!-- end:pins -->\n"])
def test_missing_markers_are_an_error(script, text):
    with pytest.raises(ValueError, match="README.md needs one <!-- begin:"):
        script.updated(text)


def test_a_cell_never_breaks_its_table(script):
    for table in (make() for make in script.TABLES.values()):
        bars = {line.count("|") for line in table.splitlines()}
        assert len(bars) == 1


def test_the_commands_to_try_are_there():
    section = (ROOT / "README.md").read_text().split("\n## Try it\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    commands = [line.split()[0] for block in blocks for line in block.splitlines()]
    assert commands == ["./scripts/demo", "./scripts/test"]
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)
