# SPDX-License-Identifier: Apache-2.0
"""vLLM stays what it was: its files always, its symbols but for the ones that the table names."""

import pytest

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def applied(host):
    """vLLM's symbols before the plugin applies, after it, after it again, and after undoing."""
    return host(
        """
import vllm.entrypoints.cli.serve
import vllm.model_executor.layers.fused_moe.oracle.mxfp4
import vllm.models.deepseek_v4.nvidia.model
import vllm.v1.engine.core
import vllm.v1.worker.gpu_model_runner
import vllm.v1.worker.gpu_worker
from vllm import envs

from vllm_sm12x import changes, plugin
from vllm_sm12x.changes.change import Phase

def apply():
    plugin.register()
    changes.apply_all(Phase.WORKER)

def states():
    return {outcome.change.name: outcome.state.value for outcome in changes.report()}

def custom_is_taken():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    return AttentionBackendEnum.CUSTOM.is_overridden()

stock, stock_names = vllm_symbols(), set(envs.environment_variables)
stock_environment = dict(os.environ)
apply()
once, first_states = vllm_symbols(), states()
names, custom = set(envs.environment_variables), custom_is_taken()
apply()
twice, second_states = vllm_symbols(), states()
changes.undo_all()
undone = vllm_symbols()
answer({
    "symbols": len(stock),
    "changed": replaced(stock, once),
    "changed_by_a_second_apply": replaced(once, twice),
    "states": first_states,
    "states_after_a_second_apply": second_states,
    "left_after_undo": replaced(stock, undone),
    "settings_added": sorted(names - stock_names),
    "settings_left_after_undo": sorted(set(envs.environment_variables) - stock_names),
    "environment_left_after_undo": sorted(set(os.environ.items()) - set(stock_environment.items())),
    "custom_backend": [custom, custom_is_taken()],
    "table": [[row.name, row.kind.name, row.touches] for row in changes.CHANGES],
})
""",
        env={"VLLM_DEEP_GEMM_SM120_PAGED_MQA_TILED": "0", "CUDA_HOME": "/nowhere"},
    ).answer


def test_every_change_is_active(applied, settled):
    assert set(applied["states"]) == {name for name, _, _ in applied["table"]}
    assert applied["states"] == settled


def test_only_declared_symbols_change(applied):
    assert applied["symbols"] > 5000, "the snapshot must cover vLLM"
    wraps = [
        touches
        for name, kind, touches in applied["table"]
        if kind in ("WRAP", "REPLACE") and applied["states"][name] == "active"
    ]
    declared = {symbol for touches in wraps for symbol in touches}
    assert set(applied["changed"]) <= declared
    assert all(set(touches) & set(applied["changed"]) for touches in wraps)


def test_a_second_apply_changes_nothing(applied):
    assert applied["changed_by_a_second_apply"] == []
    assert applied["states_after_a_second_apply"] == applied["states"]


def test_undo_gives_everything_back(applied):
    assert applied["changed"], "nothing to undo"
    assert applied["left_after_undo"] == []
    assert applied["settings_added"]
    assert applied["settings_left_after_undo"] == []
    assert applied["environment_left_after_undo"] == []
    assert applied["custom_backend"] == [True, False]


def test_vllms_files_are_as_its_wheel_recorded_them(applied, vllm_files):
    """`applied` is asked for so that vLLM ran with the plugin before."""
    assert len(vllm_files.recorded) > 1000
    now = vllm_files.now()
    assert {path: now.get(path) for path in vllm_files.recorded} == vllm_files.recorded
    assert now == vllm_files.at_start
