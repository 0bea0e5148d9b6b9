"""Compare the directions of groups of prompts and of positions, and say how alike noise lets them be.

The cosine of two means of few prompts is low even where both estimate the same direction. So every group is dealt into
folds, and directions from one half of the folds are compared with directions from the other half. No prompt, harmful
or harmless, is behind both sides of such a cosine, which makes its noise independent and its ceiling known: the
geometric mean of what the same comparison gives for each direction and itself (Spearman's correction for attenuation).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.analysis import OWN, Directions
from refusalkit.artifacts import DirectionPair, DirectionRow, DirectionsFound
from refusalkit.engine.request import Capture
from refusalkit.errors import RunError
from refusalkit.stages.findings import Findings

#: The prompts an analysis needs beside the run's own, by the name it has for them.
Groups = Mapping[str, tuple[str, ...]]

N_FOLDS = 8
HARMLESS = "harmless"
#: A difference this small beside the means is rounding: at layer 0 template tokens are the same in every prompt.
_ROUNDING = 1e-5


def dealt(groups: Mapping[str, Sequence[str]], seed: int, n_folds: int = N_FOLDS) -> dict[str, list[list[str]]]:
    """Deal every group's prompts into folds of about the same size; a prompt of two groups is in one fold of both."""
    draws = random.Random(seed)
    places: dict[str, int] = {}
    found: dict[str, list[list[str]]] = {}
    for name, prompts in groups.items():
        folds: list[list[str]] = [[] for _ in range(n_folds)]
        for prompt in prompts:
            if prompt in places:
                folds[places[prompt]].append(prompt)
        for prompt in draws.sample(list(prompts), len(prompts)):
            if prompt not in places:
                place = min(range(n_folds), key=lambda fold: len(folds[fold]))
                places[prompt] = place
                folds[place].append(prompt)
        found[name] = folds
    return found


def divisions(n_folds: int) -> list[tuple[list[int], list[int]]]:
    """List every division of the folds into two halves, once."""
    folds = range(n_folds)
    halves = (half for half in itertools.combinations(folds, n_folds // 2) if 0 in half)
    return [(list(half), [fold for fold in folds if fold not in half]) for half in halves]


def compare_directions(analysis: Directions, groups: Groups, findings: Findings) -> DirectionsFound:
    """Find every group's direction at every position, from all prompts and from halves, and compare them."""
    splits, bench = findings.splits, findings.bench
    taken = {
        OWN: splits.of("harmful", "train"),
        HARMLESS: splits.of("harmless", "train"),
        **{name: _at_most(prompts, analysis.most, analysis.seed) for name, prompts in groups.items()},
    }
    for name, prompts in taken.items():
        if len(prompts) < N_FOLDS:
            raise RunError(
                f"the group {name!r} has {len(prompts)} prompts, too few to be divided in many ways",
                where="analyze: directions",
                hint=f"give it at least {N_FOLDS}, better 64",
            )
    folds = dealt(taken, analysis.seed)
    positions = tuple(sorted({findings.position(at) for at in analysis.positions}))
    cells = [(name, fold) for name, parts in folds.items() for fold, part in enumerate(parts) if part]
    requests = [Capture(bench.tokens(folds[name][fold]), positions, findings.activations.site) for name, fold in cells]
    found = bench.engine.run(requests, bench.advance("groups of prompts"))
    shape = (N_FOLDS, *found[0].mean.shape)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in folds}
    for (name, fold), samples in zip(cells, found, strict=True):
        sums[name][fold] = samples.mean * samples.n_prompts
    counts = {name: torch.tensor([len(part) for part in parts]).double() for name, parts in folds.items()}
    return compared(sums, counts, positions)


def _at_most(prompts: tuple[str, ...], most: int, seed: int) -> tuple[str, ...]:
    return prompts if len(prompts) <= most else tuple(random.Random(seed).sample(prompts, most))


def compared(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], positions: Sequence[int]) -> DirectionsFound:
    """Compare directions, given each fold's sum [fold, position, layer, d_model] and count [fold]."""
    names = [name for name in sums if name != HARMLESS]

    def directions(folds: list[int]) -> Tensor:
        """Return the unit directions [group and position, layer, d_model] of some folds; not-a-number where zero."""
        means = {name: sums[name][folds].sum(0) / counts[name][folds].sum() for name in sums}
        found = torch.cat([means[name] - means[HARMLESS] for name in names])
        scale = torch.cat([means[HARMLESS]] * len(names)).norm(dim=-1, keepdim=True)
        units = algebra.unit(found)
        return units.masked_fill(found.norm(dim=-1, keepdim=True) <= _ROUNDING * scale, torch.nan)

    whole = directions(list(range(N_FOLDS)))
    parts = divisions(N_FOLDS)
    halves = torch.stack([_cosines(directions(one), directions(other)) for one, other in parts]).mean(0)
    halves = (halves + halves.transpose(0, 1)) / 2
    itself = halves.diagonal().T
    rows = [
        DirectionRow(label=_label(name, position, names, positions), group=name, position=position, n=int(total))
        for name, total in ((name, counts[name].sum()) for name in names)
        for position in positions
    ]
    return DirectionsFound(
        rows=tuple(rows),
        n_harmless=int(counts[HARMLESS].sum()),
        n_divisions=len(parts),
        pairs=tuple(_pairs([row.label for row in rows], _cosines(whole, whole), halves, itself)),
    )


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines [row, row, layer] of unit directions [row, layer, d_model]."""
    return torch.einsum("ild,jld->ijl", one, other)


def _pairs(labels: Sequence[str], cosines: Tensor, halves: Tensor, itself: Tensor) -> Iterator[DirectionPair]:
    for one, other in itertools.combinations_with_replacement(range(len(labels)), 2):
        known = (itself[one] > 0) & (itself[other] > 0)
        ceiling = (itself[one] * itself[other]).where(known, torch.nan).sqrt()
        yield DirectionPair(
            first=labels[one],
            second=labels[other],
            cosine=tuple(cosines[one, other].tolist()),
            between_halves=tuple(halves[one, other].tolist()),
            ceiling=tuple(ceiling.tolist()),
        )


def _label(name: str, position: int, names: Sequence[str], positions: Sequence[int]) -> str:
    """Name a direction by what tells it from the others."""
    if len(positions) == 1:
        return name
    return f"position {position}" if len(names) == 1 else f"{name} at {position}"
