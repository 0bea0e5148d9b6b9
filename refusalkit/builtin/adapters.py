"""Describe the architectures that refusalkit knows by itself."""

from __future__ import annotations

from refusalkit.adapter import Adapter, Family, Gain, Matrix, Write

_ATTENTION = Write("self_attn", (Matrix("self_attn.o_proj.weight"), Matrix("self_attn.o_proj.bias", -1)))
_MLP = Write("mlp", (Matrix("mlp.down_proj.weight"), Matrix("mlp.down_proj.bias", -1)))

_POST_NORM_ATTENTION = Write(
    "post_attention_layernorm", (Matrix("self_attn.o_proj.weight"),), Gain("post_attention_layernorm.weight", 1.0)
)
_POST_NORM_MLP = Write(
    "post_feedforward_layernorm", (Matrix("mlp.down_proj.weight"),), Gain("post_feedforward_layernorm.weight", 1.0)
)
_POST_NORM = (
    "a norm stands between the projections and the residual stream: the edit writes nothing along the direction, "
    "but removing it before the norm changes the scale of what is left"
)

LLAMA = Adapter("llama", ("LlamaForCausalLM",), _ATTENTION, _MLP, family=Family(("I",)))
YI = Adapter(
    "yi",
    ("LlamaForCausalLM",),
    _ATTENTION,
    _MLP,
    model_ids=("*/yi-*", "yi-*", "tiny:yi"),
    family=Family(("I",)),
)
QWEN2 = Adapter("qwen2", ("Qwen2ForCausalLM",), _ATTENTION, _MLP, family=Family(("I", "As")))
QWEN3 = Adapter(
    "qwen3", ("Qwen3ForCausalLM",), _ATTENTION, _MLP, family=Family(("I", "As"), thinking="enable_thinking")
)
GEMMA = Adapter("gemma", ("GemmaForCausalLM",), _ATTENTION, _MLP, family=Family(("I",)))
GEMMA2 = Adapter(
    "gemma2",
    ("Gemma2ForCausalLM",),
    _POST_NORM_ATTENTION,
    _POST_NORM_MLP,
    family=Family(("I",)),
    inexact=_POST_NORM,
)
GEMMA3 = Adapter(
    "gemma3",
    ("Gemma3ForCausalLM",),
    _POST_NORM_ATTENTION,
    _POST_NORM_MLP,
    family=Family(("I",)),
    inexact=_POST_NORM,
)

ADAPTERS = (LLAMA, YI, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3)
