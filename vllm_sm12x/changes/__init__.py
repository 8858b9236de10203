# SPDX-License-Identifier: Apache-2.0
"""The table of everything that the plugin changes in vLLM, and this process's state of it."""

from vllm_sm12x.changes import (
    attention,
    fp8_tuning,
    host,
    hyper_connections,
    kernels,
    loading,
    model,
    readiness,
)
from vllm_sm12x.changes.change import Applied, Change

CHANGES: tuple[Change, ...] = (
    *host.ROWS,
    *attention.ROWS,
    *model.ROWS,
    *hyper_connections.ROWS,
    *loading.ROWS,
    *fp8_tuning.ROWS,
    *readiness.ROWS,
    *kernels.ROWS,
)

_process = Applied(CHANGES)
apply_all = _process.apply_all
undo_all = _process.undo_all
report = _process.report


def markdown_table() -> str:
    """The README's table of changes."""
    rows = [
        f"| `{row.name}` | {row.kind.name.lower()} | {row.what} | {row.why} |" for row in CHANGES
    ]
    header = ["| Change | Kind | What | Without it |", "| --- | --- | --- | --- |"]
    return "\n".join([*header, *rows]) + "\n"
