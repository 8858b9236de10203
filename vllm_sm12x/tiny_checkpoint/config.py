# SPDX-License-Identifier: Apache-2.0
"""The config.json of the tiny DeepSeek V4.

Every field of DeepSeek-V4-Flash's released config.json is here under its released name. Only what
makes the model small differs: 6 of 43 layers, 16 of 256 routed experts, their width 512 instead of
2048, and a vocabulary of 8,192. All attention widths, the rope fields and the limits are the
released ones, so kernels see the real shapes.
"""

from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 6,
    # As released. Layers 0-2 hash (both SWA-only layers and one ratio-4 layer), 3-5 and MTP do not.
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 8192,
    "compress_rope_theta": 160000,
    # One entry per layer, then one for the MTP layer, as in the release.
    "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
}

GENERATION_CONFIG: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": CONFIG["bos_token_id"],
    "eos_token_id": CONFIG["eos_token_id"],
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": CONFIG["transformers_version"],
}
