"""What is trained on a tiny model that refuses does what the method claims, and a random direction does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import refusalkit_rdo
import torch
from refusalkit_rdo import Cone, Rdo, RdoIndependent, RefusalCone
from refusalkit_rdo.objective import Independence, Objective
from refusalkit_rdo.place import Place, best_place
from refusalkit_rdo.strategies import Trained
from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import Activations, PromptSplits
from refusalkit.errors import RunError
from refusalkit.pipeline import Runner
from refusalkit.plan import make_plan
from refusalkit.progress import Silent
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.selector import Measure, SelectInputs
from refusalkit.sharing import Sharing
from refusalkit.stages import capture, prompts
from refusalkit.stages.bench import Bench
from refusalkit.stages.find import model_inputs
from refusalkit.strategy import ModelInputs

RECIPE = """\
name: trained
model: {id: tiny:llama}
prompts: {harmful: tiny:harmful, harmless: tiny:harmless, train: 24, validation: 12, test: 8}
find: rdo
select: cone
"""
#: Sized for a test: small batches, large steps, and a retain weight that leaves room at this size of model.
QUICK: dict[str, Any] = {
    "steps": 40,
    "batch_size": 8,
    "learning_rate": 0.03,
    "patience": 40,
    "retain_weight": 0.1,
    "layer": 5,
    "position": -1,
}


@dataclass
class Ground:
    """Hold a tiny model with its prompts and activations, and what was trained on it."""

    bench: Bench
    splits: PromptSplits
    activations: Activations
    known: dict[Trained, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> ModelInputs:
        return model_inputs(self.activations, self.splits, self.bench)

    def trained(self, strategy: Trained) -> Tensor:
        """Return what a strategy finds at the one place where it finds anything: [rank, d_model]."""
        if strategy not in self.known:
            sides = self.activations.captured
            directions = strategy.find(sides["harmful"], sides["harmless"], self.model)
            place = self.place
            assert directions.flatten(2).any(-1).nonzero().tolist() == [[place.row, place.layer]]
            self.known[strategy] = directions[place.row, place.layer].reshape(-1, directions.shape[-1])
        return self.known[strategy]

    @property
    def place(self) -> Place:
        return Place(len(self.activations.positions) - 1, 5, -1, self.activations.harmful_mean.shape[1], "resid_pre")

    @property
    def difference(self) -> Tensor:
        return (self.activations.harmful_mean - self.activations.harmless_mean)[-1, 5]

    def bypass(self, rows: Tensor) -> Tensor:
        """Return the mean refusal score of harmful validation prompts with each direction ablated: [direction]."""
        edits = [self.place.ablation(row.float()) for row in rows]
        tokens = self.bench.tokens(self.splits.of("harmful", "validation"))
        return self.bench.engine.measure(tokens, edits, self.openers).mean(1)

    def induced(self, rows: Tensor) -> Tensor:
        """Return the mean refusal score of harmless validation prompts with each direction added: [direction]."""
        edits = [self.place.addition(row.float()) for row in rows]
        tokens = self.bench.tokens(self.splits.of("harmless", "validation"))
        return self.bench.engine.measure(tokens, edits, self.openers).mean(1)

    @property
    def openers(self) -> Measure:
        return Measure("refusal_score", token_ids=self.splits.openers.token_ids)

    def objective(self, strategy: Trained) -> Objective:
        return Objective.at(self.place, self.difference, strategy, self.model)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    (folder / "trained.yaml").write_text(RECIPE, encoding="utf-8")
    registry = load_registry([refusalkit_rdo], entry_points=False)
    plan = make_plan(load_recipe(folder / "trained.yaml", registry), folder, registry)
    bench = Runner(plan, folder / "run", Silent(), Sharing()).bench()
    splits = prompts.settle(plan.prompts, bench)
    return Ground(bench, splits, capture.capture(plan.recipe.capture, splits, "means", bench))


def random_rows(ground: Ground, n: int) -> Tensor:
    """Draw directions as long as the difference in means."""
    draw = torch.randn((n, len(ground.difference)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return algebra.unit(draw) * ground.difference.norm()


def test_a_trained_direction_bypasses_and_induces_refusal_and_random_ones_do_neither(ground: Ground) -> None:
    rows = ground.trained(Rdo(**QUICK))
    controls = random_rows(ground, 4)
    assert rows.norm().item() == pytest.approx(ground.difference.norm().item())
    assert ground.bypass(rows).item() < 0 < ground.bypass(controls).min().item()
    assert ground.induced(rows).item() > 0 > ground.induced(controls).max().item()
    objective = ground.objective(Rdo(**QUICK))
    with torch.no_grad():
        everything = range(objective.n_prompts)
        found = objective.loss(algebra.unit(rows), everything)
        assert found < 0.5 * objective.loss(algebra.unit(controls), everything)
        # It costs harmless prompts less than the direction it was taught by.
        assert found < objective.loss(ground.difference[None], everything)


def test_directions_trained_one_after_another_are_orthogonal_to_what_they_must_be(ground: Ground) -> None:
    rows = ground.trained(Rdo(rank=2, orthogonal_to="difference_in_means", **QUICK))
    units = algebra.unit(torch.cat([rows, ground.difference[None]]))
    assert (units @ units.T - torch.eye(3)).abs().max() < 1e-6
    assert ground.bypass(rows[:1]).item() < ground.bypass(random_rows(ground, 4)).min().item() - 1


def test_a_direction_trained_to_be_independent_is_more_so_than_one_that_is_not(ground: Ground) -> None:
    plain, independent = ground.trained(Rdo(**QUICK)), ground.trained(RdoIndependent(**QUICK))
    objective = ground.objective(RdoIndependent(**QUICK))
    independence = Independence(objective, [objective.difference])
    with torch.no_grad():
        everything = range(objective.n_prompts)
        before, after = (independence.loss(algebra.unit(rows[0]), everything) for rows in (plain, independent))
        own = independence.loss(objective.difference, everything)
    assert after < 0.5 * before < own


def test_a_loss_of_independence_is_the_change_of_cosines_and_has_its_gradient(ground: Ground) -> None:
    objective = ground.objective(Rdo(**{**QUICK, "target_tokens": 2}))
    independence = Independence(objective, [objective.difference])
    direction = algebra.unit(random_rows(ground, 1)[0]).requires_grad_()
    some = [0, 3]
    found = independence.loss(direction, some)
    found.backward()  # type: ignore[no-untyped-call]
    subject, place = objective.subject, objective.place
    tokens = [objective.targets.harmful[index] for index in some]
    with torch.no_grad():
        plain = subject.states(tokens)
        ablated = [subject.states(tokens, place.ablation(vector)) for vector in (direction, objective.difference)]
        expected = sum(
            (
                torch.cosine_similarity(states.double(), other, dim=-1)
                - torch.cosine_similarity(plain.double(), other, dim=-1)
            )[:, :7]
            .square()
            .mean()
            for states, other in zip(ablated, (objective.difference, direction), strict=True)
        )
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-4)
        towards = algebra.unit(random_rows(ground, 2)[1])
        ahead, behind = (independence.loss(direction + step * towards, some) for step in (1e-2, -1e-2))
        assert direction.grad is not None
        assert (direction.grad @ towards).item() == pytest.approx(((ahead - behind) / 2e-2).item(), rel=0.05, abs=1e-5)


def test_a_part_of_a_cone_bypasses_refusal_and_nothing_of_a_random_one_does(ground: Ground) -> None:
    rows = ground.trained(RefusalCone(rank=2, **QUICK))
    units = rows / ground.difference.norm()
    torch.testing.assert_close(units @ units.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    shares = [_cone(ground, basis)["cone_bypassed_share"] for basis in (rows, random_rows(ground, 2))]
    print(f"share of the cone that bypasses refusal: {shares[0]:.0%}; of a random cone: {shares[1]:.0%}")
    assert shares[0] >= 0.25
    assert shares[1] == 0


def _cone(ground: Ground, rows: Tensor) -> dict[str, float]:
    directions = torch.zeros((*ground.activations.harmful_mean.shape[:2], *rows.shape), dtype=torch.float64)
    directions[-1, 5] = rows
    harmful, harmless = (ground.bench.tokens(ground.splits.of(side, "validation")) for side in ("harmful", "harmless"))  # type: ignore[arg-type]
    inputs = SelectInputs(
        directions, ground.activations.positions, "resid_pre", harmful, harmless, ground.splits.openers.token_ids
    )
    selection = Cone(samples=128).select(inputs, ground.bench.engine)
    return next(score.extra for score in selection.scores if score.status == "chosen")


def test_the_same_seed_finds_the_same_and_another_something_else(ground: Ground) -> None:
    few = {**QUICK, "steps": 3}
    for kind in (Rdo, RdoIndependent, RefusalCone):
        first, second, other = (ground.trained(kind(**few, seed=seed)) for seed in (0, 0, 1))
        assert torch.equal(first, second)
        assert (algebra.unit(first) * algebra.unit(other)).sum(-1).abs().max() < 0.9


def test_training_takes_the_place_where_the_difference_in_means_moves_refusal_most(ground: Ground) -> None:
    means = ground.activations.harmful_mean - ground.activations.harmless_mean
    assert best_place(means, ground.model, None, None) == ground.place
    assert best_place(means, ground.model, 3, None).layer == 3
    assert best_place(means, ground.model, None, -2).position == -2
    with pytest.raises(RunError, match="do not differ at any place"):
        best_place(means, ground.model, 0, -2)


def test_targets_are_what_the_difference_in_means_makes_the_model_say(ground: Ground) -> None:
    targets = ground.objective(Rdo(**QUICK)).targets
    text = ground.bench.template.tokenizer.decode
    assert len(targets.harmful) == len(targets.harmless) == len(targets.answers) == len(targets.retained)
    assert max(map(len, targets.answers)) <= 30
    assert max(map(len, targets.retained)) <= 29
    refused = [text(tokens) for tokens in targets.refusals]
    assert sum("sorry" in words or "cannot" in words or "can't" in words for words in refused) > len(refused) / 2
    assert not any("." in words for words in refused)
