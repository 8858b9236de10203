# SPDX-License-Identifier: Apache-2.0
"""A row of the race: results are compared first, and only what is right gets a time."""

from typing import Any

import torch
from triton.errors import TritonError

from vllm_sm12x.bench.case import Call, Case
from vllm_sm12x.bench.report import NAMES
from vllm_sm12x.bench.timing import interleaved

SLOWEST_RATIO = 2.5  # ours to DeepGEMM, on every row that it has


def gate(case: Case) -> tuple[dict[str, list[Call]], dict[str, float], dict[str, str]]:
    """Build the peers and compare every result.

    Returns:
        calls by name, what can be run; errors by name, ours against the oracle and the peers
        against ours (their worst over the input sets); refusals by name, in words.
    """
    calls, refused = {"ours": case.ours}, {}
    for name, build in case.peers.items():
        try:
            built = build()
            built[0]()
        # NotHereError, and what libraries and Triton's compiler refuse with.
        except (RuntimeError, ValueError, TritonError) as error:
            refused[name] = str(error).strip().splitlines()[0]
        else:
            calls[name] = built
    errors = {"ours": case.error(case.ours[0]())}
    for name in list(calls)[1:]:
        pairs = zip(calls[name], case.ours, strict=True)
        errors[name] = max(case.difference(theirs(), ours()) for theirs, ours in pairs)
    return calls, errors, refused


def red_variants(case: Case, errors: dict[str, float]) -> list[str]:
    """Which of them are outside their tolerance. NaN is."""
    limits = {name: case.peer_tolerance for name in errors} | {"ours": case.tolerance}
    return [name for name, error in errors.items() if not error <= limits[name]]


def extra_memory(call: Call) -> int:
    """Bytes that one call takes at its peak, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def repetitions(call: Call, sets: int) -> tuple[int, int]:
    """Calls in a graph, a multiple of the input sets, and replays of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    microseconds = start.elapsed_time(end) * 1e3
    calls = sets * max(1, round(min(20, 20_000 / microseconds) / sets))
    return calls, round(min(30, max(7, 200_000 / (calls * microseconds))))


def measure(case: Case, rates: dict[str, float]) -> dict[str, Any]:
    """One row of the result: errors first, times only if all of them are within tolerance.

    Args:
        rates: what was measured on this GPU: `copy` in bytes a second, `bf16` and `fp8` in FLOP.
    """
    calls, errors, refused = gate(case)
    red = red_variants(case, errors)
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "series": case.series,
        "at": case.at,
        "error": errors,
        "tolerance": {"ours": case.tolerance, "peers": case.peer_tolerance},
        "red": red,
        "refused": refused,
        "input_sets": len(case.ours),
        "bytes": case.bytes,
        "flops": case.flops,
        "matrix": case.matrix,
        "note": case.note,
    }
    if red:
        return row | {"median_us": {}, "iqr_us": {}, "floors": {}, "missed": []}
    if case.memory:
        row["extra_bytes"] = {name: extra_memory(variant[0]) for name, variant in calls.items()}
    count, rounds = repetitions(case.ours[0], len(case.ours))
    timings = interleaved(calls, calls=count, rounds=rounds)
    row["median_us"] = {name: timing.median_us for name, timing in timings.items()}
    row["iqr_us"] = {name: timing.iqr_us for name, timing in timings.items()}
    return row | judge(row["median_us"], case, rates)


def judge(medians: dict[str, float], case: Case, rates: dict[str, float]) -> dict[str, Any]:
    """Rates of ours, the floors that the row has, and those it missed, in words.

    `floor_us` is the least time that this GPU allows: bytes at the copy bandwidth or FLOP at the
    matrix rate, whichever takes longer.
    """
    seconds = medians["ours"] / 1e6
    share = case.bytes / seconds / rates["copy"]
    floor = max(case.bytes / rates["copy"], case.flops / rates[case.matrix]) * 1e6
    ratios = {name: medians["ours"] / us for name, us in medians.items() if name != "ours"}
    floors, missed = {}, []
    if case.copy_share is not None:
        floors["copy_share"] = case.copy_share
        if share < case.copy_share:
            missed.append(f"{share:.0%} of the copy bandwidth, not {case.copy_share:.0%}")
    for name, slowest in ({"deep_gemm": SLOWEST_RATIO} | case.slowest).items():
        if name in ratios:
            floors["ratio"] = slowest
            if ratios[name] > slowest:
                missed.append(f"{ratios[name]:.2f} x {NAMES[name]}, not {slowest}")
    return {
        "copy_share": share,
        "flops_per_second": case.flops / seconds,
        "floor_us": floor,
        "ratios": ratios,
        "floors": floors,
        "missed": missed,
    }
