"""Read what interventions do inside the model and along given completions, those on weights included."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.engine import blocks
from refusalkit.engine.batch import Batch, Tokens, targets
from refusalkit.engine.lower import counted_from, lower
from refusalkit.intervention import NOTHING, Intervention, Place
from refusalkit.selector import Advance

if TYPE_CHECKING:
    from refusalkit.engine.engine import Engine


def likelihoods(
    engine: Engine, prompts: Sequence[Tokens], completions: Sequence[Tokens], intervention: Intervention | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood [prompt] float64 of given completions, in nats, and whether each is greedy [prompt]."""
    counts = torch.tensor([len(completion) for completion in completions])
    found = torch.zeros(len(prompts), dtype=torch.float64)
    greedy = torch.zeros(len(prompts), dtype=torch.bool)
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]

    def run(group: Batch, _: dict[str, Any]) -> None:
        rows = list(group.indices)
        width, ends = targets(group, counts)
        program = lower([intervention or NOTHING], engine.layout, len(rows), engine.device)
        program = counted_from(program, counts[rows, None].to(engine.device))
        options = {"logits_to_keep": width, "use_cache": False}
        logits = blocks.kept_logits(engine.model, group.repeated(1), program, options)
        found[rows] = -algebra.completion_loss(logits, *ends).cpu()
        greedy[rows] = algebra.all_greedy(logits, *ends).cpu()
        engine.prompt_passes += len(rows)

    engine._over(whole, run)
    return found, greedy


def losses(
    engine: Engine, prompts: Sequence[Tokens], completions: Sequence[Tokens], intervention: Intervention | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy [prompt] float64, in nats, of given completions, and their lengths [prompt]."""
    found, _ = likelihoods(engine, prompts, completions, intervention)
    return -found, torch.tensor([len(completion) for completion in completions])


def completion_kl(
    engine: Engine, prompts: Sequence[Tokens], completions: Sequence[Tokens], interventions: Sequence[Intervention]
) -> tuple[Tensor, Tensor]:
    """Sum KL(unmodified || modified) over the predictions of given completions' tokens.

    Returns [intervention, prompt] float64 in nats, and the completions' lengths [prompt]. The unmodified model reads
    each batch once; edited weights are put back after each.
    """
    counts = torch.tensor([len(completion) for completion in completions])
    found = torch.zeros((len(interventions), len(prompts)), dtype=torch.float64)
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]

    def run(group: Batch, _: dict[str, Any]) -> None:
        rows = list(group.indices)
        lengths = counts[rows, None].to(engine.device)
        width, ends = targets(group, counts)
        options = {"logits_to_keep": width, "use_cache": False}
        reference = blocks.kept_logits(engine.model, group.repeated(1), (), options)
        for number, each in enumerate(interventions):
            program = counted_from(lower([each], engine.layout, len(rows), engine.device), lengths)
            with _edited(engine, each):
                logits = blocks.kept_logits(engine.model, group.repeated(1), program, options)
            found[number, rows] = algebra.kl_along(reference, logits, ends[1]).cpu()
        engine.prompt_passes += len(rows) * (1 + len(interventions))

    engine._over(whole, run)
    return found, counts


def projections(
    engine: Engine,
    prompts: Sequence[Tokens],
    interventions: Sequence[Intervention],
    direction: Tensor,
    place: Place,
    advance: Advance | None = None,
) -> Tensor:
    """Return the component of the hidden state at `place` along the unit `direction`: [intervention, prompt] float64.

    It is read behind the edits of that place.
    """
    onto = algebra.unit(direction.double()).cpu()
    found = []
    for each in interventions:
        acting = each if each.edits or each.gate is not None else None
        with _edited(engine, each):
            read = engine.capture(
                prompts,
                (place.position,),
                place.site,
                layers=(place.layer,),
                intervention=acting,
                keep_samples=True,
                advance=advance,
            )
        assert read.samples is not None
        found.append(read.samples[:, 0, 0].double() @ onto)
    return torch.stack(found)


def _edited(engine: Engine, intervention: Intervention) -> AbstractContextManager[Any]:
    if intervention.weights is None:
        return nullcontext()
    return engine.edited_weights(intervention.weights, intervention.keeps_norms)
