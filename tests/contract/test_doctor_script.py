# SPDX-License-Identifier: Apache-2.0
"""The installed `vllm-sm12x doctor` always reports: any GPU or none, torch broken, no vLLM.

Its exit status is 0 for healthy, 1 for degraded, 2 for broken.
"""

import json
import sys

import pytest

pytestmark = pytest.mark.contract

SM120 = {"FAKE_NVML_CAPABILITY": "12.0"}
H200 = {"FAKE_NVML_CAPABILITY": "9.0", "FAKE_NVML_NAME": "NVIDIA H200"}
NO_GPU = {"FAKE_NVML_COUNT": "0"}


def doctor(host, *options: str, **situation):
    script = host.plugin / "bin" / "vllm-sm12x"
    return host.command([sys.executable, script, "doctor", *options], check=False, **situation)


def doctor_json(host, **situation):
    run = doctor(host, "--json", **situation)
    return run.returncode, json.loads(run.stdout)


def test_text_on_sm120_with_one_change_off(host):
    run = doctor(host, gpu=SM120, env={"VLLM_SM12X_OFF": "attention.name", "COLUMNS": "200"})
    assert run.returncode == 0, run.output
    assert "RTX PRO 6000 Blackwell Workstation Edition, SM 12.0, 96.0 GiB" in run.stdout
    lines = {line.split()[0]: line for line in run.stdout.splitlines() if line.strip()}
    assert lines["attention.name"].split()[1] == "off"
    assert lines["attention.select"].split()[1] == "active"
    assert lines["VLLM_SM12X_OFF"].split()[1] == "attention.name"
    assert "healthy" in lines


def test_on_an_h200_the_plugin_stands_aside(host):
    status, report = doctor_json(host, gpu=H200)
    assert (status, report["health"], report["findings"]) == (0, "healthy", [])
    assert report["active"]["yes"] is False
    assert "NVIDIA H200 is SM 9.0" in report["active"]["because"]
    states = {row["state"] for row in report["changes"]}
    assert "not for this device" in states <= {"not for this device", "not for this vLLM"}


def test_without_a_gpu_it_is_degraded(host):
    status, report = doctor_json(host, gpu=NO_GPU)
    assert (status, report["health"]) == (1, "degraded")
    assert any("no GPU" in finding for finding in report["findings"])


def test_left_out_by_vllm_plugins_it_is_degraded(host):
    status, report = doctor_json(host, gpu=SM120, env={"VLLM_PLUGINS": "other"})
    assert any("VLLM_PLUGINS='other'" in finding for finding in report["findings"])
    assert "failed" not in {row["state"] for row in report["changes"]}
    assert (status, report["health"]) == (1, "degraded")


def test_with_a_broken_torch_it_still_reports(host, tmp_path):
    (tmp_path / "torch").mkdir()
    reason = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch" / "__init__.py").write_text(f"raise ImportError({reason!r})\n")
    status, report = doctor_json(host, gpu=SM120, first_on_path=[tmp_path], fresh=True)
    assert (status, report["health"]) == (2, "broken")
    assert any("torch" in finding and reason in finding for finding in report["findings"])
    assert report["device"]["capability"] == "12.0"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_without_vllm_it_still_reports(host, options):
    run = host.command(
        [host.python_without("vllm"), "-m", "vllm_sm12x", "doctor", *options],
        gpu=SM120,
        env={"PYTHONPATH": str(host.plugin)},
        check=False,
    )
    assert run.returncode == 1, run.output
    assert "no vLLM" in " ".join(run.stdout.split())
    assert "RTX PRO 6000" in run.stdout
    if options:
        assert json.loads(run.stdout)["packages"]["vllm"] is None
