# SPDX-License-Identifier: Apache-2.0
"""What the plugin does on this machine, and why. Standard library only at import.

Each probe is guarded: what fails becomes a line of the report. The exit status is

- 0, healthy: the plugin is in force, or it leaves vLLM alone because this GPU is not SM12x;
- 1, degraded: it can do nothing here (no GPU, no supported vLLM, or vLLM is not let load it);
- 2, broken: a setting is wrong, torch or vLLM does not import, a change drifted or failed, or the
  model of `--model` does not fit or is refused.
"""

import contextlib
import importlib
import json
import logging
import platform
import shutil
import sys
import textwrap
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllm_sm12x import __version__, knobs

if TYPE_CHECKING:
    from vllm_sm12x.preflight import Request

HEALTHY, DEGRADED, BROKEN = 0, 1, 2
_HEALTH = ("healthy", "degraded", "broken")
_PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "deep-gemm", "nvidia-ml-py")
_ENTRY_POINTS = {
    "vllm.platform_plugins": "vllm_sm12x.plugin:platform",
    "vllm.general_plugins": "vllm_sm12x.plugin:register",
}


@dataclass
class Report:
    """Everything that the doctor found. `facts` is what `--json` prints."""

    facts: dict[str, Any] = field(default_factory=dict)
    status: int = HEALTHY
    findings: list[str] = field(default_factory=list)

    def find(self, status: int, sentence: str) -> None:
        self.status = max(self.status, status)
        if sentence not in self.findings:
            self.findings.append(sentence)


def run_doctor(
    *, as_json: bool = False, request: "Request | None" = None, recipes: bool = False
) -> int:
    """Examine, print, and return the exit status. `request` adds a model to examine."""
    report = examine(request)
    if recipes:
        from vllm_sm12x.preflight import RECIPES

        report.facts["recipes"] = [vars(recipe) for recipe in RECIPES]
    facts = {
        "vllm_sm12x": __version__,
        "health": _HEALTH[report.status],
        "findings": report.findings,
        **report.facts,
    }
    print(json.dumps(facts, indent=2) if as_json else _as_text(facts))
    return report.status


def examine(request: "Request | None" = None) -> Report:
    """Probe settings, packages, device, entry points, changes, ops and the model; never raises."""
    report = Report()

    def _preflight(report: Report) -> None:
        if request is not None:
            _examine_model(report, request)

    with _quiet():
        for probe in (_packages, _settings, _device, _entry_points, _changes, _ops, _preflight):
            try:
                probe(report)
            except knobs.KnobError as error:
                report.find(BROKEN, str(error))
            except Exception as error:
                name = probe.__name__.strip("_")
                report.facts.setdefault(name, None)
                report.find(BROKEN, f"{name}: {_described(error)}")
    return report


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """vLLM logs to stdout, where only the report belongs; what it says, the report says."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _settings(report: Report) -> None:
    report.facts["settings"] = [
        {"name": knob.name, "set": bool(knob.text), "value": knob.text or knob.default_text}
        for knob in knobs.KNOBS
    ]
    known: Container[str] = ()
    if report.facts["packages"].get("vllm") and not report.facts["broken_packages"]:
        from vllm_sm12x.vllm_api.envs import environment_variables as known
    knobs.check_environment(known)


def _packages(report: Report) -> None:
    versions = report.facts["packages"] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    broken = report.facts["broken_packages"] = {}
    for module in ("torch", "triton", "vllm"):
        if versions[module] is not None:
            try:
                importlib.import_module(module)
            except Exception as error:
                broken[module] = _described(error)
                report.find(
                    BROKEN, f"{module} {versions[module]} does not import: {broken[module]}."
                )


def _device(report: Report) -> None:
    from vllm_sm12x import device

    report.facts["device"] = None
    found = device.first_visible_device()
    if isinstance(found, device.NoDevice):
        report.facts["device"] = {"none": found.reason}
        report.find(DEGRADED, f"There is no GPU to serve on: {found.reason}.")
        return
    report.facts["device"] = {
        "name": found.name,
        "capability": "{}.{}".format(*found.capability),
        "memory_gib": found.total_memory and round(found.total_memory / 2**30, 1),
        "driver": found.driver,
    }


def _entry_points(report: Report) -> None:
    """How vLLM comes to the plugin, and whether it may."""
    allowed = knobs.vllm_plugins()
    report.facts["VLLM_PLUGINS"] = None if allowed is None else list(allowed)
    rows = report.facts["entry_points"] = {}
    obstacles = []
    for group, expected in _ENTRY_POINTS.items():
        rows[group] = {point.name: point.value for point in metadata.entry_points(group=group)}
        if rows[group].get("sm12x") != expected:
            obstacles.append(f"The entry point sm12x of {group} is missing: install vllm-sm12x.")
    if allowed is not None and "sm12x" not in allowed:
        obstacles.append(f"VLLM_PLUGINS={','.join(allowed)!r} leaves out sm12x.")
    report.facts["loaded_by_vllm"] = not obstacles
    for obstacle in obstacles:
        report.find(DEGRADED, obstacle)


def _changes(report: Report) -> None:
    """Go through both phases in this process, as a front end and then a worker would."""
    from vllm_sm12x import changes, plugin
    from vllm_sm12x.changes.change import Context, Phase, State

    report.facts["changes"] = []
    context = Context.detect()
    verdicts = [context.for_device, context.for_vllm]
    decisive = [verdict for verdict in verdicts if not verdict.yes] or verdicts
    because = [verdict.reason for verdict in decisive]
    if not context.for_vllm.yes:
        report.find(DEGRADED, f"The plugin is off: {context.for_vllm.reason}.")
    elif context.untested:
        report.find(HEALTHY, context.untested)
    loaded = report.facts["loaded_by_vllm"]
    if not loaded:
        because.append("vLLM does not load the plugin")
    report.facts["active"] = {"yes": context.active and loaded, "because": "; ".join(because)}
    # Before vLLM is asked for anything: it does not even import then.
    conflict = plugin.conflicting_platforms() if context.active and loaded else None
    if conflict is not None:
        report.find(BROKEN, conflict)
    if report.facts["broken_packages"] or not loaded or conflict is not None:
        return
    try:
        if context.vllm is not None:
            plugin.register()
    except RuntimeError as refusal:
        report.find(BROKEN, str(refusal))
        return
    for phase in Phase:
        changes.apply_all(phase, context)
    for outcome in changes.report():
        row = outcome.change
        report.facts["changes"].append(
            {
                "name": row.name,
                "kind": row.kind.name.lower(),
                "state": outcome.state.value,
                "detail": outcome.detail,
            }
        )
        if outcome.state in (State.DRIFTED, State.FAILED):
            report.find(BROKEN, f"{row.name} {outcome.state.value}: {outcome.detail}.")
    if context.active:
        from vllm_sm12x.vllm_api.platform import current_platform_class

        current = current_platform_class()
        report.facts["platform"] = f"{current.__module__}.{current.__qualname__}"


def _ops(report: Report) -> None:
    """Who serves each op, or would on SM12x; needs neither a GPU, nor torch, nor vLLM."""
    from vllm_sm12x.changes import host
    from vllm_sm12x.changes.change import Context

    active = report.facts.get("active") or {"yes": False}
    on_path = active["yes"] and host.on_sm12x_path(Context.detect()).yes
    ours = knobs.get("VLLM_TRITON_MLA_SPARSE") is not False
    left_out = knobs.get("VLLM_SM12X_OFF")
    report.facts["ops"] = []
    for row in host.served_ops():
        change = "hyper_connections" if row.op == "hc_prenorm_gemm" else "attention.select"
        needed = on_path and change not in left_out and "worker" not in left_out
        in_force = needed and (ours or change == "hyper_connections")
        report.facts["ops"].append({**row._asdict(), "in_force": in_force})
        if row.provider is None and in_force:
            report.find(BROKEN, row.why)


def _examine_model(report: Report, request: "Request") -> None:
    from vllm_sm12x import device, preflight
    from vllm_sm12x.preflight.memory import host_memory

    report.facts["preflight"] = None
    found = device.first_visible_device()
    there = isinstance(found, device.Device)
    memory = (found.total_memory or host_memory()) if isinstance(found, device.Device) else None
    unified = isinstance(found, device.Device) and found.total_memory is None
    # vLLM makes no config without a GPU, and what is broken above would only break again.
    ask_vllm = there and report.facts["packages"].get("vllm") and report.status < BROKEN
    try:
        facts, findings = preflight.examine(request, memory, unified, bool(ask_vllm))
    except (preflight.CheckpointError, preflight.Refused) as refusal:
        report.find(BROKEN, str(refusal))
        return
    report.facts["preflight"] = facts
    for finding in findings:
        report.find(BROKEN, finding)
    if not ask_vllm:
        report.find(DEGRADED, "vLLM could not be asked about the model: sizes are by its headers.")
    elif facts["dry_build"] is not None:
        report.find(
            DEGRADED, f"vLLM could not build the model without weights: {facts['dry_build']}."
        )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _as_text(facts: dict[str, Any]) -> str:
    from vllm_sm12x.vllm_api.version import PINS, SUPPORTED

    def known(key: str) -> Any:
        return facts.get(key) or {}

    device, active, plugins = known("device"), known("active"), facts.get("VLLM_PLUGINS")
    gpu = device.get("none", "unknown")
    if "name" in device:
        memory = f"{device['memory_gib']} GiB" if device["memory_gib"] else "the host's memory"
        gpu = "{name}, SM {capability}, {}, driver {driver}".format(memory, **device)
    points = [group for group, names in known("entry_points").items() if "sm12x" in names]
    versions = [f"{name} {version or '-'}" for name, version in known("packages").items()]
    head: list[tuple[str, ...]] = [
        ("vllm-sm12x", f"{facts['vllm_sm12x']} for vLLM {SUPPORTED}, tested on {', '.join(PINS)}"),
        ("packages", "  ".join(versions)),
        ("device", gpu),
        ("active", f"{'yes' if active['yes'] else 'no'}: {active['because']}" if active else "?"),
        ("platform", facts.get("platform", "vLLM's own")),
        ("entry points", ", ".join(points) or "none"),
        ("VLLM_PLUGINS", "unset (all)" if plugins is None else ",".join(plugins)),
    ]
    changes: list[tuple[str, ...]] = [
        (row["name"], row["state"], row["detail"]) for row in known("changes")
    ]
    settings: list[tuple[str, ...]] = [
        (row["name"], row["value"] if row["set"] else f"{row['value']}  (default)")
        for row in known("settings")
    ]
    ops: list[tuple[str, ...]] = [
        (row["op"], _served_by(row), row["why"]) for row in known("ops") or ()
    ]
    if ops:
        ops.insert(0, ("op", "served by", "why"))
    every = (head, changes, ops, settings, *_model_rows(known("preflight")))
    tables = [_columns(rows) for rows in every if rows]
    if "serve" in known("preflight"):
        tables.append(facts["preflight"]["serve"])
    tables += [_recipe(row) for row in known("recipes")]
    closing = [facts["health"], *(f"- {sentence}" for sentence in facts["findings"])]
    return "\n\n".join([*tables, "\n".join(closing)])


def _model_rows(facts: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """The tables of `--model`: what each part would be, and what fits."""
    if not facts:
        return []

    def gib(size: float) -> str:
        return f"{size / 2**30:.2f} GiB"

    held = facts.get("built_bytes_by_stage") or facts["weights_bytes_by_stage"]
    sizes: list[tuple[str, ...]] = [
        ("model", f"{facts['model']}, {facts['architecture']}"),
        ("checkpoint", gib(facts["checkpoint_bytes"])),
        ("weights per GPU", ", ".join(map(gib, held))),
        ("KV cache", f"{facts['kv_cache_bytes_per_token']:,.1f} bytes a token, on each GPU"),
    ]
    if memory := facts.get("memory"):
        sizes.append(
            (
                "GPU memory",
                f"{gib(memory['gpu_bytes'])}{', shared with the host' * memory['unified']}, of "
                f"which vLLM takes {memory['gpu_memory_utilization']:.1%}; "
                f"{gib(memory['overhead_bytes'])} beyond weights and caches is an estimate; "
                f"{gib(memory['kv_cache_bytes'])} is left for KV caches",
            )
        )
        if "longest_context" in memory:
            sizes.append(("largest context", f"{memory['longest_context']:,} tokens"))
        if "concurrency" in memory:
            sizes.append(
                (
                    "concurrency",
                    f"{memory['concurrency']:.2f} requests of {memory['max_model_len']:,} tokens",
                )
            )
    parts: list[tuple[str, ...]] = [
        (row["part"], row["choice"], row["why"]) for row in facts["parts"]
    ]
    return [parts, sizes]


def _recipe(row: dict[str, str | None]) -> str:
    """What was run on a machine; the command unbroken, so that it can be copied."""
    about = _columns([(row["machine"] or "", f"{row['note']} {row['source']}")])
    return "\n".join([about, row["command"]]) if row["command"] else about


def _served_by(row: dict[str, Any]) -> str:
    provider = row["provider"] or "nobody"
    return provider if row["in_force"] else f"would be {provider}"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows with their columns aligned, the last one wrapped to the terminal."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    room = max(shutil.get_terminal_size().columns - indent, 40)
    lines = []
    for *cells, last in rows:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(last, room, break_long_words=False) or [""]
        lines += [start + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return "\n".join(lines)
