# SPDX-License-Identifier: Apache-2.0
"""`vllm-sm12x doctor`: what it reports, and with which exit status."""

import importlib
import json
import sys
from importlib import metadata

import pytest

from vllm_sm12x import changes, device, doctor, knobs, log
from vllm_sm12x.device import Device, NoDevice

RTX = {"FAKE_NVML_CAPABILITY": "12.0", "FAKE_NVML_NAME": "RTX", "FAKE_NVML_COUNT": "1"}
DOCTOR = [sys.executable, "-m", "vllm_sm12x", "doctor"]
H200 = Device("NVIDIA H200", (9, 0), 141 * 2**30, "580.95")
OURS = {
    "vllm.platform_plugins": "vllm_sm12x.plugin:platform",
    "vllm.general_plugins": "vllm_sm12x.plugin:register",
}


@pytest.fixture
def machine(monkeypatch):
    """This process as a machine with an H200 and an installed plugin; a test breaks what it needs.

    Nothing of it is SM12x, so the doctor changes nothing in this process.
    """
    for name in [knob.name for knob in knobs.KNOBS] + ["VLLM_PLUGINS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "first_visible_device", lambda: H200)
    points = {group: metadata.EntryPoint("sm12x", value, group) for group, value in OURS.items()}
    everybodys = metadata.entry_points

    def entry_points(**selection):
        if selection.get("group") not in points:
            return everybodys(**selection)
        found = points[selection["group"]]
        return [found] if found else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    changes.undo_all()
    log.once.cache_clear()
    yield points
    changes.undo_all()


def no_package(monkeypatch, missing):
    version = metadata.version

    def fake(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", fake)


def test_another_gpu_is_healthy_and_untouched(machine, capsys):
    assert doctor.run_doctor(as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["health"] == "healthy" and facts["findings"] == []
    assert facts["active"] == {"yes": False, "because": "NVIDIA H200 is SM 9.0, not SM 12.x"}
    # What other releases alone have is not for this vLLM before it is not for this device.
    states = {change["state"] for change in facts["changes"]}
    assert "not for this device" in states <= {"not for this device", "not for this vLLM"}
    assert [change["name"] for change in facts["changes"]] == [
        change.name for change in changes.CHANGES
    ]
    assert facts["device"]["name"] == "NVIDIA H200"
    assert facts["packages"]["vllm"] == metadata.version("vllm")


def ops_of(facts):
    return {row["op"]: (row["provider"], row["in_force"]) for row in facts["ops"]}


def test_ops_that_would_be_served_without_a_gpu_torch_or_vllm(machine, monkeypatch, capsys):
    monkeypatch.setattr(device, "first_visible_device", lambda: NoDevice("no driver"))
    real = importlib.import_module
    broken = ("torch", "vllm", "triton")

    def import_module(name):
        if name in broken:
            raise OSError(f"{name} is broken")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    monkeypatch.setenv("VLLM_SM12X_PROVIDERS", "fp8_einsum=deep_gemm")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert doctor.run_doctor(as_json=True) == 2
    facts = json.loads(capsys.readouterr().out)
    assert ops_of(facts) == {
        "mqa_logits": ("triton", False),
        "paged_mqa_logits": ("triton", False),
        "fp8_einsum": (None, False),
        "hc_prenorm_gemm": ("triton", False),
    }
    assert not any("fp8_einsum" in finding for finding in facts["findings"])
    assert doctor.run_doctor() == 2
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["op"])
    assert lines[start].split() == ["op", "served", "by", "why"]
    assert lines[start + 1].split()[:4] == ["mqa_logits", "would", "be", "triton"]
    assert any(line.startswith("fp8_einsum        would be nobody") for line in lines)


def test_text_shows_settings_and_what_they_are_by_default(machine, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "77")
    assert doctor.run_doctor() == 0
    lines = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert ("VLLM_TRITON_MLA_SPARSE_QUERY_CHUNK_SIZE", "77") in lines
    assert ("VLLM_TRITON_MLA_SPARSE_TOPK_CHUNK_SIZE", "512", "(default)") in lines
    assert ("healthy",) in lines


def test_no_gpu_is_degraded(machine, monkeypatch, capsys):
    monkeypatch.setattr(device, "first_visible_device", lambda: NoDevice("no driver"))
    assert doctor.run_doctor() == 1
    assert "There is no GPU to serve on: no driver." in capsys.readouterr().out


def test_no_vllm_is_degraded(machine, monkeypatch, capsys):
    no_package(monkeypatch, "vllm")
    assert doctor.run_doctor() == 1
    assert "no vLLM is installed, and vllm-sm12x needs >=0.23" in capsys.readouterr().out


def test_plugin_that_vllm_may_not_load_is_degraded(machine, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert doctor.run_doctor() == 1
    assert "VLLM_PLUGINS='other' leaves out sm12x." in capsys.readouterr().out


def test_missing_entry_point_is_degraded(machine, capsys):
    machine["vllm.platform_plugins"] = None
    assert doctor.run_doctor() == 1
    assert "entry point sm12x of vllm.platform_plugins is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, value, finding",
    [
        ("VLLM_TRITON_MLA_SPARSE", "maybe", "VLLM_TRITON_MLA_SPARSE='maybe' is not valid"),
        ("VLLM_SM12X_OFF", "workr", "no change is called 'workr'; did you mean worker"),
        ("VLLM_SM12X_OF", "worker", "VLLM_SM12X_OF is not a setting of vllm-sm12x; did you mean"),
    ],
)
def test_bad_setting_is_broken_and_said_once(machine, monkeypatch, capsys, name, value, finding):
    monkeypatch.setenv(name, value)
    assert doctor.run_doctor(as_json=True) == 2
    facts = json.loads(capsys.readouterr().out)
    assert [finding in sentence for sentence in facts["findings"]] == [True]


@pytest.mark.parametrize("package", ["torch", "vllm"])
def test_package_that_does_not_import_is_broken(machine, monkeypatch, capsys, package):
    def import_module(name):
        if name == package:
            raise OSError("libcudart.so.13: cannot open shared object file")
        return importlib.__import__(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    assert doctor.run_doctor() == 2
    out = capsys.readouterr().out
    assert f"{package} {metadata.version(package)} does not import: OSError: libcudart" in out


def test_a_probe_that_fails_leaves_the_others(machine, monkeypatch, capsys):
    def explode():
        raise ZeroDivisionError("a strange NVML")

    monkeypatch.setattr(device, "first_visible_device", explode)
    assert doctor.run_doctor() == 2
    out = capsys.readouterr().out
    assert "device: ZeroDivisionError: a strange NVML" in out
    assert "VLLM_TRITON_MLA_SPARSE_DUMP_PATH" in out


@pytest.mark.contract
@pytest.mark.parametrize("capability, name", [("12.0", "RTX"), ("12.1", "NVIDIA GB10")])
def test_every_change_is_active_on_sm12x(host, settled, capability, name):
    """In the doctor's own process, with real vLLM: both phases, each with its evidence.

    The machine has no nvcc, so that the row that needs its absence is active too.
    """
    gpu = {**RTX, "FAKE_NVML_CAPABILITY": capability, "FAKE_NVML_NAME": name}
    run = host.command([*DOCTOR, "--json"], gpu=gpu, env={"CUDA_HOME": "/nowhere"})
    facts = json.loads(run.stdout)
    assert facts["health"] == "healthy", facts["findings"]
    assert facts["device"]["capability"] == capability
    assert {row["name"]: row["state"] for row in facts["changes"]} == settled
    assert facts["platform"] == "vllm_sm12x.integration.platform.Sm12xPlatform"
    assert set(ops_of(facts).values()) == {("triton", True)}


@pytest.mark.contract
def test_an_op_that_nobody_serves_is_broken_on_sm120(host):
    env = {"CUDA_HOME": "/nowhere", "VLLM_SM12X_PROVIDERS": "hc_prenorm_gemm=deep_gemm"}
    run = host.command([*DOCTOR, "--json"], gpu=RTX, env=env, check=False)
    facts = json.loads(run.stdout)
    assert run.returncode == 2
    assert ops_of(facts)["hc_prenorm_gemm"] == (None, True)
    (finding,) = facts["findings"]
    assert finding.startswith("The op hc_prenorm_gemm has no provider: ")
