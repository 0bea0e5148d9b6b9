"""Say what a direction has to do: the targets, and the loss of directions that miss them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.errors import RunError
from refusalkit.intervention import Intervention
from refusalkit.selector import Tokens
from refusalkit.strategy import DifferentiableSubject, ModelInputs
from refusalkit_rdo.place import Place

if TYPE_CHECKING:
    from refusalkit_rdo.strategies import Trained

#: The layers on which independence is asked for, as a share of all (the authors' code).
INDEPENDENT_LAYERS = 0.9


@dataclass(frozen=True, eq=False)
class Targets:
    """Hold as many prompts of either side, and what the difference in means makes of them."""

    harmful: tuple[Tokens, ...]
    harmless: tuple[Tokens, ...]
    answers: tuple[Tokens, ...]
    """Completions of harmful prompts with the difference in means ablated."""
    refusals: tuple[Tokens, ...]
    """First sentences that harmless prompts are answered with when it is added."""
    retained: tuple[Tokens, ...]
    """Completions of harmless prompts in the unmodified model."""


@dataclass(frozen=True, eq=False)
class Objective:
    """Measure directions of length one against the targets (Wollschläger et al. 2025, section 4)."""

    place: Place
    difference: Tensor
    """[d_model] float64: the difference in means at the place."""
    targets: Targets
    settings: Trained
    subject: DifferentiableSubject
    advance: Callable[[str, int, int], None]

    @classmethod
    def at(cls, place: Place, difference: Tensor, settings: Trained, model: ModelInputs) -> Objective:
        """Complete the training prompts under the difference in means [d_model] at `place`."""
        shown = model.advance or (lambda what, done, total: None)
        n = min(len(model.prompts["harmful"]), len(model.prompts["harmless"]))
        harmful, harmless = model.prompts["harmful"][:n], model.prompts["harmless"][:n]
        vector, wanted = difference.float(), settings.target_tokens

        def completed(prompts: Sequence[Tokens], edits: Intervention | None, length: int, what: str) -> list[Tokens]:
            return model.subject.generate(prompts, edits, length, lambda done, total: shown(what, done, total))

        answers = completed(harmful, place.ablation(vector), wanted, "answers under ablation")
        refusals = completed(harmless, place.addition(vector), wanted, "refusals under addition")
        # One token fewer: the KL is taken on the positions that predict them, and one more.
        retained = completed(harmless, None, max(1, wanted - 1), "harmless answers")
        sentences = [first_sentence(tokens, model.text) for tokens in refusals]
        for what, completions in (("ablated", answers), ("added", sentences)):
            if not any(completions):
                raise RunError(
                    f"the model says nothing with the difference in means {what}, so there is no target to train for",
                    where=f"find: position {place.position}, layer {place.layer}",
                    hint="state another `find.layer` or `find.position`",
                )
        targets = Targets(harmful, harmless, tuple(answers), tuple(sentences), tuple(retained))
        return cls(place, difference, targets, settings, model.subject, shown)

    @property
    def length(self) -> Tensor:
        """The length of the difference in means, which additions keep."""
        length: Tensor = self.difference.norm()
        return length

    @property
    def n_prompts(self) -> int:
        """How many prompts of either side there are."""
        return len(self.targets.harmful)

    def loss(self, directions: Tensor, prompts: Sequence[int]) -> Tensor:
        """Return the loss, averaged over `directions` [direction, d_model] and over some of the prompts."""
        harmful, harmless, answers, refusals, retained = (
            [tokens[index] for index in prompts]
            for tokens in (
                self.targets.harmful,
                self.targets.harmless,
                self.targets.answers,
                self.targets.refusals,
                self.targets.retained,
            )
        )
        ablations = [self.place.ablation(direction) for direction in directions]
        additions = [self.place.addition(self.length * algebra.unit(direction)) for direction in directions]
        weights, subject = self.settings, self.subject
        total = weights.ablation_weight * subject.cross_entropy(harmful, answers, ablations).mean()
        if weights.addition_weight:
            total = total + weights.addition_weight * subject.cross_entropy(harmless, refusals, additions).mean()
        if weights.retain_weight:
            changed = subject.kl_nats(harmless, retained, ablations, weights.target_tokens)
            total = total + weights.retain_weight * changed.mean()
        return total


def first_sentence(tokens: Tokens, text: Callable[[Tokens], str]) -> Tokens:
    """Return the tokens before the first full stop."""
    ends = (place for place in range(len(tokens)) if "." in text(tokens[: place + 1]))
    return tokens[: next(ends, len(tokens))]


class Independence:
    """Measure how far ablating a direction changes what the hidden states are along others, and the other way round.

    The sum over the others, and the mean over layers, of the squared changes of cosine at the last token of harmful
    prompts (Wollschläger et al. 2025, section 6).
    """

    def __init__(self, objective: Objective, others: Sequence[Tensor]) -> None:
        self.objective = objective
        self.others = [algebra.unit(other) for other in others]
        self.n_layers = int(objective.place.n_layers * INDEPENDENT_LAYERS)
        self.plain = self._states(None)
        self.ablated = [self._states(other) for other in self.others]

    def _states(self, ablated: Tensor | None) -> Tensor:
        """Return hidden states [prompt, layer, d_model] float64 of every harmful prompt."""
        intervention = None if ablated is None else self.objective.place.ablation(ablated)
        found = self.objective.subject.states(self.objective.targets.harmful, intervention)
        return found[:, : self.n_layers].double()

    def loss(self, direction: Tensor, prompts: Sequence[int]) -> Tensor:
        """Return the mean over some of the prompts; `direction` [d_model]."""
        chosen = list(prompts)
        along = [_cosines(self.plain[chosen], other) for other in self.others]

        def seen_by_others(states: Tensor, rows: Sequence[int]) -> Tensor:
            changes = [
                _cosines(states[:, : self.n_layers].double(), other) - before[list(rows)].to(states.device)
                for other, before in zip(self.others, along, strict=True)
            ]
            return sum((change.square().mean(1) for change in changes), start=torch.zeros(()).to(states.device))

        place = self.objective.place
        harmful = [self.objective.targets.harmful[index] for index in chosen]
        total = self.objective.subject.state_loss(harmful, [place.ablation(direction)], seen_by_others).sum()
        for ablated in self.ablated:
            change = _cosines(ablated[chosen], direction) - _cosines(self.plain[chosen], direction)
            total = total + change.square().mean()
        return total


def _cosines(states: Tensor, vector: Tensor) -> Tensor:
    """Return the cosine [prompt, layer] of every hidden state with `vector` [d_model]."""
    return torch.nn.functional.cosine_similarity(states, vector.to(states), dim=-1)
