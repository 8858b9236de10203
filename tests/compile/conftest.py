# SPDX-License-Identifier: Apache-2.0
"""Compiles in worker processes, where Triton is not the interpreter, and prints what came out."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from cross_compile import Case, Compiled, compile_case

_measured = pytest.StashKey[dict[Case, list[Compiled]]]()


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], list[Compiled]]]:
    """What the launches of a case compile to; all parametrised cases are compiled side by side."""
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and isinstance(item.callspec.params.get("case"), Case)
    ]
    measured = request.config.stash.setdefault(_measured, {})
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    futures: dict[Case, Future] = {}

    def start(case: Case) -> None:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)  # the pool's workers inherit it
            futures[case] = pool.submit(compile_case, case)

    def get(case: Case) -> list[Compiled]:
        if case not in futures:
            start(case)
        launches = measured[case] = futures[case].result()
        return launches

    for case in wanted:
        start(case)
    yield get
    pool.shutdown(cancel_futures=True)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table: dict[tuple[str, str, str], list[Compiled]] = {}
    for case, launches in config.stash.get(_measured, {}).items():
        for launch in () if case.tile is None else launches:
            key = (launch.kernel, case.tile, f"sm_{case.arch}")
            table.setdefault(key, []).append(launch)
    if not table:
        return
    terminalreporter.section("compiled for SM12x: the largest of each kernel's variants")
    row = "{:<26}{:>12}{:>8}{:>10}{:>11}{:>10}{:>8}".format
    header = ("kernel", "tile", "arch", "variants", "registers", "shared B", "stack B")
    terminalreporter.write_line(row(*header))
    for key, launches in sorted(table.items()):
        sizes = [(launch.registers, launch.shared, launch.stack) for launch in launches]
        largest = [max(column) for column in zip(*sizes, strict=True)]
        kernel, tile, arch = key
        terminalreporter.write_line(row(kernel, tile, arch, len(launches), *largest))
