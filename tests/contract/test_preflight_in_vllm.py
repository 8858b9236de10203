# SPDX-License-Identifier: Apache-2.0
"""`doctor --model` on the fake host: its sizes against the format's, and vLLM's own planning.

All in one process of real vLLM, with a tiny checkpoint of headers and holes instead of weights.
"""

import json
from pathlib import Path

import pytest

from vllm_sm12x.tiny_checkpoint.deepseek_v4 import CONFIG, tensors

pytestmark = pytest.mark.contract

EXAMINE = """
import logging

import torch
from vllm.platforms import current_platform
from vllm_sm12x import doctor, preflight
from vllm_sm12x.preflight import kv_cache, weights
from vllm_sm12x.preflight.checkpoint import read

def state():
    return [str(current_platform.device_type), qualified_name(torch.cuda.Stream),
            qualified_name(torch.cuda.Event), torch.distributed.is_initialized()]


def examined(model=MODEL, **flags):
    request = preflight.Request(model, **{"max_model_len": 65536, **flags})
    report = doctor.examine(request)
    return {"status": report.status, "findings": report.findings, **report.facts}


before = state()
reports = {
    "one": examined(),
    "two machines": examined(tensor_parallel_size=2),
    "pipeline": examined(pipeline_parallel_size=2),
    "too small": examined(gpu_memory_utilization=0.05),
    "refused": examined(NONSENSE),
}

# vLLM's own words on the same memory, as its engine would log them.
from vllm_sm12x.vllm_api import dry_build, kv_cache as planning

flags = ["--kv-cache-dtype", "fp8", "--block-size", "256", "--max-model-len", "65536"]
config = served_config(MODEL, *flags)
(stage,) = dry_build.build(config, 1, 1)
lines = []


class Listen(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())


logging.getLogger("vllm").addHandler(Listen())
logging.getLogger("vllm").setLevel(logging.INFO)
memory = reports["one"]["preflight"]["memory"]["kv_cache_bytes"]
planning.Pool(config, [stage.specs], [stage.layouts], [memory])  # which settles the layout
(plan,) = planning._plan(config, [stage.specs], [memory])
pages = {cache.name: cache.page for cache in kv_cache.caches(read(MODEL).config)}
answer({
    "reports": reports,
    "before": before,
    "after": state(),
    "pages": pages,
    "lines": lines,
    "blocks": plan.num_blocks,
    "concurrency": planning.get_max_concurrency_for_kv_cache_config(config, plan),
})
"""


def write_headers(folder: Path, **changed) -> str:
    """The tiny checkpoint with a hole in place of each tensor's bytes."""
    folder.mkdir()
    header, end = {}, 0
    for tensor in tensors():
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets
        }  # fmt: skip
        end = offsets[1]
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    return str(folder)


@pytest.fixture(scope="module")
def found(host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    model = write_headers(folder / "tiny")
    nonsense = write_headers(folder / "odd", quantization_config={"quant_method": "nonsense"})
    head = f"MODEL, NONSENSE = {model!r}, {nonsense!r}\n"
    return host(head + EXAMINE, env={"CUDA_HOME": "/nowhere"}).answer


def test_the_doctor_is_healthy_and_leaves_vllm_as_it_was(found):
    for name in ("one", "two machines", "pipeline"):
        report = found["reports"][name]
        assert report["findings"] == [] and report["status"] == 0, name
        assert report["preflight"]["dry_build"] is None
    assert found["before"] == found["after"]


@pytest.mark.parametrize("name", ["one", "two machines", "pipeline"])
def test_weights_by_headers_are_those_that_vllm_builds(found, name):
    facts = found["reports"][name]["preflight"]
    by_headers, built = facts["weights_bytes_by_stage"], facts["built_bytes_by_stage"]
    assert len(by_headers) == len(built) == (2 if name == "pipeline" else 1)
    assert built == pytest.approx(by_headers, rel=1e-3)


def test_pages_by_the_format_are_those_of_vllms_specs(found):
    for name in ("one", "two machines", "pipeline"):
        facts = found["reports"][name]["preflight"]
        pages = {key: page for stage in facts["page_bytes"] for key, page in stage.items()}
        assert {key.removeprefix("model.layers."): page for key, page in pages.items()} == (
            found["pages"]
        )


def test_blocks_and_concurrency_are_what_vllm_plans(found, vllm_version):
    memory = found["reports"]["one"]["preflight"]["memory"]
    assert memory["blocks"] == found["blocks"] > 1000
    assert memory["concurrency"] == pytest.approx(found["concurrency"], abs=0.005)
    assert memory["max_model_len"] == 65536 <= memory["longest_context"]
    if vllm_version < (0, 28):  # later ones say it where the engine starts
        said = [line for line in found["lines"] if "Maximum concurrency" in line]
        assert f"65,536 tokens per request: {memory['concurrency']:.2f}x" in said[-1]


def test_parts_are_what_serving_would_take(found):
    parts = {row["part"]: row["choice"] for row in found["reports"]["one"]["preflight"]["parts"]}
    assert parts["attention backend"] == "TRITON_MLA_SPARSE"
    assert "TritonMlaSparseAttention" in parts["caches"]
    # Without nvcc and DeepGEMM, vLLM has one FP8 kernel for these scales.
    assert parts["linear layers"] == "CutlassFp8BlockScaledMMKernel"
    assert "Marlin" in parts["experts"]
    assert parts["KV cache"] == "fp8, blocks of 256"
    assert parts["loader"] == "auto, safetensors lazy", "it fits into memory"


def test_more_ranks_than_gpus_are_more_machines(found):
    facts = found["reports"]["two machines"]["preflight"]
    assert facts["machines"] == 2 and "--nnodes 2 --node-rank RANK" in facts["serve"]
    assert "--nnodes" not in found["reports"]["one"]["preflight"]["serve"]


def test_what_cannot_be_served_is_broken_in_one_sentence(found):
    small, refused = found["reports"]["too small"], found["reports"]["refused"]
    assert small["status"] == refused["status"] == 2
    assert [sentence.split(":")[0] for sentence in small["findings"]] == ["The model does not fit"]
    (sentence,) = refused["findings"]
    assert sentence.startswith("vLLM refuses: ") and "nonsense" in sentence and "\n" not in sentence
