# SPDX-License-Identifier: Apache-2.0
"""Folders that look like a CUDA toolkit and like a DeepGEMM package, as far as anyone looks."""

from pathlib import Path

SM120_HEADERS = (
    "sm120_fp8_mqa_logits.cuh",
    "sm120_fp8_paged_mqa_logits.cuh",
    "sm120_fp8_fp4_gemm_1d1d.cuh",
    "sm120_tf32_hc_prenorm_gemm.cuh",
)


def cuda_toolkit(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc says that it is `release`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    answer = f"Cuda compilation tools, release {release}, V{release}.1"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{answer}'\n")
    nvcc.chmod(0o755)
    return folder


def deep_gemm_package(site: Path, headers: tuple[str, ...] = SM120_HEADERS) -> Path:
    """A package `deep_gemm` in `site`, which ends whoever imports it."""
    package = site / "deep_gemm"
    impls = package / "include" / "deep_gemm" / "impls"
    impls.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('deep_gemm was imported')\n")
    for header in headers:
        (impls / header).touch()
    return package
