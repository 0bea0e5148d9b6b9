"""Describe the architectures that refusalkit knows by itself."""

from __future__ import annotations

from dataclasses import replace

from refusalkit.adapter import Adapter, Family, Gain, Matrix, Refusal, Write


def _linear(output: str, projection: str, axis: int = 0) -> Write:
    """Describe what a projection writes through the module `output`, with the bias it may have."""
    return Write(output, (Matrix(f"{projection}.weight", axis), Matrix(f"{projection}.bias", -1)))


def _normed(norm: str, projection: str, offset: float = 0.0) -> Write:
    """Describe what a projection writes through a norm behind it."""
    return Write(norm, (Matrix(f"{projection}.weight"),), Gain(f"{norm}.weight", offset))


_ATTENTION = _linear("self_attn", "self_attn.o_proj")
_MLP = _linear("mlp", "mlp.down_proj")

#: Gemma stores the gains of its norms minus one.
_GEMMA_ATTENTION = _normed("post_attention_layernorm", "self_attn.o_proj", 1.0)
_GEMMA_MLP = _normed("post_feedforward_layernorm", "mlp.down_proj", 1.0)
_OLMO_ATTENTION = _normed("post_attention_layernorm", "self_attn.o_proj")
_OLMO_MLP = _normed("post_feedforward_layernorm", "mlp.down_proj")
_POST_NORM = (
    "a norm stands between the projections and the residual stream: the edit writes nothing along the direction, "
    "but removing it before the norm changes the scale of what is left"
)

LLAMA = Adapter("llama", ("LlamaForCausalLM",), _ATTENTION, _MLP)
YI = Adapter("yi", ("LlamaForCausalLM",), _ATTENTION, _MLP, model_ids=("*/yi-*", "yi-*", "tiny:yi"))
MISTRAL = Adapter("mistral", ("MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM"), _ATTENTION, _MLP)
QWEN2 = Adapter("qwen2", ("Qwen2ForCausalLM",), _ATTENTION, _MLP, family=Family(("I", "As")))
QWEN3 = Adapter(
    "qwen3", ("Qwen3ForCausalLM",), _ATTENTION, _MLP, family=Family(("I", "As"), thinking="enable_thinking")
)
QWEN3_5 = Adapter(
    "qwen3_5",
    # transformers loads the text part of a multimodal checkpoint.
    ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    (_ATTENTION, replace(_linear("linear_attn", "linear_attn.out_proj"), heads="linear_num_value_heads")),
    _MLP,
    family=Family(("I", "As"), thinking="enable_thinking"),
)
GEMMA = Adapter("gemma", ("GemmaForCausalLM",), _ATTENTION, _MLP)
GEMMA2 = Adapter("gemma2", ("Gemma2ForCausalLM",), _GEMMA_ATTENTION, _GEMMA_MLP, inexact=_POST_NORM)
GEMMA3 = Adapter("gemma3", ("Gemma3ForCausalLM",), _GEMMA_ATTENTION, _GEMMA_MLP, inexact=_POST_NORM)
GEMMA3_MULTIMODAL = replace(
    GEMMA3,
    name="gemma3_multimodal",
    architectures=("Gemma3ForConditionalGeneration",),
    embedding="model.language_model.embed_tokens",
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
)
GEMMA4 = Adapter(
    "gemma4",
    ("Gemma4ForCausalLM",),
    _OLMO_ATTENTION,
    (
        Write(
            "post_feedforward_layernorm",
            (
                Matrix("mlp.down_proj.weight", gain=Gain("post_feedforward_layernorm_1.weight")),
                Matrix("experts.down_proj", 1, gain=Gain("post_feedforward_layernorm_2.weight")),
            ),
            Gain("post_feedforward_layernorm.weight"),
        ),
        _OLMO_MLP,
    ),
    family=Family(thinking="enable_thinking"),
    block_multiplier="layer_scalar",
    inexact=_POST_NORM,
    refuses=Refusal(
        "inputs of its own for every layer write the residual stream a third time in every block, where no site is",
        setting="hidden_size_per_layer_input",
    ),
)
GEMMA4_MULTIMODAL = replace(
    GEMMA4,
    name="gemma4_multimodal",
    architectures=("Gemma4ForConditionalGeneration",),
    embedding="model.language_model.embed_tokens",
    blocks="model.language_model.layers",
    final_norm="model.language_model.norm",
)
OLMO2 = Adapter("olmo2", ("Olmo2ForCausalLM", "Olmo3ForCausalLM"), _OLMO_ATTENTION, _OLMO_MLP, inexact=_POST_NORM)
GLM4 = Adapter(
    "glm4",
    ("Glm4ForCausalLM",),
    _normed("post_self_attn_layernorm", "self_attn.o_proj"),
    _normed("post_mlp_layernorm", "mlp.down_proj"),
    inexact=_POST_NORM,
)
PHI = Adapter(
    "phi",
    ("PhiForCausalLM",),
    _linear("self_attn", "self_attn.dense"),
    _linear("mlp", "mlp.fc2"),
    final_norm="model.final_layernorm",
)
PHI3 = Adapter("phi3", ("Phi3ForCausalLM",), _ATTENTION, _MLP)
COHERE = Adapter("cohere", ("CohereForCausalLM", "Cohere2ForCausalLM"), _ATTENTION, _MLP)
GRANITE = Adapter(
    "granite",
    ("GraniteForCausalLM",),
    replace(_ATTENTION, multiplier="residual_multiplier"),
    replace(_MLP, multiplier="residual_multiplier"),
)
GPT2 = Adapter(
    "gpt2",
    ("GPT2LMHeadModel",),
    # Conv1D keeps its weight as [in, out].
    _linear("attn", "attn.c_proj", axis=-1),
    _linear("mlp", "mlp.c_proj", axis=-1),
    embedding="transformer.wte",
    also_embedding=("transformer.wpe.weight",),
    blocks="transformer.h",
    final_norm="transformer.ln_f",
)
GPT_NEOX = Adapter(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    _linear("attention", "attention.dense"),
    _linear("mlp", "mlp.dense_4h_to_h"),
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
)

GEMMA3N = Adapter(
    "gemma3n",
    ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    refuses=Refusal(
        "AltUp keeps several residual streams that predict and correct each other, and a block's input is all of them"
    ),
)
_HYPER_CONNECTIONS = Refusal(
    "hyper-connections keep several residual streams and mix them with learned weights in every block"
)
DEEPSEEK_V4 = Adapter("deepseek_v4", ("DeepseekV4ForCausalLM",), refuses=_HYPER_CONNECTIONS)
QWEN4_EXP = Adapter(
    "qwen4_exp", ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"), refuses=_HYPER_CONNECTIONS
)

ADAPTERS = (
    *(LLAMA, YI, MISTRAL, QWEN2, QWEN3, QWEN3_5, GEMMA, GEMMA2, GEMMA3, GEMMA3_MULTIMODAL, GEMMA4, GEMMA4_MULTIMODAL),
    *(OLMO2, GLM4, PHI, PHI3, COHERE, GRANITE, GPT2, GPT_NEOX, GEMMA3N, DEEPSEEK_V4, QWEN4_EXP),
)
