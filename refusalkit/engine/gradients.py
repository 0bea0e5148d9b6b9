"""Differentiate what a model does with respect to the tensors of interventions.

A loss is a mean over prompts. Each batch's part of its gradient is taken as soon as the batch has run, so memory is
bounded by one batch whatever the number of prompts and interventions. What is handed back has that value and that
gradient: it can be weighed, added and differentiated once, like any tensor. The weights of the model take no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nnsight
import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.engine.batch import Batch, Tokens
from refusalkit.engine.blocks import walk
from refusalkit.engine.engine import Engine
from refusalkit.engine.lower import Pack, Program, counted_from, lower, packs
from refusalkit.intervention import NOTHING, Intervention, Site
from refusalkit.strategy import StateObjective

#: Run one pack on one batch and reduce each row to a number: [intervention * prompt].
Loss = Callable[[Pack], Tensor]


class Differentiable:
    """Answer what a strategy asks of a loaded model; implements `refusalkit.strategy.DifferentiableSubject`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.n_layers = engine.n_layers
        self.logits = engine.logits
        self.measure = engine.measure
        self.mean_states = engine.mean_states
        self.attribute = engine.attribute
        self.generate = engine.generate
        self._dtype = torch.promote_types(engine.module.dtype, torch.float32)

    def states(
        self, prompts: Sequence[Tokens], intervention: Intervention | None = None, site: Site = "resid_pre"
    ) -> Tensor:
        """Return the last token's hidden state in every layer, [prompt, layer, d_model] float32."""
        samples = self._engine.capture(prompts, (-1,), site, intervention=intervention, keep_samples=True).samples
        assert samples is not None
        return samples[:, 0]

    def cross_entropy(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], interventions: Sequence[Intervention]
    ) -> Tensor:
        """Return the mean over prompts of a completion's cross-entropy a token, in nats: [intervention] float64.

        An empty completion counts as 0.
        """
        counts = torch.tensor([len(completion) for completion in completions])

        def prepare(group: Batch) -> Loss:
            own = counts[list(group.indices)]
            width = int(own.max()) + 1
            mask = _last(own, width)
            ids = group.input_ids[:, -width:]

            def loss(pack: Pack) -> Tensor:
                times = len(pack.indices)
                logits = self._logits(group, pack, own, width)
                summed = algebra.completion_loss(logits, ids.repeat(times, 1), mask.repeat(times, 1))
                return summed / own.clamp(min=1).repeat(times).to(summed.device)

            return loss

        return self._mean(_joined(prompts, completions), interventions, prepare)

    def kl_nats(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        interventions: Sequence[Intervention],
        last: int,
    ) -> Tensor:
        """Return the mean over prompts of KL(modified || unmodified), in nats: [intervention] float64.

        It is summed over the `last` positions of prompt and completion.
        """
        whole = _joined(prompts, completions)
        counts = torch.tensor([len(completion) for completion in completions])

        def prepare(group: Batch) -> Loss:
            own = counts[list(group.indices)]
            mask = _last(torch.tensor([len(whole[index]) for index in group.indices]), last)
            with torch.no_grad():
                reference = self._logits(group, Pack((0,), (NOTHING,)), own, last).double().log_softmax(-1)

            def loss(pack: Pack) -> Tensor:
                times = len(pack.indices)
                modified = self._logits(group, pack, own, last).double().log_softmax(-1)
                apart = (modified.exp() * (modified - reference.repeat(times, 1, 1))).sum(-1)
                return (apart * mask[:, -apart.shape[1] :].repeat(times, 1).to(apart.device)).sum(-1)

            return loss

        return self._mean(whole, interventions, prepare)

    def state_loss(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        objective: StateObjective,
        site: Site = "resid_pre",
    ) -> Tensor:
        """Return the mean over prompts of `objective` on the last token's hidden states: [intervention] float64."""
        reads = [(site, layer) for layer in range(self.n_layers)]

        def prepare(group: Batch) -> Loss:
            def loss(pack: Pack) -> Tensor:
                times, rows = len(pack.indices), len(group.indices)
                program = lower(pack.interventions, self._engine.layout, rows, self._engine.device, reads, self._dtype)
                found = states(self._engine.model, group.repeated(times), program)
                return objective(torch.stack(found, 1), group.indices * times)

            return loss

        return self._mean(prompts, interventions, prepare)

    def _logits(self, group: Batch, pack: Pack, counts: Tensor, last: int) -> Tensor:
        """Return the logits [intervention * prompt, position, d_vocab] of the last positions.

        The sequences end `counts` [prompt] tokens after their prompts.
        """
        engine, times, rows = self._engine, len(pack.indices), len(group.indices)
        program = lower(pack.interventions, engine.layout, rows, engine.device, dtype=self._dtype)
        program = counted_from(program, counts.repeat(times)[:, None].to(engine.device))
        engine.prompt_passes += times * rows
        return logits(engine.model, group.repeated(times), program, last)

    def _mean(
        self, sequences: Sequence[Tokens], interventions: Sequence[Intervention], prepare: Callable[[Batch], Loss]
    ) -> Tensor:
        """Average a loss over sequences and give it its gradient; `prepare` makes the loss of one batch."""
        probes = [_probe(intervention) for intervention in interventions]
        values = torch.zeros(len(probes), dtype=torch.float64)
        gradients = [[torch.zeros_like(leaf) for leaf in probe.leaves] for probe in probes]

        def run(group: Batch, _: dict[str, Any]) -> None:
            loss = prepare(group)
            together = max(1, self._engine.batch_size // len(group.indices))
            found = []
            for pack in packs([(index, probe.intervention) for index, probe in enumerate(probes)], together):
                summed = loss(pack).double().reshape(len(pack.indices), -1).sum(1)
                leaves = [leaf for index in pack.indices for leaf in probes[index].leaves]
                parts: Sequence[Tensor] = ()
                if leaves and summed.requires_grad:
                    parts = torch.autograd.grad(summed.sum(), leaves, materialize_grads=True)
                    # A backward pass costs about two forward passes.
                    self._engine.prompt_passes += 2 * len(pack.indices) * len(group.indices)
                found.append((pack.indices, summed.detach().cpu(), parts))
            # Added only now: a batch that runs out of memory runs again in halves.
            for indices, summed, parts in found:
                values[list(indices)] += summed
                for total, part in zip([total for index in indices for total in gradients[index]], parts, strict=False):
                    total += part

        self._engine._over(sequences, run)
        means = zip(probes, values / len(sequences), gradients, strict=True)
        return torch.stack([probe.surrogate(value, parts, len(sequences)) for probe, value, parts in means])


@dataclass(frozen=True, eq=False)
class Probe:
    """Hold an intervention whose differentiable tensors are leaves of their own, beside the caller's tensors."""

    intervention: Intervention
    originals: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]

    def surrogate(self, value: Tensor, gradients: Sequence[Tensor], n: int) -> Tensor:
        """Return a scalar that equals `value` and whose gradient with respect to the originals is `gradients / n`."""
        for original, gradient in zip(self.originals, gradients, strict=True):
            value = value + ((original - original.detach()) * gradient / n).sum().to(value)
        return value


def _probe(intervention: Intervention) -> Probe:
    """Copy the tensors of an intervention that take a gradient."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = (tensor, tensor.detach().clone().requires_grad_())
        return copies[id(tensor)][1]

    edits = tuple(
        replace(edit, remove=copy(edit.remove), add=copy(edit.add), turn=copy(edit.turn), along=copy(edit.along))
        for edit in intervention.edits
    )
    originals, leaves = zip(*copies.values(), strict=True) if copies else ((), ())
    return Probe(replace(intervention, edits=edits), originals, leaves)


def logits(model: Any, inputs: Mapping[str, Tensor], program: Program, last: int) -> Tensor:
    """Return the logits [row, position, d_vocab] of the last positions under `program`, with their graph."""
    with model.trace(inputs, logits_to_keep=last, use_cache=False):
        list(walk(model, program, (len(inputs["input_ids"]), 0, [])))
        found = nnsight.save(model.output.logits)
    return found  # type: ignore[no-any-return]


def states(model: Any, inputs: Mapping[str, Tensor], program: Program) -> list[Tensor]:
    """Return the last position's hidden state [row, d_model] at every place that `program` keeps, with its graph."""
    with model.trace(inputs, use_cache=False) as tracer:
        kept = walk(model, program, (len(inputs["input_ids"]), 0, []))
        found = nnsight.save([state[:, -1] for state in kept])
        tracer.stop()
    return found  # type: ignore[no-any-return]


def _joined(prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> list[Tokens]:
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


def _last(counts: Tensor, width: int) -> Tensor:
    """Mark the last `counts` [row] of `width` columns."""
    return torch.arange(width, 0, -1)[None] <= counts[:, None]
