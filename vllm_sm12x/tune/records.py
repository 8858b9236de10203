# SPDX-License-Identifier: Apache-2.0
"""What has been measured, kept beside vLLM's files, so that a second run goes on where one stopped.

`<folder>/<vLLM's name>.json` is for vLLM. `<folder>/measured/<the same name>` holds the times that
it was made from, and with which versions.
"""

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sm12x.integration.fp8_config_files import SMALL_M, Config, Table, default_config
from vllm_sm12x.tune.errors import TuneError

MEASURED = "measured"
# From here on vLLM's nearest-entry rule may stand for all larger M: the largest M of its own files.
LARGEST_M = 4096


@dataclass(frozen=True)
class Measured:
    """The outcome for one M. Times are medians of one call, in microseconds.

    `default_error` is the default's relative error to fp32, None where it has a NaN.
    """

    config: Config
    tuned_us: float
    default_us: float
    default_error: float | None
    default_is_right: bool
    tried: int
    did_not_fit: int  # more shared memory than the GPU has, or refused by the compiler
    wrong: int  # outside the tolerance
    complete: bool  # False: the time was up before all candidates were tried


class Records:
    """The outcomes of one file, by M."""

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        """`path` is vLLM's file. What was made with something else than `made_with` is ignored."""
        self.path = path
        self._notes = path.parent / MEASURED / path.name
        self._made_with = made_with
        self.by_m: dict[int, Measured] = {}

    def read(self) -> None:
        """Take up what an earlier run measured, if its notes are there and whole."""
        try:
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
            if notes["made_with"] == self._made_with:
                self.by_m = {int(m): Measured(**one) for m, one in notes["by_m"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            self.by_m = {}

    def add(self, m: int, measured: Measured, stock: Config) -> None:
        """Keep one outcome, and write both files. Raises TuneError."""
        self.by_m[m] = measured
        by_m = {m: asdict(self.by_m[m]) for m in sorted(self.by_m)}
        notes = {"made_with": self._made_with, "by_m": by_m}
        tuned = {m: one.config for m, one in self.by_m.items()}
        for path, content in (
            (self._notes, notes),
            (self.path, {str(m): config for m, config in fenced(tuned, stock).items()}),
        ):
            write_whole(path, json.dumps(content, indent=4) + "\n")


def fenced(tuned: Table, stock: Config) -> Table:
    """`tuned`, and the default before and behind it.

    vLLM takes the entry with the nearest M, so a file that ends at 4 would serve a prefill of 4,096
    rows with what was found for 4.
    """
    first, last = min(tuned), max(tuned)
    behind = last if last < LARGEST_M else None
    edges = (SMALL_M, SMALL_M + 1, first - 1, last + 1)
    fences = {
        m: default_config(stock, m)
        for m in edges
        if 1 <= m < first or (behind is not None and m > behind)
    }
    return dict(sorted({**tuned, **fences}.items()))


def write_whole(path: Path, content: str) -> None:
    """Write a file that is there as a whole or not at all. Raises TuneError."""
    partial: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            partial = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would hide the file from the user that vLLM runs as.
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise TuneError(f"{path.parent} cannot be written to: {error.strerror or error}.") from None


def check_writable(folder: Path) -> None:
    """Raises TuneError where no file can be made in `folder`, which is made if it is not there."""
    try:
        (folder / MEASURED).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=folder / MEASURED):
            pass
    except OSError as error:
        raise TuneError(f"{folder} cannot be written to: {error.strerror or error}.") from None
