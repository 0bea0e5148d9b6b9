"""Say how each tiny family writes a conversation and is shaped: special tokens, chat template, model configuration.

The templates have the shape of the families they stand for, down to the number of tokens after the instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from refusalkit.errors import InputError
from refusalkit.tiny import FAMILIES

_LLAMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + _CHATML_TEMPLATE
)


@dataclass(frozen=True)
class Family:
    """Describe one tiny family."""

    name: str
    model_type: str
    chat_template: str
    end_of_turn: str
    """The token that ends an answer."""
    pad: str
    bos: str | None
    """The token every text begins with, if there is one."""
    eos: str
    other_specials: tuple[str, ...]
    whole_words: tuple[str, ...]
    """Pieces of the template that must each be one token."""
    shape: Mapping[str, Any]
    """The arguments of the model configuration that this family adds to the common ones."""
    takes_system: bool = True
    caprice: float = 0.0
    """How often an answer begins in a way that does not follow from the request; tuned so that the effects show."""
    write_norms: tuple[str, ...] = ()
    """The gains of norms that stand between a block's output and the residual stream."""

    @property
    def specials(self) -> tuple[str, ...]:
        """List every special token once, in the order of their ids."""
        named = (self.pad, *((self.bos,) if self.bos else ()), self.eos, *self.other_specials, self.end_of_turn)
        return tuple(dict.fromkeys(named))


def _shape(**arguments: Any) -> Mapping[str, Any]:
    """Freeze the arguments of a configuration, the common ones included."""
    common = {
        "hidden_size": 128,
        "intermediate_size": 176,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    return MappingProxyType(common | arguments)


_ALL = (
    Family(
        name="llama",
        model_type="llama",
        chat_template=_LLAMA_TEMPLATE,
        end_of_turn="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        other_specials=("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        whole_words=("system", "user", "assistant", "\n\n"),
        shape=_shape(tie_word_embeddings=False),
        caprice=0.3,
    ),
    Family(
        name="gemma",
        model_type="gemma2",
        chat_template=_GEMMA_TEMPLATE,
        end_of_turn="<end_of_turn>",
        pad="<pad>",
        bos="<bos>",
        eos="<eos>",
        other_specials=("<start_of_turn>",),
        whole_words=("user", "model"),
        # Norms behind the projections leave each block less to say, so there are more of them.
        shape=_shape(
            tie_word_embeddings=True, head_dim=32, query_pre_attn_scalar=32, num_hidden_layers=10, intermediate_size=160
        ),
        caprice=0.02,
        takes_system=False,
        write_norms=("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
    ),
    Family(
        name="qwen",
        model_type="qwen2",
        chat_template=_QWEN_TEMPLATE,
        end_of_turn="<|im_end|>",
        pad="<|endoftext|>",
        bos=None,
        eos="<|im_end|>",
        other_specials=("<|im_start|>",),
        whole_words=("system", "user", "assistant"),
        shape=_shape(tie_word_embeddings=True),
    ),
    Family(
        name="yi",
        model_type="llama",
        chat_template=_CHATML_TEMPLATE,
        end_of_turn="<|im_end|>",
        pad="<unk>",
        bos=None,
        eos="<|im_end|>",
        other_specials=("<|startoftext|>", "<|endoftext|>", "<|im_start|>"),
        # In Yi's vocabulary "assistant" falls in two, which makes its template one token longer than plain ChatML.
        whole_words=("system", "user", "ass", "istant"),
        shape=_shape(tie_word_embeddings=False),
        caprice=0.12,
    ),
)

_BY_NAME: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})


def family_named(name: str) -> Family:
    """Look up a family."""
    if name not in _BY_NAME:
        raise InputError(f"there is no tiny model named {name!r}", hint=f"the tiny models are {', '.join(FAMILIES)}")
    return _BY_NAME[name]
