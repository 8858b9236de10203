# SPDX-License-Identifier: Apache-2.0
"""The plugin in the processes that vLLM starts: the config travels there, and is served there."""

import pytest

pytestmark = pytest.mark.contract


OURS = "vllm_sm12x.integration"


@pytest.fixture(scope="module", params=["chosen by itself", "chosen by name"])
def journey(request, engine):
    """One config: as sent, as returned, and what the child made of it."""
    return engine[request.param]


@pytest.fixture(scope="module")
def engine(host):
    """The front end, and a child started as vLLM starts its engine core and workers.

    VLLM_PLUGINS=sm12x must suffice for both entry points, in both processes.
    """
    return host(
        """
cache = ["--kv-cache-dtype", "fp8", "--block-size", "256"]
sent = {
    "chosen by itself": served_config(MODEL, *cache),
    "chosen by name": served_config(MODEL, *cache, "--attention-backend", "TRITON_MLA_SPARSE"),
}
returned, child = in_spawned_child(worker_process, sent)
answer({
    name: {
        "sent": config_facts(sent[name]),
        "sent_hash": sent[name].compute_hash(),
        "returned": config_facts(returned[name]),
        "returned_hash": returned[name].compute_hash(),
        "child": child[name],
    }
    for name in sent
})
""",
        env={"VLLM_PLUGINS": "sm12x"},
    ).answer


def test_only_the_name_is_in_the_config(engine):
    """Without a flag the user's choice stays open, as vLLM left it."""
    assert engine["chosen by itself"]["sent"]["attention_backend"] is None
    assert engine["chosen by name"]["sent"]["attention_backend"] is not None


def test_a_spawned_child_resolves_the_same_platform(journey):
    assert journey["child"]["platform"] == f"{OURS}.platform.Sm12xPlatform"


def test_the_config_survives_the_way_to_the_child_and_back(journey):
    assert journey["child"]["config"] == journey["sent"]
    assert journey["returned"] == journey["sent"]
    assert journey["returned_hash"] == journey["sent_hash"]


def test_the_worker_and_the_attention_of_the_child_are_ours(journey):
    assert journey["child"]["worker"] == {
        "class": f"{OURS}.worker.Sm12xWorker",
        "attention": f"{OURS}.sparse_mla.TritonMlaSparseAttention",
    }
