"""Make tiny random models of real architectures, from configurations alone.

Weights, biases and norm gains are all random, so that a law that holds here does not hold because a bias is zero or
a gain is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refusalkit.adapter import Adapter
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import engine_of
from refusalkit.errors import InputError

_COMMON: Mapping[str, Any] = {
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

#: Configuration class and what differs from the common shape, by model class.
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "GemmaForCausalLM": ("GemmaConfig", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"sliding_window": 16}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"sliding_window": 16}),
}

CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} \n {{ message['content'] }} <|im_end|> \n "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)


def random_model(architecture: str, *, tied: bool = False, seed: int = 0, **overrides: Any) -> Any:
    """Build a float32 model of `architecture` (a value of `config.architectures`) with random weights."""
    import transformers

    if architecture not in ARCHITECTURES:
        raise InputError(
            f"no tiny configuration of {architecture}", where="refusalkit.testing", hint=", ".join(ARCHITECTURES)
        )
    name, differences = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**{**_COMMON, **differences, "tie_word_embeddings": tied, **overrides})
    config.architectures = [architecture]
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, architecture)(config).eval().requires_grad_(False)
    for _, parameter in sorted(model.named_parameters()):
        scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1))
    return model


def tiny_tokenizer(chat_template: str = CHATML) -> Any:
    """Build a tokenizer of 64 whole words with a chat template; what it does not know becomes `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n"]
    words += [f"w{number}" for number in range(64 - len(words))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.padding_side = "left"
    return tokenizer


def random_engine(architecture: str, adapter: Adapter, **options: Any) -> Engine:
    """Put a tiny random model into an engine; `options` are those of `random_model`."""
    return engine_of(random_model(architecture, **options), tiny_tokenizer(), adapter)


def random_prompts(n: int, seed: int = 0, shared: int = 10) -> tuple[tuple[int, ...], ...]:
    """Draw prompts of different lengths that begin with the same `shared` tokens and end alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 64, (length,), generator=generator).tolist())

    front, back = draw(shared), draw(3)
    return tuple(front + draw(3 + number % 5) + back for number in range(n))
