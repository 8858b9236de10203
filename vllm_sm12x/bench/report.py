# SPDX-License-Identifier: Apache-2.0
"""A race's rows as a table on the terminal, in Markdown, and drawn."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape

NAMES = {
    "deep_gemm": "DeepGEMM",
    "flash_mla": "FlashMLA",
    "flashinfer": "FlashInfer",
    "logits, top-k": "two passes",
    "rocm": "vLLM's ROCm Triton",
    "torch": "torch",
}
COLUMNS = (
    "op",
    "errors",
    "ours us",
    "peers us",
    "ours / peer",
    "of floor",
    "TFLOP/s",
    "floors",
    "",
)


def table_cells(row: dict[str, Any]) -> list[str]:
    """The row as the terminal's table has it; a red one has no times."""
    medians = row["median_us"]

    def microseconds(name: str) -> str:
        return f"{medians[name]:.1f} ± {row['iqr_us'][name]:.1f}"

    peers = [name for name in medians if name != "ours"]
    memory = row.get("extra_bytes", {})
    more = [row["note"]]
    more += [f"{NAMES.get(name, name)} {size / 2**20:.0f} MiB" for name, size in memory.items()]
    more += [f"{NAMES.get(name, name)}: {why}" for name, why in row["refused"].items()]
    if row["red"]:
        verdict = f"[red]red: {', '.join(row['red'])}[/]"
    elif row["missed"]:
        verdict = f"[red]{'; '.join(row['missed'])}[/]"
    else:
        verdict = "pass" if row["floors"] else "-"
    return [
        f"{row['op']} {row['shape']}",
        " / ".join(f"{error:.0e}" for error in row["error"].values()),
        microseconds("ours") if medians else "-",
        "\n".join(f"{NAMES.get(name, name)} {microseconds(name)}" for name in peers) or "-",
        "\n".join(f"{row['ratios'][name]:.2f}" for name in peers) or "-",
        f"{row['floor_us'] / medians['ours']:.0%}" if medians else "-",
        f"{row['flops_per_second'] / 1e12:.0f}" if medians else "-",
        verdict,
        escape("; ".join(filter(None, more))),
    ]


def markdown_table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows that were timed, for a document; a line for each peer."""
    lines = [
        "| op | ours, us | peer | its us | ratio | of floor | of copy | TFLOP/s | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        medians = row["median_us"]
        if not medians:
            continue
        ours = medians["ours"]
        mine = (
            f"{row['floor_us'] / ours:.0%}",
            f"{row['copy_share']:.0%}",
            f"{row['flops_per_second'] / 1e12:.0f}",
        )
        for name in [name for name in medians if name != "ours"] or [None]:
            peer = ("-", "-", "-") if name is None else (
                NAMES.get(name, name), f"{medians[name]:.1f}", f"{row['ratios'][name]:.2f}"
            )  # fmt: skip
            difference = "-" if name is None else f"{row['error'][name]:.0e}"
            cells = (f"`{row['op']}` {row['shape']}", f"{ours:.1f}", *peer, *mine, difference)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def obstacle_to_drawing(path: Path) -> str | None:
    """Why `draw` cannot write this file, in words; None if it can."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as error:
        return f"--plot needs {error.name}: pip install 'vllm-sm12x[bench]'"
    endings = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in endings:
        return f"--plot writes {', '.join(sorted(endings))}, not {path.name}"
    return None


def draw(result: dict[str, Any], path: Path) -> None:
    """A roofline of all rows, and for each op its time over tokens or keys, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["median_us"]]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = 3
    height = math.ceil((1 + len(ops)) / columns)
    figure, grid = pyplot.subplots(
        height, columns, figsize=(6 * columns, 4.5 * height), squeeze=False, layout="constrained"
    )
    figure.suptitle(result["title"], fontsize=9)
    panels = grid.flatten()
    _roofline(panels[0], rows, result["rates"])
    for panel, op in zip(panels[1:], ops, strict=False):
        _times(panel, op, [row for row in rows if row["op"] == op])
    for panel in panels[1 + len(ops) :]:
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _roofline(panel: Any, rows: list[dict[str, Any]], rates: dict[str, float]) -> None:
    intensities = [row["flops"] / row["bytes"] for row in rows]
    span = (min(intensities, default=1) / 2, max(intensities, default=1) * 2)
    for kind in ("bf16", "fp8"):
        corner = rates[kind] / rates["copy"]
        places = sorted({span[0], span[1], min(max(corner, span[0]), span[1])})
        roof = [min(place * rates["copy"], rates[kind]) / 1e12 for place in places]
        panel.plot(places, roof, color="grey", linestyle=":" if kind == "fp8" else "-")
        panel.annotate(f"{kind}, measured", (places[-1], roof[-1]), ha="right", va="bottom")
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        panel.scatter(
            [row["flops"] / row["bytes"] for row in mine],
            [row["flops_per_second"] / 1e12 for row in mine],
            label=op,
            s=14,
        )
    panel.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s", title="ours")
    if rows:
        panel.legend(fontsize=7)


def _times(panel: Any, op: str, rows: list[dict[str, Any]]) -> None:
    for number, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        mine = sorted((r for r in rows if r["series"] == series), key=lambda row: row["at"])
        for name in dict.fromkeys(name for row in mine for name in row["median_us"]):
            timed = [row for row in mine if name in row["median_us"]]
            ours = name == "ours"
            panel.plot(
                [row["at"] for row in timed],
                [row["median_us"][name] for row in timed],
                color=f"C{number}",
                linestyle="-" if ours else "--",
                marker="o" if ours else "x",
                label=f"{series}: {'ours' if ours else NAMES.get(name, name)}",
            )
    panel.set(xscale="log", yscale="log", xlabel="tokens or keys", ylabel="us", title=op)
    panel.legend(fontsize=6)
