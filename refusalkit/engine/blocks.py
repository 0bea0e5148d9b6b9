"""Hold every traced block, each as small as it can be.

A block runs on the server when the run is remote, with nothing of ours but what it names. So each is a free function
of the model and plain values, names functions of `algebra` (never the module, which would travel whole), touches
modules in forward order, and saves the smallest thing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from refusalkit.algebra import Seen, apply, decide, drawn_log_probability, hidden, refusal_score
from refusalkit.engine.lower import Program

Inputs = Mapping[str, Tensor]
#: (whether to draw a token rather than score the openers, the quantile [row] to draw at or the openers' token ids)
Objective = tuple[bool, Tensor]


def walk(model: Any, program: Program, seen: Seen) -> Iterator[Tensor]:
    """Take the steps of `program` inside a trace and yield what it keeps: hidden states [row, position, d_model]."""
    prompts, step, decided = seen
    for path, at_input, gate, change in program:
        # A gate is read in the first pass; its decision holds for the completion.
        if gate is not None and step:
            continue
        module = model.get(path)
        value = module.input if at_input else module.output
        if gate is not None:
            decided.append(decide(value, gate, prompts))
        elif change is None:
            yield hidden(value, prompts)
        elif at_input:
            module.input = apply(value, change, seen)
        else:
            module.output = apply(value, change, seen)


def last_logits(
    model: Any, inputs: Inputs, program: Program, options: Mapping[str, Any], skip: tuple[Sequence[str], Tensor | None]
) -> Tensor:
    """Return the last position's logits [row, d_vocab] under `program`.

    `skip` names the blocks that do not run, and what the next block gets in their place [row, position, d_model].
    """
    skipped, resid = skip
    prompts = len(inputs["input_ids"])
    with torch.no_grad(), model.trace(inputs, **options):
        for path in skipped:
            model.get(path).skip(resid)
        list(walk(model, program, (prompts, 0, [])))
        logits = nnsight.save(model.output.logits[:, -1])
    return logits  # type: ignore[no-any-return]


def kept_logits(model: Any, inputs: Inputs, program: Program, options: Mapping[str, Any]) -> Tensor:
    """Return all logits [row, position, d_vocab] that the options have the model keep, under `program`."""
    prompts = len(inputs["input_ids"])
    with torch.no_grad(), model.trace(inputs, **options):
        list(walk(model, program, (prompts, 0, [])))
        logits = nnsight.save(model.output.logits)
    return logits  # type: ignore[no-any-return]


def read(
    model: Any, inputs: Inputs, program: Program, positions: Sequence[int] | None, options: Mapping[str, Any]
) -> list[Tensor]:
    """Return the hidden state [row, position, d_model] at every place that `program` keeps, and stop after the last.

    `positions` picks positions; None keeps them all. With `stop: False` among the options the pass runs to its end:
    in a server's sandbox, a pass that is stopped puts the next one out of step.
    """
    index = slice(None) if positions is None else list(positions)
    prompts = len(inputs["input_ids"])
    stops, options = _stops(options)
    with torch.no_grad(), model.trace(inputs, **options) as tracer:
        found = nnsight.save([state[:, index] for state in walk(model, program, (prompts, 0, []))])
        if stops:
            tracer.stop()
    return found  # type: ignore[no-any-return]


def read_sums(
    model: Any, inputs: Inputs, program: Program, positions: Sequence[int], options: Mapping[str, Any]
) -> Tensor:
    """Return the sum over rows of what `program` keeps at `positions`, [position, read, d_model] float64."""
    index = list(positions)
    prompts = len(inputs["input_ids"])
    stops, options = _stops(options)
    with torch.no_grad(), model.trace(inputs, **options) as tracer:
        states = walk(model, program, (prompts, 0, []))
        rows = [state[:, index].double().sum(0).cpu() for state in states]
        total = nnsight.save(torch.stack(rows, 1))
        if stops:
            tracer.stop()
    return total  # type: ignore[no-any-return]


def last_writes(
    model: Any, inputs: Inputs, layers: Sequence[tuple[str, str, str, str]], options: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """Return what every layer writes at the last position, from the paths of attention's projection, of attention, and
    of what attention and the MLP add.

    That is what enters and what leaves the projection, and the two additions, [row, width] each, and the attention
    paid there [row, head, position], None where attention keeps no such weights.
    """
    prompts = len(inputs["input_ids"])
    with torch.no_grad(), model.trace(inputs, **options):
        found = nnsight.save([])
        for projection, attention, write, mlp in layers:
            entering = hidden(model.get(projection).input, prompts)[:, -1]
            leaving = hidden(model.get(projection).output, prompts)[:, -1]
            output = model.get(attention).output
            paid = output[1][:, :, -1] if isinstance(output, tuple) and output[1] is not None else None
            added = hidden(output if write == attention else model.get(write).output, prompts)[:, -1]
            found.append((entering, leaving, added, hidden(model.get(mlp).output, prompts)[:, -1], paid))
    return found  # type: ignore[no-any-return]


def _stops(options: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Take the option `stop` from those that the model gets."""
    return options.get("stop", True), {name: value for name, value in options.items() if name != "stop"}


def states_at(model: Any, inputs: Inputs, outputs: str, takes: str) -> tuple[Tensor, Tensor]:
    """Return the output of the module at `outputs` and the input of the one at `takes`, which runs after it."""
    prompts = len(inputs["input_ids"])
    with torch.no_grad(), model.trace(inputs, logits_to_keep=1, use_cache=False):
        given = nnsight.save(hidden(model.get(outputs).output, prompts))
        taken = nnsight.save(hidden(model.get(takes).input, prompts))
    return given, taken


def gradients(
    model: Any, inputs: Inputs, program: Program, objectives: Sequence[Objective], options: Mapping[str, Any]
) -> tuple[list[Tensor], list[tuple[Tensor, list[Tensor]]]]:
    """Return the hidden states [row, position, d_model] that `program` keeps, and what each objective says of them.

    That is its value [row] and its gradient at each of the hidden states. The first place kept has to be the input of
    the first block: everything later is differentiable because it is.
    """
    prompts = len(inputs["input_ids"])
    with torch.enable_grad(), model.trace(inputs, **options):
        kept: list[Tensor] = []
        for path, at_input, _, _ in program:
            module = model.get(path)
            value = module.input if at_input else module.output
            # Gradients are those of the tensor that goes on, so it takes its shape afterwards.
            value = value[0] if isinstance(value, tuple) else value
            if not kept:
                value.requires_grad_(True)
            kept.append(value)
        logits = model.output.logits[:, -1]
        found = []
        for draws, numbers in objectives:
            score = drawn_log_probability if draws else refusal_score
            values = score(logits, numbers)
            grads = torch.autograd.grad(values.sum(), kept, retain_graph=True)
            found.append((values.detach(), [hidden(grad, prompts) for grad in grads]))
        states = nnsight.save([hidden(value.detach(), prompts) for value in kept])
        found = nnsight.save(found)
    return states, found


def generate(model: Any, inputs: Inputs, program: Program, options: Mapping[str, Any]) -> Tensor:
    """Return greedy completions with their prompts [row, position] under `program` at every step."""
    prompts = len(inputs["input_ids"])
    with warnings.catch_warnings():
        # An open loop over decode steps asks for one more than there are.
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for", category=UserWarning)
        with torch.no_grad(), model.generate(**options) as tracer:
            with tracer.invoke(inputs):
                decided: list[Tensor] = []
                for step in tracer.iter[:]:
                    list(walk(model, program, (prompts, step, decided)))
            with tracer.invoke():
                tokens = nnsight.save(tracer.result)
    return tokens  # type: ignore[no-any-return]


def generate_plainly(model: Any, inputs: Inputs, options: Mapping[str, Any]) -> Tensor:
    """Return greedy completions with their prompts [row, position] of the unmodified model."""
    with torch.no_grad(), model.generate(inputs, **options) as tracer:
        tokens = nnsight.save(tracer.result)
    return tokens  # type: ignore[no-any-return]
