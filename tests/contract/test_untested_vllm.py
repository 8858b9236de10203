# SPDX-License-Identifier: Apache-2.0
"""A vLLM that no test ran on: named, with what to do. Which one is installed does not matter."""

import json
import sys

import pytest
from test_bad_input import AS_IT_IS, VLLM, distribution, lines_with

from vllm_sm12x.vllm_api.version import PINS

pytestmark = pytest.mark.once

# The installed vLLM under another name: of a build after it, and of a release after all pins, where
# changes may find less than that release should have.
UNTESTED = {
    f"{VLLM.release[0]}.{VLLM.release[1]}.9.dev3+g1234abc": "is a development build",
    "9.9.0": f"is newer than {PINS[-1]}",
}


@pytest.mark.parametrize("version", UNTESTED)
def test_a_vllm_that_nobody_tested_is_named_with_what_to_do(host, tmp_path, version):
    other = distribution(tmp_path / "other", "vllm", version)
    run = host("answer(config_facts(engine_config(MODEL))['worker_cls'])", first_on_path=[other])
    assert run.answer.endswith("Sm12xWorker")
    sentence = f"vLLM {version} {UNTESTED[version]}"
    (warning,) = lines_with(sentence, run)
    assert "WARNING" in warning or AS_IT_IS
    for words in ("is on", "off where", "vllm-sm12x doctor", f"install vllm=={PINS[-1]}"):
        assert words in warning
    doctor = host.command(
        [sys.executable, "-m", "vllm_sm12x", "doctor", "--json"],
        gpu={"FAKE_NVML_CAPABILITY": "12.0", "FAKE_NVML_NAME": "a GPU", "FAKE_NVML_COUNT": "1"},
        first_on_path=[other],
        check=False,
    )
    findings = json.loads(doctor.stdout)["findings"]
    assert findings[0].startswith(sentence)
    if version != "9.9.0":
        assert doctor.returncode == 0 and len(findings) == 1
