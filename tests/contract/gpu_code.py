# SPDX-License-Identifier: Apache-2.0
"""Extensions with made-up GPU code, and a FlashInfer whose FP4 GEMM lacks its waits."""

import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path

KINDS = {"compute": 1, "sm": 2}
SUFFIXES = {"": 0, "a": 1 << 20, "f": 1 << 21}


def image(name: str, payload: bytes = b"x" * 24) -> bytes:
    """One image, `sm_120f` or `compute_80`, with the fields that `fatbinary` 13.5 writes."""
    kind, _, architecture = name.partition("_")
    suffix = architecture.lstrip("0123456789")
    number = int(architecture.removesuffix(suffix))
    header = struct.pack(
        "<HHIQIIIIIIQQQ",
        KINDS[kind], 0x101, 64, len(payload), 0, 0, 0x10008, number, 64, 0,
        SUFFIXES[suffix] | 0x8011, 0, len(payload),
    )  # fmt: skip
    return header + payload


def fat_binary(names: Sequence[str]) -> bytes:
    body = b"".join(map(image, names))
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def extension(file: Path, sources: Sequence[Sequence[str]], constant: bytes = b"") -> Path:
    """An ELF library with a fat binary for each of `sources`, and a constant for the host."""
    sections = {
        "": b"",
        ".nv_fatbin": b"".join(fat_binary(names) + bytes(8) for names in sources),
        ".rodata": constant,
        ".shstrtab": b"",
    }
    names = b""
    offsets = {}
    for name in sections:
        offsets[name] = len(names)
        names += name.encode() + b"\0"
    sections[".shstrtab"] = names
    body, table = b"", b""
    for name, content in sections.items():
        start = 64 + len(body)
        table += struct.pack("<IIQQQQIIQQ", offsets[name], 1, 0, 0, start, len(content), 0, 0, 8, 0)
        body += content
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 4, 3)
    file.write_bytes(header + body + table)
    return file


def flashinfer_package(site: Path, left_out: str = "", of_header: str = "") -> Path:
    """A package `flashinfer` of links to the installed one, whose build files lack some text."""
    spec = importlib.util.find_spec("flashinfer")
    assert spec and spec.origin, "every pin asks for FlashInfer"
    real, package = Path(spec.origin).parent, site / "flashinfer"
    header = "data/cutlass/include/cutlass/arch/grid_dependency_control.h"
    site.mkdir(exist_ok=True)
    package.symlink_to(real)
    for name, without in (
        ("jit/core.py", ""),
        ("jit/gemm/core.py", left_out),
        (header, of_header),
    ):
        text = (real / name).read_text()
        assert without in text
        _own_folder(package, (package / name).parent)
        (package / name).unlink()
        (package / name).write_text(text.replace(without, "") if without else text)
    return package


def _own_folder(package: Path, folder: Path) -> None:
    """Turn links on the way to a folder into folders of links."""
    if folder != package:
        _own_folder(package, folder.parent)
    if folder.is_symlink():
        there = folder.readlink()
        folder.unlink()
        folder.mkdir()
        for entry in there.iterdir():
            (folder / entry.name).symlink_to(entry)
