"""Edits reach the tokens, decode steps and prompts they name, and no others, however the engine runs them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.builtin.adapters import LLAMA
from refusalkit.builtin.components import Affine, Angular, Clamp, MeanAblate
from refusalkit.builtin.compositions import Combine, Conditional
from refusalkit.builtin.interventions import Ablate, Steer
from refusalkit.engine import blocks
from refusalkit.engine.batch import batch
from refusalkit.engine.engine import Engine
from refusalkit.engine.lower import lower, place
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import Direction, Edit, Gate, Intervention, InterventionSpec, Place
from refusalkit.selector import Measure
from refusalkit.testing import random_engine
from refusalkit.testing.models import random_prompts

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
    program = lower([spec.build(direction_in(engine))], engine.layout, len(PROMPTS), torch.device("cpu"))
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


def direction_in(engine: Engine) -> Direction:
    """Draw a direction with the means and the prompts it might come from."""
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
    direction = direction_in(engine)
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


def test_a_combination_applies_its_parts_in_order(engine: Engine) -> None:
    direction = direction_in(engine)
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
        spec.build(direction_in(engine))
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
    made = Combine(parts=parts).build(direction_in(engine))
    assert len(made.edits) == sum(len(part.build(direction_in(engine)).edits) for part in parts)


def test_edited_matrices_keep_their_column_lengths_where_asked_and_write_nothing_along_the_direction() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    direction = direction_in(engine)
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
