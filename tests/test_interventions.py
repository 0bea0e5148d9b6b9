"""Edits reach the tokens, decode steps and prompts they name, and no others, however the engine runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor

from refusalkit.builtin.adapters import LLAMA
from refusalkit.engine import blocks
from refusalkit.engine.batch import batch
from refusalkit.engine.engine import Engine
from refusalkit.engine.lower import lower, place
from refusalkit.intervention import Edit, Gate, Intervention
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


@pytest.mark.parametrize("gated", [False, True], ids=["always", "gated"])
@pytest.mark.parametrize("tokens", [(None, None), (1, None), (0, 0)], ids=str)
def test_a_remote_dry_run_of_every_block_gives_the_same_bits(
    engine: Engine, tokens: tuple[int | None, int | None], gated: bool
) -> None:
    nnsight.register("refusalkit")
    group = batch(PROMPTS, range(len(PROMPTS)), 0, 0, torch.device("cpu"))
    program = lower([_everything(engine, tokens, gated=gated)], engine.layout, len(PROMPTS), torch.device("cpu"))
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
