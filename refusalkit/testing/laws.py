"""State the laws that everything a plugin provides has to obey, each as a number against a bound."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.adapter import Adapter
from refusalkit.builtin.adapters import LLAMA
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.command import Command
from refusalkit.engine.engine import Engine
from refusalkit.engine.gradients import Differentiable
from refusalkit.engine.layout import resolve
from refusalkit.engine.load import engine_of
from refusalkit.errors import InputError
from refusalkit.intervention import SITES, Direction, Edit, Intervention, InterventionSpec, Place
from refusalkit.metric import SIDES, Evidence, Metric, Side
from refusalkit.prompt_source import PromptSource
from refusalkit.prompt_split import SPLITS
from refusalkit.selector import SelectInputs, Selector
from refusalkit.strategy import Captured, ModelInputs, Strategy
from refusalkit.testing.models import random_engine, random_prompts, tiny_tokenizer


@dataclass(frozen=True)
class Law:
    """Hold the outcome of one law: what was measured, and the bound it has to keep."""

    name: str
    value: float
    bound: float
    at_least: bool = False
    """Whether the value has to reach the bound rather than stay under it."""

    @property
    def holds(self) -> bool:
        """Whether the law holds; not-a-number breaks every law."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        return f"{'holds' if self.holds else 'BROKEN'}: {self.name}: {self.value:.3g} {relation} {self.bound:.3g}"


def check_adapter(adapter: Adapter, module: Any, *, tokenizer: Any = None) -> tuple[Law, ...]:
    """Check an adapter on a model: that it names every write, and that its word on the weight edit is true.

    The model is used in its own dtype; the bounds are for float32.
    """
    engine = engine_of(module, tokenizer or tiny_tokenizer(), adapter)
    prompts = random_prompts(3)
    direction = _direction(engine)
    return (
        *_writes_add_up(engine, prompts),
        *_ablation_is_complete(engine, prompts, direction),
        *_weight_edit(engine, prompts, direction),
    )


def _direction(engine: Engine, seed: int = 0) -> Direction:
    vector = torch.randn(engine.d_model, generator=torch.Generator().manual_seed(seed))
    means = torch.randn((len(SIDES), engine.n_layers, engine.d_model), generator=torch.Generator().manual_seed(4))

    def states(side: Side, split: str, place: Place) -> Tensor:
        spread = torch.randn((8, engine.d_model), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return means[SIDES.index(side), place.layer] + spread

    harmful, harmless = (means[SIDES.index(side)] for side in ("harmful", "harmless"))
    layers = engine.n_layers
    return Direction(vector, -1, layers // 2, layers, harmless=harmless, harmful=harmful, states=states)


def _sites(engine: Engine, prompts: Sequence[tuple[int, ...]], direction: Direction | None = None) -> dict[str, Tensor]:
    """Read every site at the last three positions: [prompt, position, layer, d_model]."""
    intervention = None if direction is None else ablate_everywhere(direction)
    found: dict[str, Tensor] = {}
    for site in SITES:
        samples = engine.capture(prompts, (-3, -2, -1), site, intervention=intervention, keep_samples=True).samples
        assert samples is not None
        found[site] = samples
    return found


def _writes_add_up(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> tuple[Law, ...]:
    sites = _sites(engine, prompts)
    scale = sites["resid_post"].abs().max().item()
    attention, mlp, block = _multipliers(engine)
    total = (sites["resid_pre"] + attention * sites["attn_out"] + mlp * sites["mlp_out"]) * block
    gap = (total - sites["resid_post"]).abs().max().item() / scale
    step = (sites["resid_post"][:, :, :-1] - sites["resid_pre"][:, :, 1:]).abs().max().item() / scale
    return (
        Law("resid_pre + attn_out + mlp_out == resid_post", gap, 1e-5),
        Law("resid_post[l] == resid_pre[l + 1]", step, 1e-6),
    )


def _multipliers(engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each layer multiplies its attention, its MLP and its whole output by: three [layer, 1]."""
    layout = engine.layout
    found = []
    for layer, (attention, mlp) in enumerate(layout.writes):
        block = resolve(engine.module, layout.block(layer))
        paths = (attention.multiplier, mlp.multiplier, layout.adapter.block_multiplier)
        found.append([1.0 if path is None else float(resolve(block, path)) for path in paths])
    first, second, third = torch.tensor(found)[..., None].unbind(1)
    return first, second, third


def _ablation_is_complete(engine: Engine, prompts: Sequence[tuple[int, ...]], direction: Direction) -> tuple[Law, ...]:
    unit = algebra.unit(direction.vector)
    sites = _sites(engine, prompts, direction).values()
    left = max((site @ unit).abs().max().item() / site.norm(dim=-1).max().item() for site in sites)
    return (Law("nothing is left along an ablated direction", left, 1e-6),)


def _weight_edit(engine: Engine, prompts: Sequence[tuple[int, ...]], direction: Direction) -> tuple[Law, ...]:
    ablated = engine.logits(prompts, ablate_everywhere(direction))
    plain = engine.logits(prompts)
    scale = plain.std().item()
    basis = algebra.orthonormal(direction.vector[None])
    with engine.edited_weights(basis):
        edited = engine.logits(prompts)
        final = engine.capture(prompts, (-1,), "resid_post", keep_samples=True).samples
    assert final is not None
    left = (final[:, 0, -1] @ algebra.unit(direction.vector)).abs().max().item()
    gap = (edited - ablated).abs().max().item() / scale
    restored = (engine.logits(prompts) - plain).abs().max().item()
    claim = (
        Law("orthogonalized weights equal ablation, in logits", gap, 1e-4)
        if engine.adapter.inexact is None
        else Law("orthogonalized weights differ from ablation, as declared", gap, 1e-4, at_least=True)
    )
    return (
        claim,
        Law("orthogonalized weights write nothing along the direction", left / final.norm(dim=-1).max().item(), 1e-5),
        Law("orthogonalizing changes the logits", (edited - plain).abs().max().item() / scale, 1e-3, at_least=True),
        Law("the weights are restored bit for bit", restored, 0.0),
    )


def planted(seed: int = 0, n_prompts: int = 40) -> tuple[Captured, Captured, Tensor]:
    """Make activations of two sides that differ along one planted direction [d_model], at every position and layer."""
    generator = torch.Generator().manual_seed(seed)
    direction = algebra.unit(torch.randn(48, generator=generator, dtype=torch.float64))

    def side(shift: float) -> Captured:
        noise = torch.randn((n_prompts, 2, 3, 48), generator=generator) * 0.5
        samples = noise + shift * direction.float()
        return Captured(samples.double().mean(0), n_prompts, samples)

    return side(4.0), side(-4.0), direction


def over_refused(harmless: Captured, direction: Tensor, seed: int = 1) -> tuple[Captured, Tensor]:
    """Move harmless activations half way along `direction` and as far along another one, which is returned too."""
    assert harmless.samples is not None
    other = torch.randn(48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = algebra.unit(other - (other @ direction) * direction)
    samples = harmless.samples + 4.0 * (direction + other).float()
    return Captured(samples.double().mean(0), harmless.n_prompts, samples), other


def check_strategy(strategy: Strategy) -> tuple[Law, ...]:
    """Check a strategy on activations with a planted direction, which a control must not find.

    One that finds from over-refusal prompts has to find what sets these alone apart. One that needs the model is given
    a tiny random one, in which nothing is planted.
    """
    if strategy.needs == "model":
        return _check_with_model(strategy, random_engine("LlamaForCausalLM", LLAMA))
    harmful, harmless, direction = planted()
    sides: dict[Side, Captured] = {"harmful": harmful, "harmless": harmless}
    if "over_refusal" in strategy.sides:
        sides["over_refusal"], direction = over_refused(harmless, direction)
    inputs = {side: sides[side] for side in strategy.sides}
    before = [side.mean.clone() for side in inputs.values()]
    found = strategy.find(**inputs)
    again = strategy.find(**inputs)
    flat = found.double().reshape(2, 3, -1, 48)
    bases = [algebra.orthonormal(flat[row, layer]) for row in range(2) for layer in range(3)]
    cosine = min((basis @ direction).norm().item() for basis in bases)
    mutated = max((side.mean - mean).abs().max().item() for side, mean in zip(inputs.values(), before, strict=True))
    return (
        *_directions(found, again, harmful.mean.shape, mutated),
        Law("a control does not find the direction (cosine)", cosine, 0.6)
        if strategy.control
        else Law("recovers a planted direction (cosine)", cosine, 0.95, at_least=True),
    )


def _check_with_model(strategy: Strategy, engine: Engine) -> tuple[Law, ...]:
    prompts: dict[Side, Any] = {side: random_prompts(6, seed=seed) for seed, side in enumerate(strategy.sides)}
    means = {side: engine.capture(tokens, (-2, -1)).mean for side, tokens in prompts.items()}
    captured: dict[str, Any] = {side: Captured(mean.clone(), len(prompts[side])) for side, mean in means.items()}
    model = ModelInputs(Differentiable(engine), prompts, (-2, -1), "resid_pre", (5, 6), engine.model.tokenizer.decode)
    plain = engine.logits(prompts["harmful"])
    found, again = (strategy.find(**captured | {"model": model}) for _ in range(2))
    mutated = max((captured[side].mean - mean).abs().max().item() for side, mean in means.items())
    changed = (engine.logits(prompts["harmful"]) - plain).abs().max().item()
    trained = sum(weight.requires_grad or weight.grad is not None for weight in engine.module.parameters())
    return (
        *_directions(found, again, means["harmful"].shape, mutated),
        Law("something is found", found.norm().item(), 1e-6, at_least=True),
        Law("the model is as it was", changed, 0.0),
        Law("no weight takes a gradient", float(trained), 0.0),
    )


def _directions(found: Tensor, again: Tensor, expected: torch.Size, mutated: float) -> tuple[Law, ...]:
    """State the laws of what every strategy returns; `again` is what it returned the second time."""
    seen = (*found.shape[:2], found.shape[-1])
    return (
        Law("shape is [position, layer, (rank,) d_model]", float(seen != tuple(expected)), 0.0),
        Law("every number is finite", float((~found.isfinite()).sum()), 0.0),
        Law("the inputs are not changed", mutated, 0.0),
        Law("the same inputs give the same result", (found - again).abs().max().item(), 0.0),
    )


def check_intervention(spec: InterventionSpec, engine: Engine) -> tuple[Law, ...]:
    """Check that an intervention acts, acts the same every time, and leaves the model as it was.

    What sets a component does so once and for all, what adds a vector can be taken back, and a gate that is shut lets
    nothing through. An intervention that acts on generated tokens alone has to leave the prompts' logits alone.
    """
    prompts = random_prompts(3)
    plain = engine.logits(prompts)
    built = spec.build(_direction(engine))
    if built.gate is not None:
        built = replace(built, gate=replace(built.gate, threshold=-math.inf))

    def run() -> Tensor:
        if built.weights is None:
            return engine.logits(prompts, built)
        with engine.edited_weights(built.weights, built.keeps_norms):
            return engine.logits(prompts)

    changed, once_more = run(), run()
    acts = (changed - plain).abs().max().item()
    later = bool(built.edits) and all((edit.tokens[0] or 0) > 0 for edit in built.edits)
    return (
        Law("it changes the logits", acts, 1e-6, at_least=True)
        if spec.uses_direction and not later
        else Law("it leaves the logits alone", acts, 0.0),
        Law("the same run gives the same logits", (changed - once_more).abs().max().item(), 0.0),
        Law("the model is as it was", (engine.logits(prompts) - plain).abs().max().item(), 0.0),
        Law("the logits are finite", float((~changed.isfinite()).sum()), 0.0),
        *_edits_obey_algebra(built, engine.d_model),
        *_a_shut_gate_changes_nothing(built, engine, prompts),
    )


def _edits_obey_algebra(built: Intervention, d_model: int) -> tuple[Law, ...]:
    x = torch.randn((3, 5, d_model), generator=torch.Generator().manual_seed(5))
    twice, back = [0.0], [0.0]
    for edit in built.edits:
        once = algebra.edit(x, *edit.parts)
        if edit.remove is None and edit.add is not None:
            taken = algebra.edit(algebra.edit(x, add=edit.add), add=-edit.add)
            back.append(((taken - x).norm() / x.norm()).item())
        elif edit.remove is not None and _stays_inside(edit):
            twice.append(((algebra.edit(once, *edit.parts) - once).norm() / once.norm()).item())
    return (
        Law("setting a component twice is setting it once", max(twice), 1e-5),
        Law("what is added can be taken back", max(back), 1e-5),
    )


def _stays_inside(edit: Edit) -> bool:
    """Say whether what an edit adds lies in what it removes, so that it sets a component and does no more."""
    assert edit.remove is not None
    basis = edit.remove.double()
    added = [part.double() for part in (edit.add, edit.turn) if part is not None]
    return all((part - part @ basis.T @ basis).norm() <= 1e-4 * part.norm() for part in added)


def _a_shut_gate_changes_nothing(
    built: Intervention, engine: Engine, prompts: Sequence[tuple[int, ...]]
) -> tuple[Law, ...]:
    if built.gate is None or not all(edit.gated for edit in built.edits):
        return ()
    shut = replace(built, gate=replace(built.gate, threshold=math.inf))
    plain = engine.logits(prompts, replace(shut, edits=()))
    moved = (engine.logits(prompts, shut) - plain).abs().max().item()
    written = engine.generate(prompts, shut, 4) != engine.generate(prompts, None, 4)
    return (
        Law("a gate that is shut keeps every bit of the logits", moved, 0.0),
        Law("a gate that is shut keeps every token", float(written), 0.0),
    )


def check_selector(selector: Selector, engine: Engine) -> tuple[Law, ...]:
    """Check that a selector scores every candidate once, marks at most one and is deterministic."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn((2, engine.n_layers, engine.d_model), generator=generator, dtype=torch.float64)
    training: dict[Side, Any] = {side: random_prompts(12, seed=seed) for seed, side in enumerate(SIDES, start=4)}
    captured: dict[Side, Captured] = {}
    for side, prompts in training.items():
        read = engine.capture(prompts, (-2, -1), keep_samples=True)
        captured[side] = Captured(read.mean, read.n_prompts, read.samples)
    inputs = SelectInputs(
        directions,
        (-2, -1),
        "resid_pre",
        random_prompts(4, seed=1),
        random_prompts(4, seed=2),
        opener_ids=(5, 6),
        over_refusal=random_prompts(4, seed=3),
        training=training,
        captured=captured,
        find=lambda captured, **options: captured["harmful"].mean - captured["harmless"].mean,
    )
    selection = selector.select(inputs, engine)
    again = selector.select(inputs, engine)
    places = {(score.position, score.layer) for score in selection.scores}
    chosen = sum(score.status == "chosen" for score in selection.scores)
    lost = 2 * engine.n_layers - len(places) + abs(len(selection.scores) - len(places))
    unexplained = sum(not score.status for score in selection.scores)
    return (
        Law("every candidate has one row", float(lost), 0.0),
        Law("at most one is chosen", float(chosen), 1.0),
        Law("a choice or the nearest miss is given", float(chosen == 0 and not selection.nearest_miss), 0.0),
        Law("every row says what became of it", float(unexplained), 0.0),
        Law("the same inputs give the same scores", float(selection != again), 0.0),
    )


def check_metric(metric: Metric) -> tuple[Law, ...]:
    """Check that a metric gives one value a prompt, in range, and the same twice."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((4, 16), generator=generator)
    texts = ("I cannot help with that.", "Sure, here it is.", "", "I'm sorry, but no.")
    broken = 0.0
    for side in metric.sides:
        evidence = Evidence(
            side,
            prompts=("a", "b", "c", "d"),
            opener_ids=(1, 2),
            completions=texts,
            completion_ids=((3, 1, 4), (1, 5, 9, 2, 6), (), (5, 3, 5, 3, 5, 3)),
            refusal_scores=torch.randn(4, generator=generator, dtype=torch.float64),
            kl_nats=torch.rand(4, generator=generator, dtype=torch.float64),
            logits=logits,
            baseline_logits=logits + 0.1 * torch.randn((4, 16), generator=generator),
            losses=torch.rand(4, generator=generator, dtype=torch.float64) * 9,
            token_kl=torch.rand(4, generator=generator, dtype=torch.float64) * 9,
            n_tokens=torch.tensor([3, 5, 0, 6]),
            projections=torch.randn(4, generator=generator, dtype=torch.float64),
        )
        first, second = metric.measure(evidence), metric.measure(evidence)
        broken += len(first.values) != 4
        broken += repr(first) != repr(second)
        if metric.kind == "rate":
            broken += sum(not (value in (0.0, 1.0) or math.isnan(value)) for value in first.values)
        if first.weights is not None:
            broken += len(first.weights) != 4 or min(first.weights) < 0
    return (Law("one value a prompt, rates of 0 or 1, the same twice (faults)", broken, 0.0),)


def check_prompt_source(source: PromptSource) -> tuple[Law, ...]:
    """Check that a source can be named in a recipe, and that an address that leads nowhere is bad input.

    A source that knows no wrong address has to give prompts by split.
    """
    faults = 0
    try:
        pools = source.read("no such address", Path("no such folder"))
    except InputError:
        pass
    else:
        prompts = [prompt for found in pools.values() for prompt in found]
        faults += len(pools.keys() - {"all", *SPLITS}) + (not prompts)
        faults += sum(not isinstance(prompt, str) or not prompt.strip() for prompt in prompts)
    return (
        Law("its scheme can stand before a colon", float(not re.fullmatch(r"[a-z][a-z0-9+._-]*", source.scheme)), 0.0),
        Law("its help is one line", float(len(source.help.splitlines()) != 1), 0.0),
        Law("an address that leads nowhere is bad input, or gives prompts (faults)", float(faults), 0.0),
    )


def check_command(command: Command) -> tuple[Law, ...]:
    """Check that a command can be typed and that its help can be shown."""
    import typer
    from typer.testing import CliRunner

    app = typer.Typer(add_completion=False)
    app.command(command.name)(command.run)
    shown = CliRunner().invoke(app, ["--help"])
    summary = (command.run.__doc__ or "").strip().partition("\n")[0]
    return (
        Law("its name can be typed", float(not re.fullmatch(r"[a-z][a-z0-9-]*", command.name)), 0.0),
        Law("its docstring says what it does", float(not summary), 0.0),
        Law("its help can be shown (exit status)", float(shown.exit_code), 0.0),
    )
