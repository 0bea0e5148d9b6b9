"""Do one recipe's work in our way and in the plain way, on the same model and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.arithmetic import Find
from refusalkit.artifacts import Activations, Candidates, Choice, PromptSplits, Split
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.builtin.selectors import Causal
from refusalkit.engine.load import load
from refusalkit.intervention import Direction, Intervention
from refusalkit.metric import Side
from refusalkit.plan import Plan, make_plan
from refusalkit.progress import Silent
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.stages import capture, find, prompts, select
from refusalkit.stages.bench import Bench

from .plain import Plain, Tokens

Place = tuple[int, int]
#: Refusal score ablated, induced score, KL on harmless prompts, all in nats.
Scores = tuple[float, float, float]
#: What was asked to be found, in what, and what was.
Found = tuple[Find, Activations, Candidates]


@dataclass(frozen=True, eq=False)
class Case:
    """Hold a loaded model, its prompts, and plain hooks on the same model."""

    plan: Plan
    bench: Bench
    splits: PromptSplits
    plain: Plain

    def tokens(self, side: Side, split: Split) -> tuple[Tokens, ...]:
        """Return one split of one side as token ids."""
        return self.bench.tokens(self.splits.of(side, split))

    def found(self) -> Found:
        """Capture and find, as a run does."""
        recipe = self.plan.recipe
        activations = capture.capture(recipe.capture, self.splits, "means", self.bench)
        return recipe.find, activations, find.find(recipe.find, activations)

    def choice(self, found: Found, **changes: Any) -> Choice:
        """Select, with some of the recipe's selector changed."""
        selector = Causal.model_validate({**self.plan.recipe.select.model_dump(), **changes})
        return select.select(selector, found, self.splits, self.bench)

    def reference(self) -> Tensor:
        """Return the unmodified model's logits on harmless prompts, which the sweep for the KL needs once."""
        return self.plain.logits(self.tokens("harmless", "validation"))

    def sweeps(self, candidates: Candidates, places: Sequence[Place], clean: Tensor) -> dict[Place, Scores]:
        """Score candidates with plain hooks, three passes each: refusal score ablated, induced score, KL."""
        openers = torch.tensor(self.splits.openers.token_ids)
        harmful, harmless = self.tokens("harmful", "validation"), self.tokens("harmless", "validation")
        found = {}
        for place in places:
            direction = candidates.directions[place]
            ablated, added = self.plain.ablation(direction), self.plain.addition(direction, place[1])
            bypass = algebra.refusal_score(self.plain.logits(harmful, ablated), openers)
            induced = algebra.refusal_score(self.plain.logits(harmless, added), openers)
            kl = algebra.kl_nats(clean, self.plain.logits(harmless, ablated))
            found[place] = (bypass.mean().item(), induced.mean().item(), kl.mean().item())
        return found

    def ablation(self, choice: Choice) -> Intervention:
        """Return the ablation of a chosen direction, for our engine."""
        layers = self.bench.engine.n_layers
        return ablate_everywhere(Direction(choice.direction, choice.position, choice.layer, layers))


def prepare(path: Path) -> Case:
    """Load a recipe's model and settle its prompts."""
    registry = load_registry()
    plan = make_plan(load_recipe(path, registry), path.parent, registry)
    bench = Bench(load(plan.checkpoint), plan.template, Silent())
    splits = prompts.settle(plan.prompts, bench)
    pad_id = plan.checkpoint.tokenizer.pad_token_id
    return Case(plan, bench, splits, Plain(bench.engine.module, bench.engine.adapter, pad_id))
