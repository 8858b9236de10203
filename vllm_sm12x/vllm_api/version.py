# SPDX-License-Identifier: Apache-2.0
"""Which vLLM is installed, and which are supported. Imports no vLLM."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

# The first release whose DeepSeek V4 model asks a function which attention class to build. There
# is no upper bound: a release in which a symbol moved shows as a drifted change.
SUPPORTED = SpecifierSet(">=0.23")


def _pins() -> tuple[str, ...]:
    """What the extras `vllm-<release>` ask for."""
    try:
        lines = metadata.requires("vllm-sm12x") or []
    except metadata.PackageNotFoundError:
        # Nothing is installed: this is a source tree.
        project = Path(__file__).parents[2] / "pyproject.toml"
        lines = re.findall(r'"(vllm==[^"]+)"', project.read_text())
    wanted = [one for one in map(Requirement, lines) if one.name == "vllm"]
    exact = [each.version for one in wanted for each in one.specifier if each.operator == "=="]
    return tuple(sorted(exact, key=Version))


# The releases that the tests run on, oldest first. The list itself is in pyproject.toml.
PINS = _pins()


def installed() -> Version | None:
    """The installed vLLM, None if there is none or its version does not parse."""
    try:
        return Version(metadata.version("vllm"))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None


def supported(version: Version | None) -> bool:
    """Whether the plugin changes anything on that vLLM; development builds count."""
    return version is not None and SUPPORTED.contains(version, prereleases=True)


def within(version: Version | None, versions: str) -> bool:
    """Whether `version` lies in the PEP 440 range `versions` ("" is every release)."""
    return version is not None and SpecifierSet(versions).contains(version, prereleases=True)


def beyond_pins(version: Version | None) -> str | None:
    """How a supported vLLM lies beyond what the tests run on, as a predicate; None if it does not.

    Releases between the pins are not beyond them, whatever their local suffix.
    """
    if version is None or not supported(version):
        return None
    if version.is_prerelease:
        return "is a development build"
    newest = PINS[-1]
    if Version(version.base_version) > Version(newest):
        return f"is newer than {newest}, the newest release that vllm-sm12x is tested on"
    return None
