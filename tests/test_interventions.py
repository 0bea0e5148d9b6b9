"""Edits reach the tokens, decode steps and prompts they name, and no others, however the engine runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import Evaluation, PromptSplits
from refusalkit.builtin.adapters import LLAMA
from refusalkit.builtin.components import Affine, Angular, Clamp, MeanAblate
from refusalkit.builtin.compositions import Combine, Conditional
from refusalkit.builtin.interventions import Ablate, Steer
from refusalkit.engine import blocks
from refusalkit.engine.batch import batch
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.engine.lower import lower, place
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import Direction, Edit, Gate, Intervention, InterventionSpec, Place
from refusalkit.metric import SIDES
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.progress import Silent
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.selector import Measure
from refusalkit.stages.bench import Bench
from refusalkit.stages.states import states_at, states_everywhere
from refusalkit.store import Store
from refusalkit.testing import random_engine
from refusalkit.testing.models import random_prompts
from tests.conftest import ROOT

PROMPTS = random_prompts(7)
SPANS = [(None, None), (None, 0), (1, None), (0, None), (0, 0), (2, 3), (None, 2)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    engine.module.generation_config.eos_token_id = -1
    return engine


def _vectors(n: int, d_model: int) -> Tensor:
    return torch.linalg.qr(torch.randn((d_model, n), generator=torch.Generator().manual_seed(0))).Q.T.contiguous()


def _everything(engine: Engine, tokens: tuple[int | None, int | None], *, gated: bool = False) -> Intervention:
    """Combine every part of an edit at several places, with a gate that some of the prompts pass."""
    one, two, three = _vectors(3, engine.d_model)
    edits = (
        Edit("resid_pre", 1, add=5 * one, tokens=tokens, gated=gated),
        Edit("mlp_out", 2, remove=two[None], add=two, tokens=tokens),
        Edit("resid_pre", 3, remove=torch.stack([one, three]), turn=three, along=one, tokens=tokens, gated=gated),
    )
    return Intervention(edits, gate=_gate(engine) if gated else None)


def _gate(engine: Engine) -> Gate:
    vector = _vectors(3, engine.d_model)[2]
    read = engine.capture(PROMPTS, (-2,), keep_samples=True).samples
    assert read is not None
    lower, upper = (read[:, 0, 1] @ vector).sort().values[[2, 3]].tolist()
    return Gate("resid_pre", 1, -2, vector, (lower + upper) / 2)


def _changed(state: Tensor, edit: Edit, length: int) -> Tensor:
    """Change the state [1, position, d_model] of a prompt of `length` tokens and what follows it, token by token."""
    first, last = edit.tokens
    result = state.clone()
    for column, x in enumerate(state[0]):
        at = column - (length - 1)
        if (first is not None and at < first) or (last is not None and at > last):
            continue
        if edit.along is not None and not x @ edit.along > 0:
            continue
        part = torch.zeros_like(x) if edit.remove is None else edit.remove.T @ (edit.remove @ x)
        turned = 0 if edit.turn is None else part.norm() * edit.turn
        result[0, column] = x - part + turned + (0 if edit.add is None else edit.add)
    return result


@contextmanager
def _hooked(engine: Engine, intervention: Intervention, length: int) -> Iterator[None]:
    """Intervene with plain hooks on one prompt of `length` tokens and what follows it, without padding or a cache."""
    opened: list[bool] = []
    handles = []

    def hook(edit: Edit) -> None:
        def on(state: Tensor) -> Tensor:
            return state if edit.gated and not opened[-1] else _changed(state, edit, length)

        path, at_input = place(engine.layout, edit.site, edit.layer)
        module = engine.module.get_submodule(path)
        if at_input:
            handles.append(module.register_forward_pre_hook(lambda _, args: (on(args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output: on(output)))

    if (gate := intervention.gate) is not None:

        def read(_: Any, args: Any) -> None:
            opened.append(bool(args[0][0, length + gate.position] @ gate.vector >= gate.threshold))

        block = engine.module.get_submodule(place(engine.layout, gate.site, gate.layer)[0])
        handles.append(block.register_forward_pre_hook(read))
    for edit in intervention.edits:
        hook(edit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _logits(engine: Engine, intervention: Intervention, prompt: Sequence[int], rest: Sequence[int] = ()) -> Tensor:
    with _hooked(engine, intervention, len(prompt)):
        logits: Tensor = engine.module(torch.tensor([[*prompt, *rest]])).logits[0]
    return logits


@pytest.mark.parametrize("gated", [False, True], ids=["always", "gated"])
@pytest.mark.parametrize("tokens", SPANS, ids=str)
def test_a_window_and_a_gate_reach_what_plain_hooks_reach(
    engine: Engine, tokens: tuple[int | None, int | None], gated: bool
) -> None:
    intervention = _everything(engine, tokens, gated=gated)
    found = engine.logits(PROMPTS, intervention)
    expected = torch.stack([_logits(engine, intervention, prompt)[-1] for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    completions = engine.generate(PROMPTS, intervention, max_new_tokens=5)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        written: list[int] = []
        for _ in range(5):
            written.append(int(_logits(engine, intervention, prompt, written)[-1].argmax()))
        assert completion == tuple(written)
    # Of several lengths, so that rows end at different columns.
    cut = [completion[: index % 5 + 1] for index, completion in enumerate(completions)]
    losses, _ = engine.losses(PROMPTS, cut, intervention)
    for prompt, completion, loss in zip(PROMPTS, cut, losses, strict=True):
        logits = _logits(engine, intervention, prompt, completion)[len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(completion), reduction="sum")
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gated", [False, True], ids=["always", "gated"])
@pytest.mark.parametrize("tokens", SPANS, ids=str)
def test_windows_and_gates_do_not_depend_on_batches_packs_or_the_shared_front(
    engine: Engine, tokens: tuple[int | None, int | None], gated: bool
) -> None:
    intervention = _everything(engine, tokens, gated=gated)
    other = Intervention(
        tuple(Edit(edit.site, edit.layer, **_parts(edit, -2.0)) for edit in intervention.edits),
        gate=intervention.gate
        and Gate("resid_pre", 1, -2, -intervention.gate.vector, -intervention.gate.threshold + 0.1),
    )
    results = []
    for size, shares in ((32, True), (3, True), (1, True), (32, False), (2, False)):
        engine.batch_size, engine.shares_prefix = size, shares
        results.append(engine.measure(PROMPTS, [intervention, other], Measure("refusal_score", token_ids=(5,))))
    engine.batch_size, engine.shares_prefix = 32, True
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-4, rtol=1e-4)
    assert not torch.equal(results[0][0], results[0][1]) or tokens[0] in (1, 2)


def _parts(edit: Edit, scale: float) -> dict[str, Any]:
    return {
        "remove": edit.remove,
        "add": None if edit.add is None else scale * edit.add,
        "turn": edit.turn,
        "along": edit.along,
        "tokens": edit.tokens,
        "gated": edit.gated,
    }


def test_prompts_that_the_gate_turns_away_keep_every_bit(engine: Engine) -> None:
    intervention = _everything(engine, (None, None), gated=True)
    gated = Intervention(tuple(edit for edit in intervention.edits if edit.gated), gate=intervention.gate)
    found = engine.logits(PROMPTS, gated)
    read = engine.capture(PROMPTS, (-2,), keep_samples=True).samples
    assert read is not None
    assert gated.gate is not None
    opened = read[:, 0, 1] @ gated.gate.vector >= gated.gate.threshold
    assert 0 < opened.sum() < len(PROMPTS)
    # Without a shared front, which a gate switches off, the baseline is the same computation.
    engine.shares_prefix = False
    plain = engine.logits(PROMPTS)
    engine.shares_prefix = True
    assert torch.equal(found[~opened], plain[~opened])
    assert not (found[opened] == plain[opened]).all(-1).any()


@pytest.mark.parametrize(
    "spec",
    [
        Ablate(layers=(1, 2), where="generated"),
        Steer(where="last", steps=(0, 2)),
        Affine(alpha=1.0),
        MeanAblate(where="prompt"),
        Clamp(value=2.0),
        Angular(degrees=180, adaptive=True),
        Conditional(apply=Combine(parts=(Clamp(), Steer()))),
        Combine(parts=(MeanAblate(), Steer(scale=2.0))),
    ],
    ids=lambda spec: spec.label,
)
def test_a_remote_dry_run_of_every_intervention_gives_the_same_bits(engine: Engine, spec: InterventionSpec) -> None:
    nnsight.register("refusalkit")
    group = batch(PROMPTS, range(len(PROMPTS)), 0, 0, torch.device("cpu"))
    program = lower([spec.build(_direction(engine))], engine.layout, len(PROMPTS), torch.device("cpu"))
    inputs = group.repeated(1)
    here, there = (
        blocks.last_logits(engine.model, inputs, program, options, ((), None)) for options in ({}, {"remote": "local"})
    )
    assert torch.equal(here, there)
    del inputs["position_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    here, there = (
        blocks.generate(engine.model, inputs, program, {**options, **where}) for where in ({}, {"remote": "local"})
    )
    assert torch.equal(here, there)


# What a recipe's choices come to


def _direction(engine: Engine) -> Direction:
    harmful, harmless, vector = torch.randn((3, 4, engine.d_model), generator=torch.Generator().manual_seed(2))
    samples = {"harmful": _prompts_about(harmful), "harmless": _prompts_about(harmless)}

    def states(side: str, split: str, place: Place) -> torch.Tensor:
        assert split == "train"
        return samples[side][:, place.layer]

    return Direction(vector[0], -1, 2, engine.n_layers, harmless=harmless, harmful=harmful, states=states)


def _prompts_about(mean: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """Draw prompts [prompt, layer, d_model] float64 whose mean is `mean` [layer, d_model]."""
    drawn = torch.randn((100, *mean.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + 2 * (drawn - drawn.mean(0))


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, (None, None)),
        ({"where": "prompt"}, (None, 0)),
        ({"where": "generated"}, (1, None)),
        ({"where": "last"}, (0, None)),
        ({"where": "last", "steps": (0, 0)}, (0, 0)),
        ({"steps": (0, 2)}, (None, 2)),
        ({"steps": (2, None)}, (2, None)),
        ({"where": "generated", "steps": (0, 5)}, (1, 5)),
    ],
    ids=str,
)
def test_tokens_and_steps_become_one_span(options: dict[str, Any], tokens: tuple[int | None, int | None]) -> None:
    spec = Steer(**options)
    assert spec.tokens == tokens
    direction = Direction(torch.ones(4), -1, 1, 3)
    assert [edit.tokens for edit in spec.build(direction).edits] == [tokens]


def test_layers_are_those_asked_for_or_those_the_intervention_is_about() -> None:
    direction = Direction(torch.ones(4), -1, 1, 3, harmless=torch.ones(3, 4), harmful=torch.eye(4)[:3])
    for spec, layers in (
        (Steer(), [1]),
        (Steer(layers=(0, 2)), [0, 1, 2]),
        (MeanAblate(), [0, 1, 2]),
        (Angular(layers=(2, 2)), [2]),
    ):
        assert [edit.layer for edit in spec.build(direction).edits] == layers
    with pytest.raises(InputError, match="layer 3 of 3"):
        Steer(layers=(0, 3)).build(direction)
    with pytest.raises(InputError, match="layer 7 of 3"):
        Conditional(layer=7).check(3)


def test_angular_steering_keeps_the_length_in_the_plane_and_sets_its_angle(engine: Engine) -> None:
    direction = _direction(engine)
    x = torch.randn((3, 5, engine.d_model), generator=torch.Generator().manual_seed(1))
    for degrees in (0.0, 60.0, 180.0, 250.0):
        edit = Angular(degrees=degrees).build(direction).edits[0]
        assert edit.remove is not None
        plane = edit.remove.float()
        assert torch.allclose(plane[0], algebra.unit(direction.vector), atol=1e-6)
        once = algebra.edit(x, edit.remove, turn=edit.turn)
        before, after = x @ plane.T, once @ plane.T
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), atol=1e-5, rtol=1e-5)
        heading = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
        torch.testing.assert_close(algebra.unit(after), heading.expand_as(after), atol=1e-4, rtol=0)
        torch.testing.assert_close(once - after @ plane, x - before @ plane, atol=1e-5, rtol=0)
        adaptive = algebra.edit(x, edit.remove, turn=edit.turn, along=plane[0])
        ahead = before[..., 0] > 0
        assert torch.equal(adaptive[~ahead], x[~ahead])
        assert torch.equal(adaptive[ahead], once[ahead])


def test_a_plane_needs_layers_whose_differences_differ() -> None:
    same = torch.eye(4)[:1].expand(3, 4)
    with pytest.raises(RunError, match="point the same way"):
        Angular().build(Direction(torch.eye(4)[1], -1, 1, 3, harmless=0 * same, harmful=same))


def test_the_gate_stands_where_the_threshold_says_and_faces_the_side_it_is_for(engine: Engine) -> None:
    direction = _direction(engine)
    assert direction.states is not None
    for layer in (None, 1):
        place = replace(direction.place, layer=direction.layer if layer is None else layer)
        harmful, harmless = (direction.states(side, "train", place) for side in ("harmful", "harmless"))
        for threshold in (0.0, 0.3, 1.0):
            options: dict[str, Any] = {"apply": Steer(layers=(3, 3)), "layer": layer, "threshold": threshold}
            for when, opens, shuts in (("harmful", harmful, harmless), ("harmless", harmless, harmful)):
                gate = Conditional(**options, when=when).build(direction).gate
                assert gate is not None
                assert (gate.site, gate.layer, gate.position) == (place.site, place.layer, place.position)
                assert gate.vector.norm() == pytest.approx(1)
                low, high = float((shuts @ gate.vector).mean()), float((opens @ gate.vector).mean())
                assert low < high
                assert gate.threshold == pytest.approx(low + threshold * (high - low))


@pytest.mark.parametrize(("share", "most"), [(0.01, 1), (0.1, 10), (0.5, 50)])
def test_a_gate_opens_for_no_more_harmless_prompts_than_it_may(engine: Engine, share: float, most: int) -> None:
    direction = _direction(engine)
    assert direction.states is not None
    harmful, harmless = (direction.states(side, "train", direction.place) for side in ("harmful", "harmless"))
    gate = Conditional(apply=Steer(layers=(3, 3)), false_positives=share).build(direction).gate
    assert gate is not None
    low, high = (float((side @ gate.vector).mean()) for side in (harmless, harmful))
    stands = (gate.threshold - low) / (high - low)
    readings = []
    for fold in range(5):
        rest = harmless[torch.arange(100) % 5 != fold]
        rows = torch.cat([rest, harmful]).numpy()
        probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        along = torch.tensor(probe.fit(rows, [0] * 80 + [1] * 100).coef_[0])
        out = harmless[fold::5] @ along
        readings += ((out - (rest @ along).mean()) / ((harmful @ along).mean() - (rest @ along).mean())).tolist()
    ranked = sorted(readings, reverse=True)
    # It turns away all but so many, and no more than it has to.
    assert sum(reading >= stands for reading in readings) == most
    assert stands == pytest.approx(ranked[most], abs=1e-3)


@pytest.mark.parametrize("layer", [None, 1])
def test_a_gate_for_over_refused_prompts_tells_them_from_harmful_ones(layer: int | None, engine: Engine) -> None:
    generator = torch.Generator().manual_seed(4)
    # One coordinate tells the sides apart; along the next one, where they differ too, prompts vary too much to tell.
    means = {"over_refusal": torch.zeros(engine.d_model), "harmful": torch.zeros(engine.d_model)}
    means["over_refusal"][:2] = torch.tensor([1.0, 3.0])
    spread = torch.ones(engine.d_model)
    spread[:2] = torch.tensor([0.2, 30.0])

    direction = _direction(engine)
    where = replace(direction.place, layer=direction.layer if layer is None else layer)

    def read(side: str, split: str, place: Place) -> torch.Tensor:
        assert place == where
        return (means[side] + spread * torch.randn((200, engine.d_model), generator=generator)).double()

    direction = replace(direction, states=read)
    options: dict[str, Any] = {"apply": Steer(layers=(3, 3)), "when": "over_refusal", "layer": layer}
    gate = Conditional(**options, false_positives=0.02).build(direction).gate
    assert gate is not None
    # Not along the direction, and not along the difference in means.
    assert gate.vector[0] > 0.95
    opened = {
        side: float((read(side, "test", where) @ gate.vector >= gate.threshold).double().mean()) for side in means
    }
    assert opened["harmful"] < 0.06
    assert opened["over_refusal"] > 0.9
    middle = Conditional(**options).build(direction).gate
    assert middle is not None
    assert middle.threshold == pytest.approx(0.5, abs=0.3)
    assert Conditional(**options).sides == {"over_refusal"}


def test_a_gate_has_one_threshold() -> None:
    with pytest.raises(ValueError, match="false_positives"):
        Conditional(apply=Steer(layers=(3, 3)), false_positives=0.1, threshold=0.5)


def test_a_gate_needs_a_layer_in_which_the_two_sides_differ(engine: Engine) -> None:
    direction = _direction(engine)
    assert direction.states is not None
    read = direction.states

    def alike_in_layer_0(side: Any, split: Any, place: Place) -> torch.Tensor:
        return read("harmful" if place.layer == 0 else side, split, place)

    direction = replace(direction, states=alike_in_layer_0)
    assert Conditional().build(direction).gate
    with pytest.raises(RunError, match="harmful and harmless training prompts do not differ at position -1, layer 0"):
        Conditional(layer=0).build(direction)


def test_a_control_waits_for_the_same_gate(engine: Engine) -> None:
    direction = _direction(engine)
    control = replace(direction, vector=torch.ones(engine.d_model))
    gates = [Conditional().build(each) for each in (direction, control)]
    assert gates[0].gate is not None
    assert gates[1].gate is not None
    assert torch.equal(gates[0].gate.vector, gates[1].gate.vector)
    assert gates[0].gate.threshold == gates[1].gate.threshold
    assert not torch.equal(gates[0].edits[0].add, gates[1].edits[0].add)  # type: ignore[arg-type]


def test_a_gate_learns_from_training_prompts_at_its_place_and_the_plan_counts_them(
    finished_run: Path, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_of("evaluate.interventions=[conditional]")
    assert "32 of training prompts" in describe(plan, tmp_path)
    assert "of training prompts" not in describe(plan_of("evaluate.interventions=[steer]"), tmp_path)
    splits = Store(finished_run).load(PromptSplits)
    assert splits is not None
    bench = Bench(load(plan.checkpoint), plan.template, Silent())
    at, everywhere = states_at(splits, bench), states_everywhere(splits, bench, "resid_pre", (-2, -1))
    for where in (Place("resid_pre", 3, -1), Place("resid_pre", 7, -2)):
        for side in SIDES[:2]:
            torch.testing.assert_close(at(side, "train", where), everywhere(side, "train", where))


def test_a_combination_applies_its_parts_in_order(engine: Engine) -> None:
    direction = _direction(engine)
    there, back = (
        engine.logits(PROMPTS, Combine(parts=parts).build(direction))
        for parts in ((Clamp(), Steer(layers=(2, 3))), (Steer(layers=(2, 3)), Clamp()))
    )
    assert not torch.allclose(there, back, atol=1e-3)
    clamp, steer = (spec.build(direction).edits for spec in (Clamp(), Steer(layers=(2, 3))))
    assert torch.equal(there, engine.logits(PROMPTS, Intervention((*clamp, *steer))))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Combine(parts=(Steer(), Ablate())), "steer does nothing: what follows overwrites it"),
        (Combine(parts=(Affine(), Clamp())), "affine does nothing"),
        (Combine(parts=(Steer(where="prompt"), Clamp(where="prompt"))), "steer(where=prompt) does nothing"),
        (Combine(parts=(Ablate(), Conditional())), "ablate changes in layer 0 what the gate reads in layer 2"),
        (Conditional(apply=Steer(layers=(1, 3))), "steer(layers=[1, 3]) acts in layer 1, before the gate"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label,
)
def test_what_cannot_go_together_is_an_error(engine: Engine, spec: InterventionSpec, message: str) -> None:
    with pytest.raises(InputError) as caught:
        spec.build(_direction(engine))
    assert message in caught.value.message
    assert caught.value.where == f"evaluate.interventions: {spec.label}"
    assert caught.value.hint


@pytest.mark.parametrize(
    "parts",
    [
        (Ablate(), Steer()),
        (Steer(where="generated"), Clamp(where="prompt")),
        (Steer(), Ablate(layers=(3, 3))),
        (Ablate(where="generated"), Conditional()),
        (Steer(), Conditional(apply=Clamp())),
    ],
    ids=str,
)
def test_what_leaves_something_of_every_part_can_go_together(
    engine: Engine, parts: tuple[InterventionSpec, ...]
) -> None:
    made = Combine(parts=parts).build(_direction(engine))
    assert len(made.edits) == sum(len(part.build(_direction(engine)).edits) for part in parts)


def test_edited_matrices_keep_their_column_lengths_where_asked_and_write_nothing_along_the_direction() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    direction = _direction(engine)
    unit = algebra.unit(direction.vector)
    weight = engine.module.model.layers[1].mlp.down_proj.weight
    embedding = engine.module.model.embed_tokens.weight
    before = weight.clone()
    with engine.edited_weights(direction.basis, keep_norms=True):
        torch.testing.assert_close(weight.norm(dim=0), before.norm(dim=0), atol=1e-5, rtol=1e-5)
        assert (unit @ weight).abs().max() < 1e-5
        assert (embedding @ unit).abs().max() < 1e-5
        kept = weight.clone()
    assert torch.equal(weight, before)
    with engine.edited_weights(direction.basis):
        assert not torch.allclose(weight, kept, atol=1e-3)
        torch.testing.assert_close(algebra.unit(weight.T), algebra.unit(kept.T), atol=1e-4, rtol=0)


def test_strengthening_behind_a_gate_refuses_more_and_leaves_harmless_completions_alone(
    tmp_path: Path, registry: Registry
) -> None:
    path = ROOT / "recipes" / "methods" / "conditional.yaml"
    settings = ["evaluate.controls=0", "evaluate.metrics=[refusal_rate]", "evaluate.max_new_tokens=12"]
    execute(make_plan(load_recipe(path, registry, settings), path.parent, registry), tmp_path / "run", until="evaluate")
    evaluation = Store(tmp_path / "run").load(Evaluation)
    assert evaluation is not None
    made = {(row.intervention, row.prompts): row for row in evaluation.generated}
    opened = {(row.intervention, row.prompts): row for row in evaluation.gates}
    plain, before = made["none", "harmful"].refused, made["none", "harmless"].texts
    assert plain is not None
    for label, share, more in (("threshold=0.3", 0.2, 15), ("false_positives=0.01", 0.1, 8)):
        gated = made[f"conditional({label})", "harmful"].refused
        assert gated is not None
        answered = [after for refused, after in zip(plain, gated, strict=True) if not refused]
        assert len(answered) > 50, "the model answers many of them"
        assert sum(map(bool, answered)) / len(answered) > share
        assert sum(map(bool, gated)) - sum(map(bool, plain)) > more
        after = made[f"conditional({label})", "harmless"].texts
        assert sum(map(str.__eq__, before, after)) / len(before) >= 0.95
        harmful, harmless = (opened[f"conditional({label})", side].values for side in SIDES[:2])
        # What a gate turns away stays as it is, to the token.
        assert all(one == other for one, other, let in zip(before, after, harmless, strict=True) if not let)
        assert not any(new and not old for new, old, let in zip(gated, plain, harmful, strict=True) if not let)
        assert sum(harmful) > 4 * sum(harmless) > 0
    assert sum(map(str.__eq__, before, made["steer", "harmless"].texts)) / len(before) < 0.1
