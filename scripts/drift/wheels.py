# SPDX-License-Identifier: Apache-2.0
"""The Python of a released vLLM: of this environment, of the cache, or of its wheel."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.version import Version
from trees import PACKAGE, Tree


class NotToBeHad(RuntimeError):
    """A release's wheel could not be had; says why."""


def default_cache() -> Path:
    """drift/ in this user's cache folder for the plugin."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "vllm-sm12x" / "drift"


def tree_of(version: Version, cache: Path) -> Tree:
    """The release's source, unpacked below `cache` if it is not installed here.

    Raises NotToBeHad.
    """
    installed = _installed(version)
    if installed is not None:
        return Tree(installed, version)
    folder = cache / str(version)
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be made ({error.strerror})"
            raise NotToBeHad(f"The folder {cache} {reason}; --cache names another.") from error
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{version}-") as scratch:
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            _unpack(version, unpacked)
            _keep_python(unpacked)
            unpacked.rename(folder)
    return Tree(folder, version)


def _installed(version: Version) -> Path | None:
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(found.locate_file("")))
    is_it = Version(found.version) == version and (folder / PACKAGE / "__init__.py").is_file()
    return folder if is_it else None


def _unpack(version: Version, folder: Path) -> None:
    uv = shutil.which("uv")
    installer = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    python = ["--python", sys.executable] if uv else []
    options = ["--quiet", *python, "--no-deps", "--only-binary", PACKAGE, "--target", str(folder)]
    # Not where this repository is: its constraints name one release.
    command = [*installer, "install", *options, f"{PACKAGE}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise NotToBeHad(
            f"The wheel of vLLM {version} could not be had by {'uv' if uv else 'pip'}: "
            f"{said or f'exit status {done.returncode}'}"
        )


def _keep_python(folder: Path) -> None:
    """Of an unpacked wheel keep what this tool reads: vLLM is 700 MB, its Python 40."""
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".py" and file.name != "METADATA":
            file.unlink()
