"""Do the paper's work the straightforward way: transformers, forward hooks, and one sweep a score.

This is what the engine is timed against. It pads on the left, batches by 32 in the order given and computes the last
position's logits only, so that what is compared is the method and not an oversight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusalkit.adapter import Adapter
from refusalkit.engine.layout import layout_of

Tokens = tuple[int, ...]
Hook = tuple[Any, bool, Callable[[Tensor], Tensor]]
BATCH = 32


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Change the input (True) or the output of modules."""

    def on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args: (change(args[0]), *args[1:])

    def on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return hook

    handles = [
        module.register_forward_pre_hook(on_input(change))
        if at_input
        else module.register_forward_hook(on_output(change))
        for module, at_input, change in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Plain:
    """Hold a plain transformers model and where its adapter says it writes."""

    module: Any
    adapter: Adapter
    pad_id: int

    @property
    def blocks(self) -> Any:
        """The list of blocks."""
        return self.module.get_submodule(self.adapter.blocks)

    def logits(self, prompts: Sequence[Tokens], hooks: Sequence[Hook] = ()) -> Tensor:
        """Return the last-position logits [prompt, d_vocab]."""
        found = []
        with torch.no_grad(), hooked(hooks):
            for start in range(0, len(prompts), BATCH):
                inputs = self._inputs(prompts[start : start + BATCH])
                found.append(self.module(**inputs, logits_to_keep=1).logits[:, -1])
        return torch.cat(found)

    def means(self, prompts: Sequence[Tokens], positions: Sequence[int]) -> Tensor:
        """Return the mean input of every block at `positions`, [position, layer, d_model] float64."""
        total = torch.zeros(len(positions), len(self.blocks), self.module.config.hidden_size, dtype=torch.float64)

        def keep(layer: int) -> Callable[[Tensor], Tensor]:
            def change(resid: Tensor) -> Tensor:
                total[:, layer] += resid[:, list(positions)].double().sum(0).cpu()
                return resid

            return change

        self.logits(prompts, [(block, True, keep(layer)) for layer, block in enumerate(self.blocks)])
        return total / len(prompts)

    def ablation(self, direction: Tensor) -> list[Hook]:
        """Return the hooks that remove `direction` [d_model] at every input, attention output and MLP output."""
        unit = (direction / direction.norm()).to(self.module.device, self.module.dtype)

        def change(x: Tensor) -> Tensor:
            return x - (x @ unit)[..., None] * unit

        hooks: list[Hook] = []
        for block, writes in zip(self.blocks, layout_of(self.module, self.adapter).writes, strict=True):
            hooks.append((block, True, change))
            hooks += [(block.get_submodule(write.output), False, change) for write in writes]
        return hooks

    def addition(self, direction: Tensor, layer: int) -> list[Hook]:
        """Return the hook that adds `direction` [d_model] to the input of one block."""
        vector = direction.float().to(self.module.device)
        return [(self.blocks[layer], True, lambda x: x + vector)]

    def generate(self, prompts: Sequence[Tokens], hooks: Sequence[Hook], max_new_tokens: int) -> None:
        """Complete prompts greedily, in the order given."""
        with torch.no_grad(), hooked(hooks):
            for start in range(0, len(prompts), BATCH):
                inputs = self._inputs(prompts[start : start + BATCH])
                del inputs["position_ids"]
                self.module.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.pad_id)

    def _inputs(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
        width = max(map(len, prompts))
        ids = torch.tensor([(self.pad_id,) * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([(0,) * (width - len(prompt)) + (1,) * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: value.to(self.module.device) for name, value in inputs.items()}
