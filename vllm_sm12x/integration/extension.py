# SPDX-License-Identifier: Apache-2.0
"""What a compiled extension holds: GPU code, by architecture, and constants.

nvcc puts the GPU code of each source file into one fat binary, an image for each architecture; the
linker joins them in the section `.nv_fatbin`. NVIDIA documents neither: the layout is read off
files that `fatbinary` 13.5 writes and `cuobjdump` 13 lists. Only headers are read, so compressed
images need not be unpacked and a file of any size takes milliseconds. Standard library only.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# As stored, in the order of their fields.
_ELF_IDENTITY = b"\x7fELF\x02\x01"  # 64 bit, little endian
_ELF_SECTION_TABLE = struct.Struct("<Q10xHHH")  # at 40: offset; at 58: entry size, count, names
_ELF_SECTION = struct.Struct("<II16xQQ")  # name, type, offset in the file, bytes
_ELF_NO_BITS = 8
_FAT_BINARY = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes after it
_FAT_BINARY_MAGIC = struct.pack("<I", 0xBA55ED50)
_IMAGE = struct.Struct("<HHIQ12xI8xQ")  # kind, version, header, payload, architecture, flags
_KINDS = {1: "ptx", 2: "cubin"}
_GPU_CODE = (".nv_fatbin", "__nv_relfatbin")
_ARCHITECTURE_SPECIFIC, _FAMILY_SPECIFIC = 1 << 20, 1 << 21


class NotReadable(ValueError):
    """A file is no extension whose layout is known; the message says what is wrong with it."""


class Image(NamedTuple):
    """GPU code for one architecture.

    Attributes:
        kind: "cubin", native code, or "ptx", which the driver compiles.
        capability: as in (12, 0) of sm_120.
        suffix: "a" of sm_120a, "f" of sm_120f, else "".
    """

    kind: str
    capability: tuple[int, int]
    suffix: str

    @property
    def name(self) -> str:
        """As nvcc calls it: sm_120f, compute_80."""
        prefix = "sm" if self.kind == "cubin" else "compute"
        return f"{prefix}_{self.capability[0]}{self.capability[1]}{self.suffix}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of that compute capability runs it, natively or through the driver.

        CUDA programming guide, "GPU Compatibility": native code runs on later minor revisions, PTX
        on any later GPU; `a` on exactly one capability; `f` within the family, which is a major.
        """
        if self.suffix == "a":
            return capability == self.capability
        if self.kind == "ptx" and not self.suffix:
            return capability >= self.capability
        return capability[0] == self.capability[0] and capability >= self.capability


FatBinary = tuple[Image, ...]  # one source file's code


def fat_binaries(extension: Path) -> list[FatBinary]:
    """The images of each fat binary; no fat binary where a library has no GPU code.

    Raises NotReadable, and OSError.
    """
    with _mapped(extension) as data:
        return [
            fat_binary
            for name, start, end in _sections(extension, data)
            if name in _GPU_CODE
            for fat_binary in _fat_binaries(extension, data, start, end)
        ]


def has_constant(extension: Path, text: bytes) -> bool:
    """Whether the host code has `text` among its constants. Raises NotReadable, and OSError."""
    with _mapped(extension) as data:
        return any(
            data.find(text, start, end) >= 0
            for name, start, end in _sections(extension, data)
            if name.startswith(".rodata")
        )


def _mapped(extension: Path) -> mmap.mmap:
    with extension.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise NotReadable(f"{extension} is empty") from None


def _sections(extension: Path, data: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """Name, start and end in the file of each section of an ELF file."""
    if data[: len(_ELF_IDENTITY)] != _ELF_IDENTITY:
        raise NotReadable(f"{extension} is no 64-bit little-endian ELF file")
    try:
        table, entry, count, names = _ELF_SECTION_TABLE.unpack_from(data, 40)
        entries = [_ELF_SECTION.unpack_from(data, table + i * entry) for i in range(count)]
        _, _, strings, _ = entries[names]
        for name, kind, start, size in entries:
            if kind == _ELF_NO_BITS:
                continue
            if start + size > len(data):
                raise NotReadable(f"{extension} is cut off: a section ends behind its end")
            at = strings + name
            yield data[at : data.find(b"\0", at)].decode(errors="replace"), start, start + size
    except (struct.error, IndexError):
        raise NotReadable(f"{extension} is cut off, or its ELF sections are damaged") from None


def _fat_binaries(extension: Path, data: mmap.mmap, start: int, end: int) -> Iterator[FatBinary]:
    position = start
    # Zeros align one fat binary behind the other.
    while (position := data.find(_FAT_BINARY_MAGIC, position, end)) >= 0:
        if position + _FAT_BINARY.size > end:
            raise NotReadable(f"{extension} has a fat binary that ends within its header")
        _, version, header, size = _FAT_BINARY.unpack_from(data, position)
        stop = position + header + size
        if version != 1 or header < _FAT_BINARY.size or stop > end:
            raise NotReadable(f"{extension} has a fat binary of an unknown layout")
        yield tuple(_images(extension, data, position + header, stop))
        position = stop


def _images(extension: Path, data: mmap.mmap, position: int, stop: int) -> Iterator[Image]:
    while position < stop:
        if position + _IMAGE.size > stop:
            raise NotReadable(f"{extension} has a fat binary that ends within an image")
        kind, _, header, payload, architecture, flags = _IMAGE.unpack_from(data, position)
        position += header + payload
        if header < _IMAGE.size or position > stop:
            raise NotReadable(f"{extension} has an image of an unknown layout")
        suffix = "a" if flags & _ARCHITECTURE_SPECIFIC else ""
        suffix = "f" if flags & _FAMILY_SPECIFIC else suffix
        if kind in _KINDS:
            yield Image(_KINDS[kind], divmod(architecture, 10), suffix)
