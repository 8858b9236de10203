# SPDX-License-Identifier: Apache-2.0
"""Which vLLM is installed, and which are supported. Imports no vLLM."""

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

# The first release whose DeepSeek V4 model asks a function which attention class to build. There
# is no upper bound: a release in which a symbol moved shows as a drifted change.
SUPPORTED = SpecifierSet(">=0.23")
# The releases that the tests run on.
PINS = ("0.23.0", "0.26.0")


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
