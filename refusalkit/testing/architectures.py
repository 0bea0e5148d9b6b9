"""Hold a tiny shape of every architecture: settings of its configuration, no weights and no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]

COMMON: Settings = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_WINDOW: Settings = {"sliding_window": 16}
_ROPE: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_DELTA_NET: Settings = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_GEMMA4: Settings = {
    **_WINDOW,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED: Settings = {**_EXPERTS, "shared_expert_intermediate_size": 40}
#: Attention through a latent, and a dense block before the blocks with experts.
_DEEPSEEK: Settings = {
    **_ROPE,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_DEEPSEEK_V4: Settings = {
    **_WINDOW,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "hc_mult": 2,
}
_QWEN4_EXP: Settings = {
    **_SHARED,
    **_DELTA_NET,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_count": 2,
    "hc_lowrank": 8,
}
_GEMMA3N: Settings = {
    **_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}

#: What differs from the common shape, by model class. A setting `vision_config` makes the rest the settings of the text
#: part.
ARCHITECTURES: Mapping[str, Settings] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": _WINDOW,
    "MinistralForCausalLM": _WINDOW,
    "Ministral3ForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3_5ForCausalLM": _DELTA_NET,
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": _WINDOW,
    "Gemma3ForCausalLM": _WINDOW,
    "Gemma3ForConditionalGeneration": {**_WINDOW, "vision_config": _VISION},
    "Gemma3nForCausalLM": _GEMMA3N,
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": {**_GEMMA4, "vision_config": _VISION},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": _WINDOW,
    "Glm4ForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": _WINDOW,
    "GraniteForCausalLM": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "GPT2LMHeadModel": {"n_inner": 48},
    "GPTNeoXForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {**_SHARED, "mlp_only_layers": [0]},
    "Qwen3MoeForCausalLM": {**_EXPERTS, "mlp_only_layers": [0]},
    "Qwen3NextForCausalLM": {**_SHARED, **_DELTA_NET},
    "Qwen3_5MoeForCausalLM": {**_SHARED, **_DELTA_NET},
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": {**_DEEPSEEK, "num_mtp_layers": 0},
    "DeepseekV4ForCausalLM": _DEEPSEEK_V4,
    "Qwen4ExpForCausalLM": _QWEN4_EXP,
    "GptOssForCausalLM": {**_WINDOW, **_ROPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4ForCausalLM": {"intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 2},
}
