"""Teach refusalkit architectures with experts.

transformers keeps the down projections of all experts of a block in one parameter. Its layout differs from family to
family and cannot be told from its shape, so every adapter here declares the axis along which the experts write.
"""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit import hookimpl
from refusalkit.adapter import Adapter, Family, Matrix, Write

#: [expert, d_model, d_mlp]
_EXPERTS = Matrix("mlp.experts.down_proj", 1)
_ATTENTION = Write("self_attn", (Matrix("self_attn.o_proj.weight"), Matrix("self_attn.o_proj.bias", -1)))
_LINEAR_ATTENTION = Write("linear_attn", (Matrix("linear_attn.out_proj.weight"),), heads="linear_num_value_heads")
_DENSE = Write("mlp", (Matrix("mlp.down_proj.weight"), Matrix("mlp.down_proj.bias", -1)))
_ROUTED = Write("mlp", (_EXPERTS,))
_ROUTED_AND_SHARED = Write("mlp", (_EXPERTS, Matrix("mlp.shared_expert.down_proj.weight")))
_QWEN = Family(("I", "As"))
_QWEN_THINKING = Family(("I", "As"), thinking="enable_thinking")

MIXTRAL = Adapter("mixtral", ("MixtralForCausalLM",), _ATTENTION, _ROUTED)
QWEN2_MOE = Adapter("qwen2_moe", ("Qwen2MoeForCausalLM",), _ATTENTION, (_ROUTED_AND_SHARED, _DENSE), family=_QWEN)
QWEN3_MOE = Adapter("qwen3_moe", ("Qwen3MoeForCausalLM",), _ATTENTION, (_ROUTED, _DENSE), family=_QWEN_THINKING)
QWEN3_NEXT = Adapter(
    "qwen3_next",
    ("Qwen3NextForCausalLM",),
    (_ATTENTION, _LINEAR_ATTENTION),
    (_ROUTED_AND_SHARED, _DENSE),
    family=_QWEN,
)
QWEN3_5_MOE = Adapter(
    "qwen3_5_moe",
    # transformers loads the text part of a multimodal checkpoint.
    ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    (_ATTENTION, _LINEAR_ATTENTION),
    _ROUTED_AND_SHARED,
    family=_QWEN_THINKING,
)
DEEPSEEK = Adapter(
    "deepseek",
    ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    _ATTENTION,
    (Write("mlp", (_EXPERTS, Matrix("mlp.shared_experts.down_proj.weight"))), _DENSE),
    family=Family(thinking="thinking"),
)
GPT_OSS = Adapter(
    "gpt_oss",
    ("GptOssForCausalLM",),
    _ATTENTION,
    # [expert, d_mlp, d_model] with d_mlp == d_model, and biases [expert, d_model].
    Write("mlp", (Matrix("mlp.experts.down_proj", -1), Matrix("mlp.experts.down_proj_bias", -1))),
    family=Family(answer_header="<|channel|>final<|message|>"),
)
LLAMA4 = Adapter(
    "llama4",
    # transformers loads the text part of a multimodal checkpoint.
    ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    _ATTENTION,
    (
        Write(
            "feed_forward",
            # [expert, d_mlp, d_model]
            (Matrix("feed_forward.experts.down_proj", -1), Matrix("feed_forward.shared_expert.down_proj.weight")),
        ),
        Write("feed_forward", (Matrix("feed_forward.down_proj.weight"),)),
    ),
)

ADAPTERS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, QWEN3_5_MOE, DEEPSEEK, GPT_OSS, LLAMA4)


@hookimpl
def refusalkit_adapters() -> Sequence[Adapter]:
    return ADAPTERS
