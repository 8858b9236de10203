# SPDX-License-Identifier: Apache-2.0
"""Who serves each op that has more than one implementation on SM12x, and why.

`triton` is `vllm_sm12x.ops`, `deep_gemm` whatever DeepGEMM vLLM would import. VLLM_SM12X_PROVIDERS
chooses; nothing asked for by name is replaced. Standard library only at import.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_sm12x import device, knobs
from vllm_sm12x.integration import toolkit
from vllm_sm12x.vllm_api import deep_gemm

OPS = knobs.OPS
_CANDIDATES = {
    "auto": ("triton", "deep_gemm"),
    "triton": ("triton",),
    "deep_gemm": ("deep_gemm",),
}
# The kernel behind each op on arch 12, below include/deep_gemm/impls of a DeepGEMM package.
_SM120_HEADERS = {
    "mqa_logits": "sm120_fp8_mqa_logits.cuh",
    "paged_mqa_logits": "sm120_fp8_paged_mqa_logits.cuh",
    "fp8_einsum": "sm120_fp8_fp4_gemm_1d1d.cuh",
    "hc_prenorm_gemm": "sm120_tf32_hc_prenorm_gemm.cuh",
}
# Ours whose launch plan follows the number of tokens, unless it must not.
_PLANNED_BY_TOKENS = ("fp8_einsum", "hc_prenorm_gemm")
_GET_DEEP_GEMM = "install a DeepGEMM with SM120 kernels"


class Probe(NamedTuple):
    """Whether a provider can serve an op here, why or why not, and what would change a no."""

    yes: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Provider:
    """Who serves an op ("triton" or "deep_gemm"), and the reason in words."""

    name: str
    why: str


class NoProvider(ValueError):
    """No implementation that the settings allow can serve an op; says why, and what to do."""


def on_sm12x_path() -> bool:
    """Whether policy is SM12x's: the first visible GPU is one, or VLLM_SM12X_ASSUME says so."""
    capability = device.effective_capability(device.first_visible_device())
    return capability is not None and capability[0] == 12


def chosen(op: str) -> Provider:
    """The provider of an op on the SM12x path. Raises NoProvider, and KnobError."""
    asked = knobs.get("VLLM_SM12X_PROVIDERS")[op]
    refusals: dict[str, Probe] = {}
    for name in _CANDIDATES[asked]:
        probe = _PROBES[name](op)
        if probe.yes:
            by = "auto" if asked == "auto" else "VLLM_SM12X_PROVIDERS asks for it"
            return Provider(name, f"{by}: {probe.reason}")
        refusals[name] = probe
    raise NoProvider(_no_provider(op, asked, refusals))


def implementation(op: str) -> Callable[..., Any]:
    """The function that serves an op, with the signature of the op in `vllm_sm12x.ops`.

    DeepGEMM leaves the scores of keys that a row does not see unwritten where ours are -inf. With
    VLLM_BATCH_INVARIANT a token's bits do not depend on the number of tokens.
    Raises NoProvider, and KnobError.
    """
    if chosen(op).name == "triton":
        from vllm_sm12x import ops
        from vllm_sm12x.vllm_api.envs import batch_invariant

        function: Callable[..., Any] = getattr(ops, op)
        options = {}
        if op in _PLANNED_BY_TOKENS and batch_invariant():
            options["batch_invariant"] = True
        # An engine that is taken for SM12x runs what SM12x would run.
        if op == "fp8_einsum" and knobs.get("VLLM_SM12X_ASSUME") is not None:
            options["wgmma"] = False
        return functools.partial(function, **options) if options else function
    from vllm_sm12x.integration import deep_gemm_ops

    return getattr(deep_gemm_ops, op)


def probe_triton(op: str) -> Probe:
    """Whether Triton is there, which all our kernels need."""
    if importlib.util.find_spec("triton") is None:
        return Probe(False, "the package triton is not installed", "install triton")
    return Probe(True, "the Triton kernel of vllm-sm12x")


def probe_deep_gemm(op: str) -> Probe:
    """Whether the DeepGEMM that vLLM would import can serve `op` on SM12x.

    It compiles its kernels at run time from the headers that it brings, so those and nvcc decide,
    on another GPU under VLLM_SM12X_ASSUME too. Nothing of it is imported.
    """
    folder = deep_gemm.package_folder()
    if folder is None:
        return Probe(False, "no DeepGEMM is installed", _GET_DEEP_GEMM)
    header = folder / "include" / "deep_gemm" / "impls" / _SM120_HEADERS[op]
    if not header.is_file():
        reason = f"the DeepGEMM in {folder} has no SM120 kernel for it ({header.name})"
        return Probe(False, reason, _GET_DEEP_GEMM)
    from vllm_sm12x.vllm_api.envs import batch_invariant

    if op == "hc_prenorm_gemm" and batch_invariant():
        reason = "VLLM_BATCH_INVARIANT is set, and its sums are split by the number of tokens"
        return Probe(False, reason, "unset VLLM_BATCH_INVARIANT")
    compiler = toolkit.compiler_for_sm12x()
    if not compiler.yes:
        least = "{}.{}".format(*toolkit.SM12X_NVCC)
        remedy = f"install CUDA toolkit {least} or later and set CUDA_HOME to it"
        return Probe(False, f"DeepGEMM compiles at run time and {compiler.reason}", remedy)
    return Probe(True, f"{folder} has {header.name}, and {compiler.reason} compiles it")


def deep_gemm_reads(variable: str) -> bool:
    """Whether the DeepGEMM that vLLM would import knows an environment variable of that name."""
    folder = deep_gemm.package_folder()
    return folder is not None and any(
        variable.encode() in file.read_bytes() for file in _code(folder)
    )


def _code(folder: Path) -> list[Path]:
    return [*folder.glob("*.so"), *folder.glob("*.py")]


def _no_provider(op: str, asked: str, refusals: dict[str, Probe]) -> str:
    because = [f"{name} is refused because {probe.reason}" for name, probe in refusals.items()]
    remedies = [probe.remedy for probe in refusals.values()]
    for name in _PROBES.keys() - refusals.keys():
        because.append(f"{name} because VLLM_SM12X_PROVIDERS asks for {asked}")
        remedies.append(f"set {op}={name} in VLLM_SM12X_PROVIDERS")
    return f"The op {op} has no provider: {', and '.join(because)}; {', or '.join(remedies)}."


_PROBES: dict[str, Callable[[str], Probe]] = {
    "triton": probe_triton,
    "deep_gemm": probe_deep_gemm,
}
