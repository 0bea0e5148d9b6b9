"""Strategies and operations find what they say they find, and say what they cannot use."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from refusalkit import algebra
from refusalkit.arithmetic import MeanOverLayers, MinusProjection, Normalize, Scale
from refusalkit.artifacts import Activations, Candidates
from refusalkit.builtin.estimators import Lda, Leace, LogisticProbe, Pca, Som, SvdSubspace
from refusalkit.builtin.strategies import DifferenceInMeans, FalseRefusal
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import Direction
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.stages.find import find
from refusalkit.store import Store
from refusalkit.strategy import Captured, Strategy
from refusalkit.testing.laws import over_refused, planted

PlanOf = Callable[..., Plan]


def _captured(samples: Tensor) -> Captured:
    return Captured(samples.double().mean(0), len(samples), samples)


def _skewed(n: int = 2000, d: int = 24) -> tuple[Captured, Captured]:
    """Draw two sides that differ along one direction, with noise far larger along some directions than along others."""
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn((d, d), generator=generator)).Q
    mixing = axes * torch.linspace(0.3, 2.0, d)
    shift = 0.3 * torch.randn(d, generator=generator)
    draws = [torch.randn((n, 1, 1, d), generator=generator) @ mixing.T for _ in range(2)]
    return _captured(draws[0] + shift), _captured(draws[1] - shift)


# Strategies


def test_erasing_by_leace_changes_activations_least() -> None:
    harmful, harmless = _skewed()
    assert harmful.samples is not None
    assert harmless.samples is not None
    x = torch.cat([harmful.samples, harmless.samples])[:, 0, 0].double()
    covariance = torch.cov(x.T)
    difference = (harmful.mean - harmless.mean)[0, 0]

    def change(strategy: Strategy) -> float:
        """Mean square change when as much of the difference is subtracted as is read along the direction."""
        read = strategy.find(harmful, harmless)[0, 0]
        return ((read @ covariance @ read) / (read @ difference) ** 2 * difference.square().sum()).item()

    best = change(Leace())
    least = (difference.square().sum() / (difference @ torch.linalg.inv(covariance) @ difference)).item()
    assert best == pytest.approx(least, rel=0.03)
    for other in (DifferenceInMeans(), Pca(), Pca(pairing="pooled"), LogisticProbe(c=0.01)):
        assert change(other) > 1.03 * best


def test_leace_and_the_discriminant_read_the_same_direction() -> None:
    harmful, harmless = _skewed()
    directions = [kind().find(harmful, harmless)[0, 0] for kind in (Leace, Lda)]
    assert algebra.unit(directions[0]) @ algebra.unit(directions[1]) > 0.99


@pytest.mark.parametrize("shrinkage", ["auto", 0.3, 1.0, 0.0])
def test_the_discriminant_is_that_of_scikit_learn(shrinkage: Any) -> None:
    harmful, harmless = (each.samples for each in _skewed(n=60))
    assert harmful is not None
    assert harmless is not None
    x = torch.cat([harmful[:40], harmless])[:, 0, 0].double()
    labels = torch.arange(len(x)) < 40
    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), labels.numpy()).coef_[0]
    found = Lda(shrinkage=shrinkage).fit(x[labels], x[~labels])
    torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("strategy", [Som(rank=3, side=2, iterations=500), SvdSubspace(rank=3)], ids=repr)
def test_the_rows_of_a_subspace_are_removed_jointly(strategy: Strategy) -> None:
    harmful, harmless, _ = planted()
    assert harmful.samples is not None
    generator = torch.Generator().manual_seed(5)
    kinds = 4 * torch.randn((4, 48), generator=generator)
    mixed = _captured(harmful.samples + kinds[torch.arange(40) % 4][:, None, None])
    rows = strategy.find(mixed, harmless)[1, 2]
    assert rows.shape == (3, 48)
    x = torch.randn((5, 7, 48), generator=generator, dtype=torch.float64)
    left = algebra.edit(x, Direction(rows, -1, 0, 1).basis, None)
    assert (left @ algebra.unit(rows).T).abs().max() < 1e-9
    if isinstance(strategy, Som):
        # Its rows are not orthogonal, so that removing one after the other would leave some of the first.
        one_by_one = x
        for row in rows:
            one_by_one = algebra.edit(one_by_one, algebra.unit(row)[None], None)
        assert (one_by_one @ algebra.unit(rows[0])).abs().max() > 0.1


def test_false_refusal_is_the_over_refusal_direction_without_the_refusal_direction() -> None:
    harmful, harmless, refusal = planted()
    over, alone = over_refused(harmless, refusal)
    whole, half, none = (FalseRefusal(share=share).find(harmful, harmless, over) for share in (1.0, 0.5, 0.0))
    truth = algebra.unit(harmful.mean - harmless.mean)
    assert (whole * truth).sum(-1).abs().max() < 1e-9
    assert (algebra.unit(whole) @ alone).min() > 0.95
    torch.testing.assert_close(none, over.mean - harmless.mean)
    for found in (whole, half):
        torch.testing.assert_close(found.norm(dim=-1), none.norm(dim=-1))
    between = [((algebra.unit(found) * truth).sum(-1)).mean() for found in (whole, half, none)]
    assert between[0] < between[1] < between[2]


def test_harmfulness_is_read_at_the_last_token_of_the_instruction(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of("find=harmfulness")
    assert plan.prompts.positions == (-6,)
    execute(plan, tmp_path / "a", until="find")
    execute(plan_of("capture.positions=instruction_end"), tmp_path / "b", until="find")
    found = [Store(tmp_path / name).load(Candidates) for name in "ab"]
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0].directions, found[1].directions)
    with pytest.raises(InputError, match="harmfulness is read at the instruction's last token, -6"):
        plan_of("find=harmfulness", "capture.positions=post_instruction")


# Operations


def test_a_projection_that_is_subtracted_is_gone_and_subtracting_it_again_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    directions, others = (torch.randn((2, 3, 16), generator=generator, dtype=torch.float64) for _ in range(2))
    planes = torch.randn((2, 3, 2, 16), generator=generator, dtype=torch.float64)
    for span in (others, planes):
        left = algebra.minus_projection(directions, span)
        rows = span.reshape(2, 3, -1, 16)
        assert (rows @ left[..., None]).abs().max() < 1e-9
        torch.testing.assert_close(algebra.minus_projection(left, span), left)
        # The shares are linear: half of the projection twice is all of it.
        half = algebra.minus_projection(directions, span, 0.5)
        torch.testing.assert_close(2 * half - directions, left)
    assert not algebra.minus_projection(directions, 3 * directions).any()
    torch.testing.assert_close(algebra.minus_projection(directions, torch.zeros_like(directions)), directions)
    assert algebra.minus_projection(planes, others).shape == planes.shape


def test_operations_do_what_they_are_called() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn((2, 5, 16), generator=generator, dtype=torch.float64)

    def nothing(_: Strategy) -> Tensor:
        raise AssertionError

    assert Normalize().apply(directions, nothing).norm(dim=-1).allclose(torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(Scale(by=-2.0).apply(directions, nothing), -2 * directions)
    averaged = MeanOverLayers(layers=(1, 3)).apply(directions, nothing)
    for layer in (1, 2, 3):
        torch.testing.assert_close(averaged[:, layer], directions[:, 1:4].mean(1))
    assert not averaged[:, [0, 4]].any()
    other = torch.randn((2, 5, 16), generator=generator, dtype=torch.float64)
    projected = MinusProjection(onto=Pca(), share=0.5).apply(directions, lambda strategy: other)
    torch.testing.assert_close(projected, algebra.minus_projection(directions, other, 0.5))


OPERATIONS = """
find:
  strategy: false_refusal
  share: 0
  then:
    - {operation: minus_projection, onto: difference_in_means}
    - normalize
    - {operation: scale, by: 3}
"""


def test_false_refusal_can_be_spelt_out_in_operations(recipe_file: Path, registry: Registry) -> None:
    harmful, harmless, refusal = planted()
    over, _ = over_refused(harmless, refusal)
    means = {f"{side}_mean": each.mean for side, each in (("harmful", harmful), ("harmless", harmless))}
    activations = Activations(
        site="resid_pre",
        positions=(-2, -1),
        n_harmful=40,
        n_harmless=40,
        over_refusal_mean=over.mean,
        n_over_refusal=40,
        **means,
    )
    recipe_file.write_text(recipe_file.read_text(encoding="utf-8") + OPERATIONS, encoding="utf-8")
    section = load_recipe(recipe_file, registry).find
    found = find(section, activations)
    assert found.strategy == "false_refusal, then minus_projection onto difference_in_means, normalize, scale by 3"
    direct = FalseRefusal().find(harmful, harmless, over)
    torch.testing.assert_close(found.directions, 3 * algebra.unit(direct))
    # Both are at a right angle to the difference in means, which is what the report says of them.
    assert found.cosines is not None
    assert found.cosines.abs().max() < 1e-9
    assert found.repairs


def test_an_operation_that_leaves_nothing_stops_the_run(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of("find.then=[{operation: minus_projection, onto: difference_in_means}]")
    with pytest.raises(RunError, match="leaves nothing of any direction"):
        execute(plan, tmp_path / "run", until="find")


def test_operations_and_the_strategies_they_name_are_in_the_key_of_find_alone(plan_of: PlanOf) -> None:
    plain = plan_of().keys
    assert plan_of("find.then=[]").keys == plain
    changed = [
        plan_of(f"find.then={value}").keys
        for value in (
            "[normalize]",
            "[{operation: scale, by: 2}]",
            "[{operation: minus_projection, onto: random}]",
            "[{operation: minus_projection, onto: {strategy: random, seed: 1}}]",
        )
    ]
    assert len({keys["find"] for keys in (plain, *changed)}) == 5
    assert all(keys["capture"] == plain["capture"] for keys in changed)
    # What an operation needs of capture is kept.
    samples = plan_of("find.then=[{operation: minus_projection, onto: pca}]")
    assert (samples.needs, samples.key("capture")) == ("samples", plan_of("find=pca").key("capture"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("[scal]", "no operation is called 'scal'"),
        ("[scale]", "'by' is missing"),
        ("[{operation: scale, by: 0}]", "0 leaves no direction"),
        ("[{operation: scale, bye: 2}]", "unknown key 'bye'"),
        ("[{operation: minus_projection, onto: pcca}]", "no strategy is called 'pcca'"),
        ("[{operation: minus_projection, onto: {strategy: pca, then: [normalize]}}]", "unknown key 'then'"),
        ("[{operation: minus_projection, onto: harmfulness}]", "harmfulness is read at the instruction's last token"),
        ("[{operation: minus_projection, onto: false_refusal}]", "false_refusal works on safe prompts"),
        ("[{operation: mean_over_layers, layers: [3, 2]}]", "write the lower number first"),
        ("[{operation: mean_over_layers, layers: [3, 8]}]", "layer 8 of 8"),
        ("normalize", "should be a list, not 'normalize'"),
    ],
)
def test_a_wrong_operation_is_an_error_that_says_what_is_wrong(plan_of: PlanOf, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        plan_of(f"find.then={setting}")


# Files


def test_the_directions_of_a_run_come_back_from_its_files(finished_run: Path, plan_of: PlanOf, tmp_path: Path) -> None:
    before = Store(finished_run).load(Candidates)
    assert before is not None
    chosen = json.loads((finished_run / "summary.json").read_text(encoding="utf-8"))["choice"]
    for number, name in enumerate(("candidates", "direction")):
        shutil.copy(finished_run / f"{name}.safetensors", tmp_path)
        execute(plan_of("find.strategy=from_file", f"find.path={name}.safetensors"), tmp_path / name, until="find")
        found = Store(tmp_path / name).load(Candidates)
        assert found is not None
        if number == 0:
            assert torch.equal(found.directions, before.directions)
            continue
        place = before.positions.index(chosen["position"]), chosen["layer"]
        assert torch.equal(found.directions[place], before.directions[place])
        assert found.directions.any(-1).sum() == 1


def test_a_file_decides_by_its_content_and_not_by_its_name(plan_of: PlanOf, tmp_path: Path) -> None:
    def key(name: str, scale: float) -> str:
        save_file({"v": scale * torch.ones(128)}, tmp_path / name)
        return plan_of("find.strategy=from_file", f"find.path={name}").keys["find"]

    assert key("a.safetensors", 1.0) == key("b.safetensors", 1.0) != key("c.safetensors", 2.0)


@pytest.mark.parametrize(
    ("shape", "places"),
    [((128,), [(4, layer) for layer in range(8)]), ((8, 128), [(4, layer) for layer in range(8)])],
    ids=str,
)
def test_a_tensor_without_positions_belongs_to_the_last_one(
    shape: tuple[int, ...], places: list[tuple[int, int]], plan_of: PlanOf, tmp_path: Path
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file({"refusal": values}, tmp_path / "plain.safetensors")
    strategy = plan_of("find.strategy=from_file", "find.path=plain.safetensors").find
    empty = Captured(torch.zeros(5, 8, 128, dtype=torch.float64), 1)
    found = strategy.find(empty, empty)
    assert [tuple(place) for place in found.any(-1).nonzero().tolist()] == places
    torch.testing.assert_close(found[4], values.double().expand(8, 128))


FAULTS: list[tuple[dict[str, Any], dict[str, str], str, str]] = [
    (
        {"v": (96,)},
        {"model": "other/model"},
        "directions of other/model have 96 numbers, and d_model is 128",
        "d_model",
    ),
    ({"v": (9, 128)}, {}, "9 layers, and this model has 8", "behind the last block"),
    ({"v": (7, 128)}, {}, "7 layers, and this model has 8", r"\[layer, d_model\]"),
    ({"v": (3, 8, 128)}, {}, "3 positions, and captured are -5, -4, -3, -2, -1", "capture.positions"),
    ({"v": (1, 1, 1, 8, 128)}, {}, r"has shape \[1, 1, 1, 8, 128\]", "directions are"),
    (
        {"v": (128,)},
        {"site": "resid_post"},
        "read at resid_post, and the recipe reads at resid_pre",
        "site: resid_post",
    ),
    ({"v": (128,)}, {"layer_convention": "layer l is an output"}, "numbers layers in another way", "shift"),
    ({"v": (128,)}, {"position": "-9", "layer": "3"}, "found at -9, and captured is -5", r"positions: \[-9\]"),
    ({"v": (128,)}, {"position": "-1", "layer": "30"}, "found in layer 30, and this model has 8", "another model"),
    ({"a": (128,), "b": (128,)}, {}, "holds 2 tensors", "tensor:.*a, b"),
]


@pytest.mark.parametrize(("tensors", "metadata", "message", "hint"), FAULTS, ids=[fault[2] for fault in FAULTS])
def test_a_file_that_does_not_fit_says_how(
    tensors: dict[str, Any], metadata: dict[str, str], message: str, hint: str, plan_of: PlanOf, tmp_path: Path
) -> None:
    made = {name: torch.ones(shape) for name, shape in tensors.items()}
    save_file(made, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=message) as caught:
        plan_of("find.strategy=from_file", "find.path=bad.safetensors")
    assert "bad.safetensors" in str(caught.value.where)
    assert caught.value.hint is not None
    assert re.search(hint, caught.value.hint)


def test_a_file_that_holds_no_tensors_says_so(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not tensors", encoding="utf-8")
    save_file({"v": torch.ones(128, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    for path, message in (
        ("missing.safetensors", "no such file"),
        ("text.safetensors", "is not a safetensors file"),
        ("whole.safetensors", "holds I64, not floating-point numbers"),
        (".", "cannot be read: Is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            plan_of("find.strategy=from_file", f"find.path={path}")
    with pytest.raises(InputError, match="holds no tensor 'w'"):
        plan_of("find.strategy=from_file", "find.path=whole.safetensors", "find.tensor=w")


def test_the_resolved_recipe_of_a_run_with_operations_reads_back(
    recipe_file: Path, registry: Registry, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, registry, ["find.then=[{operation: minus_projection, onto: random}, normalize]"])
    execute(make_plan(recipe, tmp_path, registry), tmp_path / "run", until="find")
    again = load_recipe(tmp_path / "run" / "recipe.yaml", registry)
    assert again.model_dump() == recipe.model_dump()
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))["find"]["then"]
