# SPDX-License-Identifier: Apache-2.0
"""Branches of vllm_api/ for older releases: each is needed by the oldest pin, or has to go."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from packaging.version import Version

from vllm_sm12x.vllm_api.version import PINS

pytestmark = pytest.mark.contract

VLLM_API = Path(__file__).parents[2] / "vllm_sm12x" / "vllm_api"
UNTIL = re.compile(r"until: vllm>=([\d.]+\d)")


def conditions():
    """(module, release) of each removal condition that the code carries."""
    return [
        (path.stem, release)
        for path in sorted(VLLM_API.glob("*.py"))
        for release in UNTIL.findall(path.read_text())
    ]


def builder_gives_prefill_slots():
    from vllm_sm12x.vllm_api import sparse_mla

    return sparse_mla.BUILDER_GIVES_PREFILL_SLOTS


def layers_break_graphs_switched_on_later():
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    return eager_break_during_capture(layers_break_graphs_switched_on_later) is not (
        layers_break_graphs_switched_on_later
    )


def fp4_keys_have_no_flag_of_their_own():
    from vllm.config.attention import AttentionConfig

    fields = {field.name for field in dataclasses.fields(AttentionConfig)}
    return "use_fp4_indexer_cache" not in fields


def nvfp4_kernels_have_no_variable_of_their_own():
    from vllm.envs import environment_variables

    return "VLLM_NVFP4_GEMM_BACKEND" not in environment_variables


def mxfp4_experts_have_no_variable_of_their_own():
    from vllm.envs import environment_variables

    return "VLLM_MXFP4_USE_MARLIN" not in environment_variables


def prefill_logits_are_compressed():
    from vllm_sm12x.vllm_api import deep_gemm

    return deep_gemm.gives_compressed_logits()


def paged_logits_are_never_cleaned():
    from vllm.utils.deep_gemm import fp8_fp4_paged_mqa_logits

    return "clean_logits" not in inspect.signature(fp8_fp4_paged_mqa_logits).parameters


def dspark_has_a_drafter():
    return importlib.util.find_spec("vllm.models.deepseek_v4.nvidia.dspark") is not None


def first_layer_expands_the_embedding():
    from vllm.model_executor.kernels.mhc import tilelang

    return hasattr(tilelang, "mhc_pre_broadcast_tilelang")


def layers_register_tilelang_kernels():
    helper = "vllm.model_executor.warmup.jit_warmup_tilelang_helper"
    return importlib.util.find_spec(helper) is not None


def there_is_no_sequence_parallelism_pass():
    from vllm.config.compilation import PassConfig

    return "enable_sp" not in {field.name for field in dataclasses.fields(PassConfig)}


def layers_can_do_without_warm_up():
    from vllm.config.kernel import KernelConfig

    return "enable_jit_warmup" in {field.name for field in dataclasses.fields(KernelConfig)}


def caches_have_a_layout_to_resolve():
    from vllm.v1.attention.backends import utils

    return hasattr(utils, "resolve_kv_cache_layout")


def backends_declare_layouts():
    from vllm.v1.attention.backends import utils

    return hasattr(utils, "get_supported_kv_cache_layouts")


def caches_are_planned_apart():
    from vllm_sm12x.vllm_api import kv_cache

    return kv_cache.PLANS_APART


def prefill_metadata_takes_any_numbers():
    from vllm.v1.attention.backends.mla import sparse_swa

    return not hasattr(sparse_swa, "_compute_prefill_metadata_kernel")


# What a release has that makes the branch superfluous, by module and release of its comment.
PROBES = {
    ("compilation", "0.32"): [there_is_no_sequence_parallelism_pass],
    ("config", "0.30"): [fp4_keys_have_no_flag_of_their_own],
    ("deep_gemm", "0.33"): [prefill_logits_are_compressed, paged_logits_are_never_cleaned],
    ("dry_build", "0.27"): [layers_can_do_without_warm_up],
    ("dry_build", "0.29"): [backends_declare_layouts],
    ("envs", "0.24"): [
        nvfp4_kernels_have_no_variable_of_their_own,
        mxfp4_experts_have_no_variable_of_their_own,
    ],
    ("hyper_connections", "0.25"): [dspark_has_a_drafter],
    ("hyper_connections", "0.26"): [first_layer_expands_the_embedding],
    ("hyper_connections", "0.30"): [layers_register_tilelang_kernels],
    ("kv_cache", "0.29"): [caches_have_a_layout_to_resolve],
    ("kv_cache", "0.33"): [caches_are_planned_apart],
    ("sparse_mla", "0.24"): [builder_gives_prefill_slots],
    ("sparse_mla", "0.33"): [layers_break_graphs_switched_on_later],
    ("warm_up", "0.32"): [prefill_metadata_takes_any_numbers],
}


def test_every_branch_says_until_when_and_has_a_probe():
    assert set(conditions()) == set(PROBES)


@pytest.mark.parametrize("module, release", conditions())
def test_the_oldest_pin_still_needs_the_branch(module, release):
    """Fails when the floor is raised: then delete the branch, its comment and its probe."""
    assert Version(PINS[0]) < Version(release), f"delete the branch of vllm_api/{module}.py"


@pytest.mark.parametrize(
    "release, probe",
    [(release, probe) for (_, release), probes in PROBES.items() for probe in probes],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_release_is_the_one_that_the_comment_names(release, probe, vllm_version):
    """On the oldest pin each probe is False: a branch whose probe is True there has to go."""
    assert probe() is (vllm_version >= Version(release).release)
