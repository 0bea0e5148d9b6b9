"""Make tiny random models of real architectures, from configurations alone.

Weights, biases and norm gains are all random, so that a law that holds here does not hold because a bias is zero or
a gain is one.
"""

from __future__ import annotations

from typing import Any

import torch

from refusalkit.adapter import Adapter
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import engine_of
from refusalkit.errors import InputError, nearest
from refusalkit.testing.architectures import ARCHITECTURES, COMMON

MOST_PARAMETERS = 100_000_000

CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} \n {{ message['content'] }} <|im_end|> \n "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)


def random_model(
    architecture: str, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """Build what transformers makes of a checkpoint that names `architecture`, with random weights.

    Every architecture of transformers can be asked for. Those of `refusalkit.testing.architectures` have settings of
    their own there, others the common ones alone; `overrides` come on top. All are settings of the text part where a
    configuration has several. Raises `InputError` when transformers knows no such architecture, and when the model
    would not be tiny.
    """
    kind = _model_class(architecture)
    # Some configurations work a setting out of the others and do not take it.
    fixed = {name for name in COMMON if getattr(getattr(kind.config_class, name, None), "fset", True) is None}
    usual = {name: value for name, value in COMMON.items() if name not in fixed}
    settings = {**usual, **ARCHITECTURES.get(kind.__name__, {}), "tie_word_embeddings": tied, **overrides}
    vision = settings.pop("vision_config", None)
    if vision is not None:
        settings = {"text_config": settings, "vision_config": dict(vision), "tie_word_embeddings": tied}
    config = kind.config_class(**settings)
    config.architectures = [architecture]
    _check_tiny(kind, config)
    # The fast kernels for experts know no float64.
    model = kind._from_config(config, dtype=dtype, experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0].endswith(_LEARNED))]
    for _, tensor in sorted(tensors):
        scale = 0.3 if tensor.ndim == 1 else 1.5 * tensor.shape[-1] ** -0.5
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.ndim == 1))
    return model.eval().requires_grad_(False)


def _model_class(architecture: str) -> Any:
    """Return the class that `AutoModelForCausalLM` loads a checkpoint of an architecture with."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = getattr(transformers, architecture, None)
    if named is None:
        hint = nearest(architecture, list(ARCHITECTURES))
        raise InputError(f"transformers has no {architecture}", where="refusalkit.testing", hint=hint)
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(named.config_class.model_type, architecture)
    return getattr(transformers, loaded)


def _check_tiny(kind: Any, config: Any) -> None:
    """Refuse a model that settings without a usual name (experts, a vision part) leave large."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise InputError(
            f"{kind.__name__} would have {size / 1e6:.0f} M parameters",
            where="refusalkit.testing",
            hint="give settings of its configuration that make it tiny",
        )


#: Buffers that a checkpoint brings along.
_LEARNED = ("layer_scalar", "e_score_correction_bias")


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
