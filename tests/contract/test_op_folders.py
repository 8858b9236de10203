# SPDX-License-Identifier: Apache-2.0
"""Every kernel has its oracle, its launch configurations, its page and its row."""

from pathlib import Path

import pytest

import vllm_sm12x.ops
from vllm_sm12x.ops.specs import SPECS

pytestmark = pytest.mark.once

OPS = Path(vllm_sm12x.ops.__file__).parent
PARTS = {"__init__.py", "README.md", "config.py", "kernel.py", "reference.py", "spec.py"}


def test_every_kernel_folder_is_complete_and_has_a_row():
    folders = {path.parent.name for path in OPS.glob("*/kernel.py")}
    assert folders == {spec.name for spec in SPECS}
    for folder in folders:
        missing = PARTS - {path.name for path in (OPS / folder).iterdir()}
        assert not missing, f"ops/{folder} lacks {sorted(missing)}"


def test_every_op_is_public():
    for spec in SPECS:
        assert getattr(vllm_sm12x.ops, spec.name) is spec.function
