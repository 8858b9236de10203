# SPDX-License-Identifier: Apache-2.0
"""Compiles in worker processes, where Triton is not the interpreter, and prints what came out."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import triton
from cross_compile import Case, Compiled, compile_case


@pytest.fixture(scope="module")
def compiler(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], list[Compiled]]]:
    """What the launches of a case compile to; the module's cases are compiled side by side."""
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path
        and hasattr(item, "callspec")
        and isinstance(item.callspec.params.get("case"), Case)
    ]
    sharing = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    processes = max(1, (os.cpu_count() or 1) // sharing)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    futures: dict[Case, Future] = {}

    def start(case: Case) -> None:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)  # the pool's workers inherit it
            futures[case] = pool.submit(compile_case, case)

    def get(case: Case) -> list[Compiled]:
        if case not in futures:
            start(case)
        return futures[case].result()

    for case in wanted:
        start(case)
    yield get
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def compiled(
    compiler: Callable[[Case], list[Compiled]], record_property: Callable[[str, object], None]
) -> Callable[[Case], list[Compiled]]:
    """`compiled(case)`: its launches, which are also put on record for the summary."""

    def get(case: Case) -> list[Compiled]:
        launches = compiler(case)
        for index, launch in enumerate(() if case.tile is None else launches):
            variant = f"{case!r} launch {index}"
            key = (launch.kernel, case.tile, f"sm_{case.arch}")
            record_property("compiled", (variant, *key, *_sizes(launch)))
        return launches

    return get


def _sizes(launch: Compiled) -> tuple[int, int, int]:
    return launch.registers, launch.shared, launch.stack


def pytest_terminal_summary(terminalreporter) -> None:
    # Reports carry it, so that it also arrives from pytest-xdist's workers.
    rows = {
        tuple(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "compiled"
    }
    table: dict[tuple[str, str, str], list[tuple[int, int, int]]] = {}
    for _, kernel, tile, arch, *sizes in rows:
        table.setdefault((kernel, tile, arch), []).append(tuple(sizes))
    if not table:
        return
    terminalreporter.section(
        f"compiled by Triton {triton.__version__}: the largest of each kernel's variants"
    )
    row = "{:<26}{:>12}{:>8}{:>10}{:>11}{:>10}{:>8}".format
    header = ("kernel", "tile", "arch", "variants", "registers", "shared B", "stack B")
    terminalreporter.write_line(row(*header))
    for key, sizes in sorted(table.items()):
        largest = [max(column) for column in zip(*sizes, strict=True)]
        terminalreporter.write_line(row(*key, len(sizes), *largest))
