"""Hold a tiny shape of every architecture: configuration classes and settings, no weights and no network."""

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

#: Configuration class and what differs from the common shape, by model class. A setting `vision_config` makes the
#: rest the settings of the text part.
ARCHITECTURES: Mapping[str, tuple[str, Settings]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", _WINDOW),
    "MinistralForCausalLM": ("MinistralConfig", _WINDOW),
    "Ministral3ForCausalLM": ("Ministral3Config", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", {**_DELTA_NET}),
    "GemmaForCausalLM": ("GemmaConfig", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", _WINDOW),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _WINDOW),
    "Gemma3ForConditionalGeneration": ("Gemma3Config", {**_WINDOW, "vision_config": _VISION}),
    "Gemma4ForCausalLM": ("Gemma4TextConfig", _GEMMA4),
    "Gemma4ForConditionalGeneration": ("Gemma4Config", {**_GEMMA4, "vision_config": _VISION}),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "Olmo3ForCausalLM": ("Olmo3Config", _WINDOW),
    "Glm4ForCausalLM": ("Glm4Config", {}),
    "PhiForCausalLM": ("PhiConfig", {}),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "CohereForCausalLM": ("CohereConfig", {}),
    "Cohere2ForCausalLM": ("Cohere2Config", _WINDOW),
    "GraniteForCausalLM": ("GraniteConfig", {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_inner": 48}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**_SHARED, "mlp_only_layers": [0]}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**_EXPERTS, "mlp_only_layers": [0]}),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", {**_SHARED, **_DELTA_NET}),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeTextConfig", {**_SHARED, **_DELTA_NET}),
    "DeepseekV2ForCausalLM": ("DeepseekV2Config", _DEEPSEEK),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**_DEEPSEEK, "num_mtp_layers": 0}),
    "GptOssForCausalLM": ("GptOssConfig", {**_WINDOW, **_ROPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {"intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 2},
    ),
}
