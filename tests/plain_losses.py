"""Compute the paper's three losses with transformers alone: one text after the other, no batch, no engine.

In double precision, so that what is found differs by the rounding of one side alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from refusalkit.artifacts import Unmodified
from refusalkit.metric import TextMetric
from refusalkit.recipe import EvaluateSection


def plain_loss(
    module: Any,
    tokenizer: Any,
    section: EvaluateSection,
    written: tuple[Sequence[str], Unmodified],
    removed: Tensor | None,
) -> dict[str, float]:
    """Return the loss a token by metric, of a Llama as it is or with a direction [d_model] removed.

    `written` are the harmless prompts and what the model wrote to them.
    """
    module = copy.deepcopy(module).double()
    with ExitStack() as stack:
        if removed is not None:
            for handle in _ablate(module, removed):
                stack.callback(handle.remove)
        found = {}
        for metric in section.metrics:
            sequences = list(_sequences(metric, tokenizer, *written))
            sums = [_loss(module, ids, start) for ids, start in sequences]
            found[metric.label] = sum(sums) / sum(len(ids) - start for ids, start in sequences)
        return found


def _sequences(
    metric: Any, tokenizer: Any, prompts: Sequence[str], unmodified: Unmodified
) -> Iterator[tuple[list[int], int]]:
    """Yield token ids, and the first that counts."""
    if not isinstance(metric, TextMetric):
        for prompt, completion in zip(prompts, unmodified.completions["harmless"], strict=True):
            ids = _rendered(tokenizer, prompt)
            yield [*ids, *completion], len(ids)
        return
    for passage in metric.texts:
        if passage.prompt is None:
            yield tokenizer(passage.text)["input_ids"][: metric.max_tokens], 1
        else:
            ids = _rendered(tokenizer, passage.prompt)
            yield [*ids, *tokenizer(passage.text, add_special_tokens=False)["input_ids"]], len(ids)


def _rendered(tokenizer: Any, prompt: str) -> list[int]:
    conversation = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _loss(module: Any, ids: list[int], start: int) -> float:
    tokens = torch.tensor([ids])
    logits = module(tokens).logits[0, start - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, start:], reduction="sum"))


def _ablate(module: Any, removed: Tensor) -> Iterator[Any]:
    unit = (removed / removed.norm()).double()

    def without(state: Tensor) -> Tensor:
        return state - (state @ unit)[..., None] * unit

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    for layer in module.model.layers:
        yield layer.register_forward_pre_hook(lambda _module, args: (without(args[0]), *args[1:]))
        yield layer.self_attn.register_forward_hook(after)
        yield layer.mlp.register_forward_hook(after)
