# SPDX-License-Identifier: Apache-2.0
"""The drift gate: `python scripts/drift [VERSION ...]`.

Reads released vLLM wheels, installs none of their dependencies, imports nothing of vLLM, and prints
for each step from one release to the next what moved of all that the plugin needs: Breaking,
Behavioural, Dependencies, Unchanged. Without arguments the steps are those between the pins. A
version given is compared with the pin below it and with the pin above it.

The exit status is 1 if a release asked about lacks something that the plugin must find there.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from comparison import SECTIONS, Line, Report, compare, missing
from needs import Block, Source, needs, rows
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.markup import escape
from trees import Tree
from wheels import default_cache, tree_of

import vllm_sm12x
from vllm_sm12x.vllm_api.version import PINS

PLUGIN = Path(vllm_sm12x.__file__).parent
STYLES = {"Breaking": "red", "Behavioural": "yellow", "Dependencies": "cyan", "Unchanged": "dim"}

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def drift(
    versions: Annotated[
        list[str] | None, typer.Argument(help="vLLM releases; without any, the pins.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where unpacked wheels are kept.", show_default=False)
    ] = None,
    to: Annotated[Path | None, typer.Option("--json", help="Write the reports here too.")] = None,
    unchanged: Annotated[bool, typer.Option(help="Print the symbols that did not change.")] = True,
) -> None:
    if to is not None and not to.absolute().parent.is_dir():
        raise typer.BadParameter(f"--json {to}: the folder {to.parent} does not exist")
    console = Console(highlight=False, soft_wrap=True)
    try:
        asked = [Version(version) for version in versions or PINS]
    except InvalidVersion as error:
        raise typer.BadParameter(f"{error}; a release of vLLM looks like {PINS[-1]}") from error
    source = Source(PLUGIN).needs()
    needed: dict[Version, tuple[Tree, Block]] = {}
    steps = steps_between(asked, [Version(pin) for pin in PINS])
    try:
        for version in dict.fromkeys([*asked, *(version for step in steps for version in step)]):
            tree = tree_of(version, cache or default_cache())
            needed[version] = tree, needs(tree, source, rows(tree, PLUGIN))
    except RuntimeError as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error
    reports = []
    for old, new in steps:
        (was, needed_then), (now, needed_now) = needed[old], needed[new]
        reports.append(compare(was, now, needed_then, needed_now))
        show(reports[-1], console, unchanged)
    gate = {}
    for version in asked:
        older = [tree for other, (tree, _) in needed.items() if other < version]
        gate[str(version)] = missing(*needed[version], older)
    for release, lines in gate.items():
        verdict = f"[red]lacks {len(lines)}[/]" if lines else "[green]has[/] everything"
        console.print(f"vLLM {release} {verdict} that the plugin must find there")
        for line in lines:
            console.print(as_text(line))
    if to is not None:
        lacking = {release: [asdict(line) for line in lines] for release, lines in gate.items()}
        result = {"missing": lacking, "reports": [report.as_json() for report in reports]}
        to.write_text(json.dumps(result, indent=1) + "\n")
    raise typer.Exit(1 if any(gate.values()) else 0)


def steps_between(asked: list[Version], pins: list[Version]) -> list[tuple[Version, Version]]:
    """From which release to which: to each asked from the pin below it, and on to the pin above.

    Between pins that are asked about, the step above is the next one's step from below.
    """
    steps: list[tuple[Version, Version]] = []
    for version in asked:
        below = max((pin for pin in pins if pin < version), default=None)
        above = min((pin for pin in pins if pin > version), default=None)
        steps += [(below, version)] if below is not None else []
        steps += [(version, above)] if above is not None and version not in pins else []
    return list(dict.fromkeys(steps))


def show(report: Report, console: Console, unchanged: bool) -> None:
    """Print one upgrade report."""
    console.print(f"\n[bold]vLLM {report.old} to {report.new}")
    for section in SECTIONS:
        lines = report.sections[section]
        console.print(f"[{STYLES[section]}]{section}[/] ({len(lines)})")
        if section != "Unchanged" or unchanged:
            for line in lines:
                console.print(as_text(line))
    console.print()


def as_text(line: Line) -> str:
    """One line: the symbol, what changed, and who needs it."""
    what = f": {line.what}" if line.what else ""
    by = f" ({', '.join(line.by)})" if line.by else ""
    return escape(f"  {line.symbol}{what}{by}")


if __name__ == "__main__":
    app()
