# SPDX-License-Identifier: Apache-2.0
"""How safetensors weights are read: the choice, and reading ahead of vLLM's loader in a window."""

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vllm_sm12x.log import get_logger, once
from vllm_sm12x.vllm_api import loading as stock

GIB = 2**30
# vLLM's own numbers, by which it prefetches or says that it does not.
FITS_IN_RAM = 0.9
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre")
IN_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
# How far ahead of the loader to read: enough for a fast drive's queue, little next to the weights.
WINDOW_BYTES = 4 * GIB
WINDOW_SHARE_OF_RAM = 8
FLAG = "--safetensors-load-strategy"

logger = get_logger(__name__)


@dataclass(frozen=True)
class Choice:
    """How a checkpoint is read, whether the user said so, and the reason in words.

    `bounded`: prefetched by `ReadAhead`, and not by vLLM's own prefetch, which reads whole files
    without regard to where the loader is.
    """

    strategy: str
    explicit: bool
    why: str
    bounded: bool = False


def choose(
    explicit: str | None, checkpoint_bytes: int, available_bytes: int, file_system: str
) -> Choice:
    """Decide by `--safetensors-load-strategy` first, then by file system and sizes in bytes.

    `available_bytes` is host memory; `file_system` is the kernel's name of it, "" if unknown.
    """
    if explicit is not None:
        return Choice(explicit, True, f"{FLAG} {explicit}")
    fits = checkpoint_bytes <= FITS_IN_RAM * available_bytes
    sizes = (
        f"the checkpoint's {checkpoint_bytes / GIB:.2f} GiB {'fit' if fits else 'do not fit'} into "
        f"{FITS_IN_RAM:.0%} of {available_bytes / GIB:.2f} GiB available RAM"
    )
    where = f"on {file_system or 'an unknown file system'}"
    if file_system in IN_MEMORY_FILE_SYSTEMS:
        return Choice("lazy", False, f"{file_system} is memory already")
    if file_system in NETWORK_FILE_SYSTEMS:
        return Choice("prefetch" if fits else "lazy", False, f"{sizes}, {where}, by vLLM's rule")
    return Choice("lazy" if fits else "prefetch", False, f"{sizes}, {where}", bounded=not fits)


def for_checkpoint(folder: Path, load_config_strategy: str | None) -> Choice:
    """The choice for a local checkpoint, with the memory that is available now.

    Raises FileNotFoundError where the folder has no safetensors file.
    """
    files = stock.safetensors_files(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder} has no *.safetensors file, and only those are prefetched."
        )
    return _choose_for(files, load_config_strategy)


def _choose_for(files: list[str], explicit: str | None) -> Choice:
    return choose(
        explicit,
        stock.checkpoint_bytes(files),
        stock.available_ram_bytes(),
        stock.file_system_of(files),
    )


def weights(
    original: Callable[..., Iterator[tuple[str, Any]]],
    hf_weights_files: list[str],
    use_tqdm_on_load: bool,
    safetensors_load_strategy: str | None = None,
    local_expert_ids: set[int] | None = None,
    *,
    memory_is_shared: bool,
    **options: Any,
) -> Iterator[tuple[str, Any]]:
    """Around vLLM's iterator over names and tensors: read ahead of it where `choose` says so.

    `memory_is_shared`: the GPU allocates from the host's memory, so the page cache must not grow
    with the checkpoint.
    """
    files = sorted(hf_weights_files, key=stock.reading_order)
    choice = _choose_for(files, safetensors_load_strategy)
    if not choice.bounded:
        yield from original(
            hf_weights_files,
            use_tqdm_on_load,
            safetensors_load_strategy,
            local_expert_ids,
            **options,
        )
        return
    window = min(WINDOW_BYTES, stock.available_ram_bytes() // WINDOW_SHARE_OF_RAM)
    message = f"Weights are prefetched, at most {window / GIB:.2f} GiB ahead: {choice.why}."
    if memory_is_shared:
        message += " Files that are done with leave the page cache, as the GPU shares the memory."
    once(logger, logging.INFO, f"{message} {FLAG} lazy opts out.")
    ahead = ReadAhead(
        files,
        lambda name: not stock.should_skip_weight(name, local_expert_ids),
        window=window,
        threads=options["safetensors_prefetch_num_threads"],
        block=options["safetensors_prefetch_block_size"],
        release=memory_is_shared,
    )
    with ahead:
        for name, tensor in original(
            hf_weights_files, use_tqdm_on_load, "lazy", local_expert_ids, **options
        ):
            ahead.reached(tensor.nbytes)
            yield name, tensor


class Span(NamedTuple):
    """A piece of one file: where, how long, and its place among all bytes to be read."""

    file: str
    offset: int
    length: int
    place: int


class ReadAhead:
    """Threads that bring into the page cache what a reader of safetensors files needs next.

    They follow the reader's order (files as given, tensors by name, those that are `wanted`) and
    stay within `window` bytes ahead of it. With `release`, files that the reader is done with
    leave the page cache. A block that is cached already is not read: ranks on one host share the
    work without knowing of each other.
    """

    def __init__(
        self,
        files: Sequence[str],
        wanted: Callable[[str], bool],
        *,
        window: int,
        threads: int,
        block: int,
        release: bool,
    ) -> None:
        self._window, self._block, self._release = window, block, release
        self._ends: deque[tuple[str, int]] = deque()  # files begun, and the place of their end
        self._spans = self._plan(files, wanted)
        self._next = next(self._spans, None)
        self._position = 0  # the reader has taken all before it
        self._done = 0  # and has let go of all before this
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]

    def __enter__(self) -> "ReadAhead":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._done = self._position
        self._release_files()

    def reached(self, size: int) -> None:
        """The reader takes its next tensor, of `size` bytes, and has let go of the one before."""
        with self._changed:
            self._release_files()
            self._done = self._position
            self._position += size
            self._changed.notify_all()

    def _plan(self, files: Sequence[str], wanted: Callable[[str], bool]) -> Iterator[Span]:
        place = 0
        for file in files:
            for start, end in _ranges(file, wanted):
                for offset in range(start, end, self._block):
                    length = min(self._block, end - offset)
                    yield Span(file, offset, length, place)
                    place += length
            self._ends.append((file, place))

    def _take(self) -> Span | None:
        """The next span that the reader has not passed, when it comes into the window."""
        with self._changed:
            while not self._stopped and self._next is not None:
                span = self._next
                if span.place >= self._position + self._window:
                    self._changed.wait()
                    continue
                self._next = next(self._spans, None)
                if span.place + span.length > self._position:
                    return span
            return None

    def _work(self) -> None:
        buffer = memoryview(bytearray(self._block))
        try:
            while (span := self._take()) is not None:
                _bring_in(span, buffer)
        except OSError as error:
            # The reader meets the same error, and it is his to raise.
            once(logger, logging.WARNING, f"Prefetch ends early: {error}.")

    def _release_files(self) -> None:
        while self._ends and self._ends[0][1] <= self._done:
            file, _ = self._ends.popleft()
            if self._release:
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def _ranges(file: str, wanted: Callable[[str], bool]) -> list[tuple[int, int]]:
    """First and last offset of each wanted tensor, in the order in which safetensors names them.

    Format: 8 bytes of header length, a JSON header with offsets that begin behind it, the data
    (https://github.com/huggingface/safetensors, "Format").
    """
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    offsets = (header[name]["data_offsets"] for name in sorted(header) if wanted(name))
    return [(8 + length + start, 8 + length + end) for start, end in offsets]


def _bring_in(span: Span, buffer: memoryview) -> None:
    descriptor = os.open(span.file, os.O_RDONLY)
    try:
        if not _is_cached(descriptor, span):
            os.preadv(descriptor, [buffer[: span.length]], span.offset)
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, span: Span) -> bool:
    """Whether the first and the last byte are in the page cache; False where nobody can say."""
    for offset in (span.offset, span.offset + span.length - 1):
        try:
            os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError:
            return False
    return True
