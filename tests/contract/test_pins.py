# SPDX-License-Identifier: Apache-2.0
"""One list of vLLM releases, in pyproject.toml, is what everything else follows."""

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_sm12x.vllm_api.version import SUPPORTED

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    extra: requirements
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items()
    if extra.startswith("vllm-")
}
RELEASES = [requirement.removeprefix("vllm==") for (requirement,) in EXTRAS.values()]


@pytest.fixture(scope="module")
def rows():
    spec = importlib.util.spec_from_file_location("pins", ROOT / "scripts/pins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pins()


@pytest.mark.once
class TestTheList:
    def test_an_extra_is_named_after_its_release(self):
        for extra, release in zip(EXTRAS, RELEASES, strict=True):
            assert re.fullmatch(r"\d+\.\d+\.\d+", release)
            assert extra == "vllm-" + "-".join(release.split(".")[:2])

    def test_it_begins_with_the_floor_and_goes_up(self):
        floor = next(line for line in PROJECT["project"]["dependencies"] if line[:4] == "vllm")
        assert floor == f"vllm{SUPPORTED}"
        numbers = [tuple(map(int, release.split("."))) for release in RELEASES]
        assert numbers == sorted(set(numbers))
        assert not SUPPORTED.contains(f"{numbers[0][0]}.{numbers[0][1] - 1}.99")
        assert all(SUPPORTED.contains(release) for release in RELEASES)

    def test_uv_knows_that_they_exclude_each_other(self):
        (conflict,) = PROJECT["tool"]["uv"]["conflicts"]
        assert [entry["extra"] for entry in conflict] == list(EXTRAS)

    def test_the_default_is_one_of_them(self, rows):
        (default,) = (row for row in rows if row.is_default)
        assert default.extra == PROJECT["tool"]["vllm-sm12x"]["default"]

    def test_the_wheel_carries_it(self, host):
        code = "from vllm_sm12x.vllm_api.version import PINS; print(*PINS)"
        assert host.command([sys.executable, "-c", code]).stdout.split() == RELEASES

    def test_a_source_tree_that_is_not_installed_knows_it_too(self, host):
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from importlib import metadata\n"
            "requires, metadata.requires = metadata.requires, lambda name: requires('no-' + name)\n"
            "from vllm_sm12x.vllm_api.version import PINS; print(*PINS)"
        )
        assert host.command([sys.executable, "-c", code]).stdout.split() == RELEASES

    def test_nothing_else_repeats_it(self):
        for file in [ROOT / "noxfile.py", *(ROOT / ".github/workflows").iterdir(),
                     *(ROOT / "scripts").glob("*.*"), ROOT / "scripts/test"]:  # fmt: skip
            assert not [release for release in RELEASES if release in file.read_text()], file


@pytest.mark.once
class TestTheLock:
    def test_it_has_every_release(self, rows):
        assert [(row.extra, row.vllm) for row in rows] == list(zip(EXTRAS, RELEASES, strict=True))

    def test_it_names_the_public_index_alone(self):
        hosts = set(re.findall(r"https?://[^/\"]+", (ROOT / "uv.lock").read_text()))
        assert hosts == {"https://pypi.org", "https://files.pythonhosted.org"}


def test_the_lock_is_what_is_installed(rows):
    """On a release that is not pinned there is nothing to compare with."""
    vllm = metadata.version("vllm")
    row = next((row for row in rows if row.vllm == vllm), None)
    if row is None:
        pytest.skip(f"vLLM {vllm} is not in uv.lock")
    installed = [metadata.version(name).split("+")[0] for name in ("torch", "triton")]
    assert installed == [row.torch, row.triton]


@pytest.mark.once
def test_nox_covers_every_release_and_every_triton(rows):
    pytest.importorskip("nox", reason="nox is in the dependency group test")
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "--list", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sessions = {session["session"] for session in json.loads(listed.stdout)}
    (default,) = (row for row in rows if row.is_default)
    others = [row for row in rows if not row.is_default]
    assert sessions == {
        "lint",
        "types",
        "drift",
        f"tests-{default.vllm}",
        *(f"contract-{row.vllm}" for row in others),
        *(f"compile-{row.triton}" for row in others if row.triton != default.triton),
    }
