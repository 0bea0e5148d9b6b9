"""Descend on the sphere: train one direction, directions one after another, or the basis of a cone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit_rdo.cone import draw
from refusalkit_rdo.objective import Independence, Objective

if TYPE_CHECKING:
    from refusalkit_rdo.strategies import Sampling, Trained

#: The loss of rows [rank, d_model] on some of the prompts.
Loss = Callable[[Tensor, Sequence[int]], Tensor]

#: Of AdamW, without weight decay, as in the authors' code.
BETAS = (0.9, 0.98)
LARGEST_GRADIENT = 10.0
LEARNING_RATE_CUTS = 2
#: So many prompts try the same directions of a cone: fewer would make more of them, but passes too small to be fast.
SHARING = 4


def train_orthogonal(objective: Objective, settings: Trained, rank: int, given: Sequence[Tensor]) -> Tensor:
    """Train directions one after another, each orthogonal to `given` and to those before: [rank, d_model]."""
    generator = torch.Generator().manual_seed(settings.seed)
    found: list[Tensor] = []
    for number in range(rank):
        away = [*given, *found]
        what = _label("direction", number, rank)
        found.append(descend(objective, objective.loss, _random(objective, generator), away, (generator, what))[0])
    return torch.stack(found)


def train_independent(objective: Objective, settings: Trained, rank: int, weight: float) -> Tensor:
    """Train directions one after another, independent of the difference in means and of those before."""
    generator = torch.Generator().manual_seed(settings.seed)
    found: list[Tensor] = []
    for number in range(rank):
        independence = Independence(objective, [objective.difference, *found])

        def loss(rows: Tensor, prompts: Sequence[int], independence: Independence = independence) -> Tensor:
            return objective.loss(rows, prompts) + weight * independence.loss(rows[0], prompts)

        what = _label("independent direction", number, rank)
        found.append(descend(objective, loss, _random(objective, generator), [], (generator, what))[0])
    return torch.stack(found)


def train_cone(objective: Objective, settings: Trained, rank: int, sampled: tuple[int, Sampling]) -> Tensor:
    """Train the basis of a cone, from one vector up: [rank, d_model] orthonormal.

    The loss is the mean over the basis vectors plus the mean over directions drawn from the cone, which every few
    prompts draw for themselves.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    samples, sampling = sampled

    def loss(rows: Tensor, prompts: Sequence[int]) -> Tensor:
        total = objective.loss(rows, prompts)
        for start in range(0, len(prompts), SHARING) if len(rows) > 1 else ():
            few = prompts[start : start + SHARING]
            drawn = objective.loss(draw(rows, samples, sampling, generator), few)
            total = total + drawn * len(few) / len(prompts)
        return total

    basis = _random(objective, generator)[:0]
    for number in range(rank):
        start = torch.cat([basis, _random(objective, generator)])
        basis = descend(objective, loss, start, [], (generator, _label("cone of rank", number, rank)))
    return basis


def descend(
    objective: Objective, loss: Loss, start: Tensor, away: Sequence[Tensor], run: tuple[torch.Generator, str]
) -> Tensor:
    """Return the rows [rank, d_model] of lowest loss met on the way from `start`, orthonormal, orthogonal to `away`.

    Each step takes another few prompts, projects the gradient on the tangent of the sphere, and puts the rows back on
    it. `run` is the source of randomness and what the progress is called.
    """
    settings, (generator, what) = objective.settings, run
    rows = orthonormalized(start, away).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=settings.learning_rate, betas=BETAS, weight_decay=0.0, amsgrad=True)
    lowest, best, waited, cuts = float("inf"), rows.detach().clone(), 0, 0
    batches = _batches(objective.n_prompts, settings.batch_size, generator)
    for step in range(settings.steps):
        objective.advance(what, step, settings.steps)
        optimizer.zero_grad()
        value = loss(rows, next(batches))
        value.backward()  # type: ignore[no-untyped-call]
        if value.item() < lowest:
            lowest, best, waited = value.item(), rows.detach().clone(), 0
        else:
            waited += 1
        if waited == settings.patience:
            if cuts == LEARNING_RATE_CUTS:
                break
            cuts, waited = cuts + 1, 0
            optimizer.param_groups[0]["lr"] /= 10
        _step(rows, optimizer, away)
    objective.advance(what, settings.steps, settings.steps)
    return best


def _step(rows: Tensor, optimizer: torch.optim.Optimizer, away: Sequence[Tensor]) -> None:
    with torch.no_grad():
        assert rows.grad is not None
        rows.grad -= (rows.grad * rows).sum(-1, keepdim=True) * rows
        torch.nn.utils.clip_grad_norm_([rows], LARGEST_GRADIENT)
        optimizer.step()
        rows.copy_(orthonormalized(rows, away))


def orthonormalized(rows: Tensor, away: Sequence[Tensor]) -> Tensor:
    """Return `rows` [rank, d_model], in order, orthogonal to `away` and to each other, of length one (Gram-Schmidt)."""
    fixed = algebra.orthonormal(torch.stack(list(away))) if away else rows[:0]
    found: list[Tensor] = []
    for row in rows:
        basis = torch.cat([fixed, *(other[None] for other in found)])
        # Twice: the first pass leaves a rounding error of what it removes.
        for _ in range(2):
            row = row - row @ basis.T @ basis
        found.append(algebra.unit(row))
    return torch.stack(found)


def _random(objective: Objective, generator: torch.Generator) -> Tensor:
    """Draw a start [1, d_model] float64."""
    return torch.randn((1, len(objective.difference)), generator=generator, dtype=torch.float64)


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield prompts in random order, again and again; every batch has the same size."""
    order: list[int] = []
    while True:
        while len(order) < min(size, n):
            order += torch.randperm(n, generator=generator).tolist()
        yield order[: min(size, n)]
        order = order[min(size, n) :]


def _label(what: str, number: int, rank: int) -> str:
    return what if rank == 1 else f"{what} {number + 1} of {rank}"
