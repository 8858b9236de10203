# SPDX-License-Identifier: Apache-2.0
"""vLLM's own DeepSeek V4 layers on our hyper-connections, in a real vLLM on the made-up host."""

import pytest

pytestmark = pytest.mark.contract

MODEL_NAMES = {
    "hc_head_fused_kernel_tilelang",
    "mhc_fused_post_pre_tilelang",
    "mhc_post_tilelang",
    "mhc_pre_tilelang",
}
DRAFT_NAMES = {"hc_head_fused_kernel_tilelang", "mhc_post_tilelang"}

APPLY = """
import dataclasses
import inspect
from vllm_sm12x.changes import hyper_connections
from vllm_sm12x.changes.change import Applied, Context, Phase
from vllm.model_executor.kernels.mhc import tilelang
from vllm.models.deepseek_v4.nvidia import model, mtp

(row,) = hyper_connections.ROWS
row = dataclasses.replace(row, requires=())
detected = Context.detect()

def settled(**changes):
    applied = Applied([row])
    (outcome,) = applied.apply_all(Phase.WORKER, dataclasses.replace(detected, **changes))
    return applied, [outcome.state.value, outcome.detail]

def ours():
    wrapped = {}
    for name, module in sorted(sys.modules.items()):
        if name.startswith("vllm.") and module is not None:
            found = [key for key, value in vars(module).items()
                     if inspect.isfunction(value) and hasattr(value, "__sm12x__")]
            if found:
                wrapped[name.rpartition(".")[2]] = sorted(found)
    return wrapped
"""

SITUATION = (
    APPLY
    + """
def compiled_at_start():
    # How many TileLang kernels vLLM compiles for DeepSeek V4 and V4.1; None where it does not.
    try:
        from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
    except ImportError:
        return None
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.kernels.mhc import tilelang_kernels

    config, counts = deepseek_v4, []
    for architecture in ("DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM"):
        config.model_config.model_arch_config.architectures = [architecture]
        registry = JitWarmupRegistry(config)
        with set_current_vllm_config(config), registry.activate():
            for name, kernel in vars(tilelang_kernels).items():
                if name.endswith("_TILELANG_KERNEL"):
                    kernel.register_warmup(hidden_size=4096)
        counts.append(len(registry))
    return counts

deepseek_v4 = engine_config(MODEL)  # which loads the plugin, and registers its name
stock = vllm_symbols()
compiled = [compiled_at_start()]
applied, state = settled()
compiled.append(compiled_at_start())
replaced_names = ours()
_, again = settled(capability=(9, 0), switch=True)
applied.undo_all()
left = replaced(stock, vllm_symbols())
compiled.append(compiled_at_start())
answer({"state": state, "ours": replaced_names, "not 12.x": again, "left": left,
        "ours after undo": ours(), "declared": row.touches, "compiled": compiled})
"""
)

DRIFT = (
    APPLY
    + """
def after(change, restore):
    change()
    applied, state = settled()
    result = [state, ours()]
    restore()
    return result

stock_post = model.mhc_post_tilelang
stock_forward = model.DeepseekV4DecoderLayer.forward

def rename():
    del model.mhc_post_tilelang

def another_signature():
    tilelang.mhc_post_tilelang = lambda x, residual: x
    tilelang.mhc_post_tilelang.__module__ = tilelang.__name__

def another_function():
    def mhc_other_tilelang(x):
        return x
    mhc_other_tilelang.__module__ = tilelang.__name__
    tilelang.mhc_other_tilelang = model.mhc_other_tilelang = mhc_other_tilelang

def forward_moved():
    elsewhere = {"mhc_pre_tilelang": tilelang.mhc_pre_tilelang}
    exec("def forward(self, x): return mhc_pre_tilelang(x)", elsewhere)
    model.DeepseekV4DecoderLayer.forward = elsewhere["forward"]

def restore():
    model.mhc_post_tilelang = tilelang.mhc_post_tilelang = stock_post
    for module in (model, tilelang):
        vars(module).pop("mhc_other_tilelang", None)
    model.DeepseekV4DecoderLayer.forward = stock_forward

answer({change.__name__: after(change, restore)
        for change in (rename, another_signature, another_function, forward_moved)})
"""
)

# The layer's own forward, with stand-ins for attention and experts, on CPU tensors.
FORWARD = (
    APPLY
    + """
import torch
from types import SimpleNamespace
from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch
from vllm_sm12x.integration import hyper_connections

TOKENS, STREAMS, WIDTH = 5, 4, 128
gen = torch.Generator().manual_seed(0)

def normal(*size):
    return torch.randn(size, generator=gen)

layer = model.DeepseekV4DecoderLayer.__new__(model.DeepseekV4DecoderLayer)
torch.nn.Module.__init__(layer)
layer.use_sequence_parallel = False
layer.hidden_size, layer.hc_mult, layer.hc_sinkhorn_iters = WIDTH, STREAMS, 20
layer.rms_norm_eps, layer.hc_eps, layer.hc_post_alpha = 1e-6, 1e-6, 2.0
layer.attn = lambda positions, x, _: (x * 0.5 + positions[:, None]).bfloat16()
layer.ffn = lambda x, *others: (x.float().tanh() * 3).bfloat16()
for part in ("attn", "ffn"):
    cells = STREAMS * (2 + STREAMS)
    fn = normal(cells, STREAMS * WIDTH) * 2 / (STREAMS * WIDTH) ** 0.5
    setattr(layer, f"hc_{part}_fn", torch.nn.Parameter(fn, requires_grad=False))
    setattr(layer, f"hc_{part}_scale", torch.nn.Parameter(normal(3), requires_grad=False))
    setattr(layer, f"hc_{part}_base", torch.nn.Parameter(normal(cells), requires_grad=False))
    norm = SimpleNamespace(weight=torch.nn.Parameter(1 + normal(WIDTH).bfloat16() / 4),
                           variance_epsilon=1e-5)
    setattr(layer, f"{part}_norm", norm)
layer.hc_attn_fn_broadcast = layer.hc_attn_fn.view(-1, STREAMS, WIDTH).sum(1)

embedding = normal(TOKENS, WIDTH).bfloat16()
streams = embedding[:, None].repeat(1, STREAMS, 1)
head = (normal(STREAMS, STREAMS * WIDTH) / 10, normal(1), normal(STREAMS), 1e-6, 1e-6)
# From 0.26.0 on the first layer takes the embedding itself.
firsts = {"streams": streams}
if hasattr(model, "mhc_pre_broadcast_tilelang"):
    firsts["embedding"] = embedding

def run(first):
    positions = torch.arange(TOKENS)
    x, residual, post, comb = layer(first, positions, None)
    x, residual, post, comb = layer(x, positions, None, post, comb, residual)
    after = model.mhc_post_tilelang(x, residual, post, comb)
    logits = mtp.hc_head_fused_kernel_tilelang(after, *head)
    return {"x": x, "residual": residual, "post": post, "comb": comb, "after": after,
            "logits": logits}

# vLLM's plain torch in the same places.
def pre(residual, fn, *settings, n_splits=1, tile_n=1, norm_weight=None, norm_eps=1e-6):
    post, comb, x = mhc_pre_torch(residual, fn, *settings)
    x = torch.nn.functional.rms_norm(x.float(), (WIDTH,), norm_weight.float(), norm_eps)
    return post, comb, x.bfloat16()

def pre_broadcast(residual, *settings, fn_broadcast, **norm):
    residual = residual[:, None].repeat(1, STREAMS, 1)
    return residual, *pre(residual, *settings, **norm)

def fused(x, residual, post, comb, *settings, **norm):
    residual = mhc_post_torch(x, residual, post, comb)
    return residual, *pre(residual, *settings, **norm)

def hc_head(hs, fn, scale, base, rms_eps, hc_eps):
    cells = STREAMS * (2 + STREAMS)
    fn = torch.cat([fn, fn.new_zeros(cells - STREAMS, fn.shape[1])])
    scale = torch.cat([scale, scale.new_zeros(2)])
    base = torch.cat([base, base.new_zeros(cells - STREAMS)])
    return mhc_pre_torch(hs, fn, scale, base, rms_eps, hc_eps, 1e-6, 1.0, 1)[2]

with torch.no_grad():
    applied, state = settled()
    fused_op, fused_calls = hyper_connections.hc_post_prenorm_gemm, []
    def counted(*inputs):
        fused_calls.append(len(inputs[0]))
        return fused_op(*inputs)
    hyper_connections.hc_post_prenorm_gemm = counted
    got = {"one kernel": {kind: run(first) for kind, first in firsts.items()}}
    # As for more tokens than that.
    hyper_connections.most_tokens_of_one_kernel = lambda: TOKENS - 1
    got["two kernels"] = {kind: run(first) for kind, first in firsts.items()}
    applied.undo_all()
    model.mhc_pre_tilelang, model.mhc_pre_broadcast_tilelang = pre, pre_broadcast
    model.mhc_fused_post_pre_tilelang, model.mhc_post_tilelang = fused, mhc_post_torch
    mtp.hc_head_fused_kernel_tilelang = hc_head
    want = {kind: run(first) for kind, first in firsts.items()}

def compare(a, b):
    same = a.shape == b.shape and a.dtype == b.dtype
    return [same, ((a.float() - b.float()).norm() / b.float().norm()).item()]

answer({"state": state, "firsts": sorted(firsts), "fused": fused_calls,
        "compared": {f"{way}, {kind}: {name}": compare(got[way][kind][name], want[kind][name])
                     for way in got for kind in firsts for name in want[kind]}})
"""
)


@pytest.fixture(scope="module")
def situation(host):
    return host(SITUATION).answer


@pytest.fixture(scope="module")
def drift(host):
    return host(DRIFT).answer


@pytest.fixture(scope="module")
def forward(host):
    return host(FORWARD, env={"TRITON_INTERPRET": "1"}, fresh=True).answer


def test_every_name_in_the_model_and_its_drafts_is_ours(situation, vllm_version):
    state, detail = situation["state"]
    assert state == "active", detail
    later = vllm_version >= (0, 26)
    model = MODEL_NAMES | ({"mhc_pre_broadcast_tilelang"} if later else set())
    drafts = ["mtp", "dspark"] if vllm_version >= (0, 25) else ["mtp"]
    want = {"model": sorted(model), **{draft: sorted(DRAFT_NAMES) for draft in drafts}}
    assert situation["ours"] == want
    declared = {tuple(symbol.split(".")[-2:]) for symbol in situation["declared"]}
    at_start = {("VllmTileLangJitKernel", "register_warmup")} if vllm_version >= (0, 30) else set()
    assert declared - at_start == {
        (module, name) for module, names in want.items() for name in names
    }
    assert at_start <= declared


def test_tilelang_is_not_compiled_at_start(situation, vllm_version):
    """0.30 is the first release that does: without nvcc the engine then ends before it is ready.

    V4.1 calls the kernels, and keeps them.
    """
    stock, ours, undone = situation["compiled"]
    assert stock == undone
    if vllm_version >= (0, 30):
        assert stock[0] == stock[1] == 5
        assert ours == [0, 5]
    else:
        assert not any(stock or ours or ())


def test_undo_gives_everything_back(situation):
    assert situation["left"] == []
    assert situation["ours after undo"] == {}


def test_a_gpu_that_is_no_sm12x_keeps_tilelang(situation):
    state, reason = situation["not 12.x"]
    assert state == "off" and "only on SM 12.x" in reason


@pytest.mark.parametrize(
    "change, state, message",
    [
        ("rename", "drifted", "has no vllm.models.deepseek_v4.nvidia.model.mhc_post_tilelang"),
        ("another_signature", "failed", "mhc_post_tilelang takes ['x', 'residual'], and its"),
        ("another_function", "failed", "mhc_other_tilelang, which has no counterpart here"),
        ("forward_moved", "failed", "DeepseekV4DecoderLayer.forward: mhc_pre_tilelang"),
    ],
)
def test_a_vllm_that_moved_is_seen(drift, change, state, message):
    (found, detail), ours = drift[change]
    assert found == state and message in detail
    assert ours == {}, "what had been replaced is put back"


def test_layers_compute_what_vllm_computes_in_torch(forward, vllm_version):
    assert forward["state"][0] == "active", forward["state"]
    assert forward["firsts"] == ["embedding", "streams"][vllm_version < (0, 26) :]
    # Of the two sub-layers of each of two layers all but the first follow another.
    assert forward["fused"] == [5] * 3 * len(forward["firsts"])
    for name, (same_kind, error) in forward["compared"].items():
        print(f"{name}: relative error {error:.1e}")
        assert same_kind, f"{name}: another shape or dtype"
        # Two layers of bf16 roundings; the interpreter truncates, some 2^-8 at each of them.
        assert error <= 2**-6, f"{name}: relative error {error:.1e}"
