# SPDX-License-Identifier: Apache-2.0
"""Which GPU code a compiled extension holds, and what of it runs on a GPU."""

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from gpu_code import extension

from vllm_sm12x.integration import mxfp4_experts
from vllm_sm12x.integration.extension import (
    Image,
    NotReadable,
    fat_binaries,
    has_constant,
)
from vllm_sm12x.vllm_api import extensions

pytestmark = pytest.mark.contract

# As in vLLM's wheels: Marlin's matrix kernels, one of its helpers, and files of other kernels.
MATRIX, BY_PTX_ONLY = ("sm_120f", "compute_80", "sm_80"), ("compute_80", "sm_80")
HELPER, OTHER = ("sm_75", "compute_80", "sm_80"), ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
SINCE_0_23 = [MATRIX] * 14 + [HELPER] + [("sm_75",)] * 7 + [OTHER] * 7
UNTIL_0_22 = [BY_PTX_ONLY] * 14 + [HELPER] + [("sm_75",)] * 7 + [("sm_89", "sm_120")] * 5


def image_of(name):
    kind, _, architecture = name.partition("_")
    suffix = architecture.lstrip("0123456789")
    number = int(architecture.removesuffix(suffix))
    return Image("cubin" if kind == "sm" else "ptx", divmod(number, 10), suffix)


@pytest.mark.parametrize(
    "name, on_120, on_121",
    [
        ("sm_120", True, True),
        ("sm_120f", True, True),
        ("sm_120a", True, False),
        ("sm_121", False, True),
        ("sm_121f", False, True),
        ("sm_121a", False, True),
        ("sm_90", False, False),
        ("sm_90a", False, False),
        ("sm_100f", False, False),
        ("compute_80", True, True),
        ("compute_90a", False, False),
        ("compute_100f", False, False),
        ("compute_120", True, True),
        ("compute_120f", True, True),
        ("compute_121", False, True),
    ],
)
def test_what_runs_where(name, on_120, on_121):
    """By NVIDIA's rules: minor revisions for native code, any later GPU for PTX, and a and f."""
    image = image_of(name)
    assert image.name == name
    assert (image.runs_on((12, 0)), image.runs_on((12, 1))) == (on_120, on_121)


def test_a_made_up_extension(tmp_path):
    sources = [("sm_120a", "compute_120f"), ("sm_90a", "sm_103", "compute_75")]
    file = extension(tmp_path / "made.so", sources, b"a constant")
    names = [tuple(image.name for image in binary) for binary in fat_binaries(file)]
    assert names == sources
    assert has_constant(file, b"constant") and not has_constant(file, b"another")
    # GPU code is not among the constants.
    assert not has_constant(file, b"xxxxxxxx")
    assert fat_binaries(extension(tmp_path / "none.so", [])) == []


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"#!/bin/sh", "no 64-bit little-endian ELF"),
        (lambda data: data[:70], "cut off"),
        (lambda data: data.replace(b"\x50\xed\x55\xba\x01", b"\x50\xed\x55\xba\x09"), "unknown"),
        (lambda data: data.replace(b"\x02\x00\x01\x01\x40", b"\x02\x00\x01\x01\x00"), "unknown"),
    ],
    ids=["empty", "no ELF", "cut off", "another version", "no header"],
)
def test_a_file_of_another_layout_is_refused_in_words(tmp_path, damage, words):
    file = extension(tmp_path / "made.so", [("sm_120",)])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(NotReadable, match=words) as raised:
        fat_binaries(file)
    assert str(file) in str(raised.value)


def test_the_real_extension_has_what_cuobjdump_lists():
    triton = importlib.util.find_spec("triton")
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = extensions.moe_extension()
    listed = Counter()
    for what in ("--list-elf", "--list-ptx"):
        run = subprocess.run([cuobjdump, what, file], capture_output=True, text=True, check=True)
        # It names no f, and an a for PTX alone.
        for number, kind in re.findall(r"\.sm_(\d+)a?\.(cubin|ptx)$", run.stdout, re.MULTILINE):
            listed[kind, divmod(int(number), 10)] += 1
    images = [image for binary in fat_binaries(file) for image in binary]
    assert Counter((image.kind, image.capability) for image in images) == listed
    assert listed["cubin", (12, 0)] > 20


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_the_installed_marlin_is_native(capability):
    build = mxfp4_experts.marlin_build(capability)
    assert build.native and not build.remedy
    assert "sm_120f code for SM {}.{}".format(*capability) in build.reason


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    def build(sources, capability=(12, 0)):
        file = extension(tmp_path / "_moe_C.abi3.so", sources)
        monkeypatch.setattr(extensions, "moe_extension", lambda: file)
        return mxfp4_experts.marlin_build(capability)

    return build


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_marlin_as_since_0_23_is_native_on_both(made_up, capability):
    assert made_up(SINCE_0_23, capability).native


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_marlin_as_until_0_22_says_what_to_install(made_up, capability):
    """Its other files have sm_120 code, which is not enough."""
    build = made_up(UNTIL_0_22, capability)
    assert not build.native
    assert build.reason == (
        "15 files of _moe_C.abi3.so have no code for SM {}.{} but compute_80 PTX".format(
            *capability
        )
    )
    assert "install vllm>=0.23" in build.remedy


def test_a_build_for_one_gpu_alone_is_not_for_the_other(made_up):
    alone = [("sm_120a", "compute_80")] * 14
    assert made_up(alone).native
    assert made_up(alone, (12, 1)).remedy


def test_no_code_at_all_and_no_extension_have_no_remedy(made_up, monkeypatch):
    build = made_up([("sm_90a",)] * 3)
    assert not build.native and not build.remedy and "has no code that runs on" in build.reason
    monkeypatch.setattr(extensions, "moe_extension", lambda: None)
    assert "without the extension _moe_C" in mxfp4_experts.marlin_build((12, 0)).reason


def test_an_extension_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    file = tmp_path / "_moe_C.abi3.so"
    file.write_text("not an ELF file")
    monkeypatch.setattr(extensions, "moe_extension", lambda: file)
    build = mxfp4_experts.marlin_build((12, 0))
    assert not build.native and not build.remedy
    assert str(file) in build.reason
