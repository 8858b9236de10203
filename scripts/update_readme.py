# SPDX-License-Identifier: Apache-2.0
"""Write README.md's generated tables again: `python scripts/update_readme.py`."""

from pathlib import Path

import pins

from vllm_sm12x import changes, knobs

README = Path(__file__).parents[1] / "README.md"
TABLES = {
    "pins": pins.markdown_table,
    "changes": changes.markdown_table,
    "settings": knobs.markdown_table,
}


def updated(text: str) -> str:
    """`text` with what stands between each pair of markers generated anew. Raises ValueError."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs one {begin.strip()} and one {end}")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
