"""Do the work of a job where the model runs.

Everything here runs on the server, where refusalkit is not installed: it travels as source, with the blocks and the
algebra it names and nothing else. A task loops over its items (batches, or programs) and returns a tensor or a list
of tensors. What it makes of several items is what it makes of each, added up with `+`: a sum of tensors, or one list
after the other. So a job can be cut between any two items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from refusalkit.algebra import all_greedy, completion_loss, kl_along, kl_nats, refusal_score, unit
from refusalkit.engine.blocks import (
    Inputs,
    generate,
    generate_plainly,
    kept_logits,
    last_logits,
    read,
    read_sums,
    states_at,
)
from refusalkit.engine.lower import Program

Task = Callable[..., "Tensor | list[Tensor]"]
#: (task, items, what every item needs)
Part = tuple[Task, tuple[Any, ...], tuple[Any, ...]]

#: One pass over the prompts alone, of which the last position's logits are needed.
ONCE = {"logits_to_keep": 1, "use_cache": False}
WHOLE = {**ONCE, "stop": False}
#: A sum of few numbers ends in zeros, which compress. Divided by a number without pattern it fills all its bits, and
#: the size of the answer says nothing of the number of prompts.
SPREAD = math.pi
NO_SKIP: tuple[Sequence[str], None] = ((), None)


def submit(model: Any, backend: Any, parts: Sequence[Part]) -> None:
    """Send `parts` to the server as one job; the block saves one result a part."""
    with model.session(backend=backend):
        results = nnsight.save([])
        for task, items, fixed in parts:
            results.append(task(model, items, *fixed))


def capture_sums(model: Any, batches: Sequence[Inputs], program: Program, positions: Sequence[int]) -> Tensor:
    """Sum the hidden states that `program` keeps over all prompts, over `SPREAD`: [position, read, d_model] float64."""
    parts = [read_sums(model, inputs, program, positions, WHOLE) for inputs in batches]
    return torch.stack(parts).sum(0) / SPREAD


def capture_samples(model: Any, batches: Sequence[Inputs], program: Program, positions: Sequence[int]) -> list[Tensor]:
    """Return for every batch the hidden states [row, position, read, d_model], in the model's dtype."""
    found = [read(model, inputs, program, positions, WHOLE) for inputs in batches]
    return [torch.stack([state.cpu() for state in states], 2) for states in found]


def cosines(model: Any, batches: Sequence[Inputs], program: Program, position: int, direction: Tensor) -> list[Tensor]:
    """Return for every batch the cosines [row, read] of hidden states at `position` with the unit `direction`."""
    found = [read(model, inputs, program, (position,), WHOLE) for inputs in batches]
    states = [torch.stack([state[:, 0].cpu().float() for state in each], 1) for each in found]
    return [(unit(each) @ direction).double() for each in states]


def scores(
    model: Any,
    programs: Sequence[Program],
    batches: Sequence[tuple[Inputs, Tensor | None]],
    token_ids: Tensor | None,
    limit: float | None,
) -> list[Tensor]:
    """Return for every program a score a prompt, in the batches' order: [prompt] float64.

    The score is the refusal score of `token_ids`, or without them the KL from the logits that a batch brings along or
    that the unmodified model has. Prompts after the sum has passed `limit` are not scored and are not-a-number.
    """
    references = []
    if token_ids is None:
        for inputs, reference in batches:
            references.append(last_logits(model, inputs, (), ONCE, NO_SKIP) if reference is None else reference)
    found = []
    for program in programs:
        rows: list[Tensor] = []
        for number, (inputs, _) in enumerate(batches):
            if limit is not None and rows and torch.cat(rows).nansum() > limit:
                rows.append(torch.full((len(inputs["input_ids"]),), float("nan"), dtype=torch.float64))
                continue
            logits = last_logits(model, inputs, program, ONCE, NO_SKIP)
            if token_ids is None:
                rows.append(kl_nats(references[number], logits).cpu())
            else:
                rows.append(refusal_score(logits, token_ids).cpu())
        found.append(torch.cat(rows))
    return found


def states(model: Any, programs: Sequence[Program], batches: Sequence[Inputs]) -> list[Tensor]:
    """Sum for every program what it keeps at the last token over all prompts: [read, d_model] float64."""
    found = []
    for program in programs:
        parts = [read_sums(model, inputs, program, (-1,), WHOLE)[0] for inputs in batches]
        found.append(torch.stack(parts).sum(0))
    return found


def readings(
    model: Any, programs: Sequence[Program], batches: Sequence[Inputs], token_ids: Tensor, keep_logits: bool
) -> list[Tensor]:
    """Return for every program [prompt, 4] float64: refusal score, KL, whether finite, whether moved; then its logits
    [prompt, d_vocab] where they are kept."""
    references = [last_logits(model, inputs, (), ONCE, NO_SKIP) for inputs in batches]
    found = []
    for program in programs:
        numbers, kept = [], []
        for inputs, reference in zip(batches, references, strict=True):
            logits = last_logits(model, inputs, program, ONCE, NO_SKIP) if program else reference
            columns = (
                refusal_score(logits, token_ids),
                kl_nats(reference, logits),
                logits.isfinite().all(-1),
                (logits != reference).any(-1),
            )
            numbers.append(torch.stack([column.double().cpu() for column in columns], 1))
            kept.append(logits.cpu())
        found.append(torch.cat(numbers))
        if keep_logits:
            found.append(torch.cat(kept))
    return found


def openings(
    model: Any, everything: Sequence[Sequence[Sequence[Inputs]]], token_ids: Sequence[int], most: int
) -> list[Tensor]:
    """Return the token ids [token] that `of_openers` finds in groups of batches, then each group's probabilities."""
    found: list[Tensor] = []
    for groups in everything:
        logits = [
            torch.cat([last_logits(model, inputs, (), ONCE, NO_SKIP) for inputs in batches]) for batches in groups
        ]
        found += of_openers(logits, token_ids, most)
    return found


def of_openers(groups: Sequence[Tensor], token_ids: Sequence[int], most: int) -> list[Tensor]:
    """Return `token_ids` and the `most` tokens more probable in the first group than in the second, then each group's
    probabilities [prompt, token] of them, in float64; groups are last-position logits [prompt, d_vocab]."""
    first, second = (logits.double().softmax(-1).mean(0) for logits in groups[:2])
    found = (first - second).argsort(descending=True)[:most].tolist()
    wanted = list(dict.fromkeys([*token_ids, *found]))
    return [torch.tensor(wanted), *(logits.double().softmax(-1)[:, wanted].cpu() for logits in groups)]


def completions(
    model: Any,
    batches: Sequence[Inputs],
    program: Program,
    options: Mapping[str, Any],
    before: Mapping[str, str],
) -> list[Tensor]:
    """Return for every batch the greedy completions [row, new token] int32 under `program`.

    A decode step hands each block the cache of keys and values. A sandbox runs this code in another process, where
    touching a block's input would leave it with a copy of that cache. So what is meant for a block's input is done at
    the output of the module `before` it; where the embedding's output is not the first block's input, every step
    reads the whole sequence again instead, without a cache.
    """
    steps: Any = program
    first = next(iter(before))
    if any(step[1] and step[0] == first for step in program) and not torch.equal(
        *states_at(model, batches[0], before[first], first)
    ):
        options = {**options, "use_cache": False}
    else:
        steps = [(before[step[0]], False, *step[2:]) if step[1] else step for step in program]
    found = []
    for inputs in batches:
        ids = generate(model, inputs, steps, options) if steps else generate_plainly(model, inputs, options)
        found.append(ids[:, inputs["input_ids"].shape[1] :].int().cpu())
    return found


def likelihoods(model: Any, batches: Sequence[tuple[Inputs, Program, tuple[Tensor, Tensor], int]]) -> list[Tensor]:
    """Return for every batch the log-likelihood of its target tokens and whether all are greedy: [row, 2] float64."""
    found = []
    for inputs, program, (token_ids, mask), width in batches:
        logits = kept_logits(model, inputs, program, {"logits_to_keep": width, "use_cache": False})
        sums = completion_loss(logits, token_ids, mask)
        found.append(torch.stack([-sums, all_greedy(logits, token_ids, mask).double()], 1).cpu())
    return found


def completion_kl(model: Any, batches: Sequence[tuple[Inputs, Sequence[Program], Tensor, int]]) -> list[Tensor]:
    """Return for every batch the KL from the unmodified model, summed over the marked tokens: [row, program] float64.

    A batch comes with its programs, whose steps count from each prompt's end, and the mask [row, width].
    """
    found = []
    for inputs, programs, mask, width in batches:
        options = {"logits_to_keep": width, "use_cache": False}
        reference = kept_logits(model, inputs, (), options)
        columns = [
            kl_along(reference, kept_logits(model, inputs, program, options), mask).cpu() for program in programs
        ]
        found.append(torch.stack(columns, 1))
    return found


def projections(
    model: Any, programs: Sequence[Program], batches: Sequence[Inputs], position: int, direction: Tensor
) -> list[Tensor]:
    """Return for every program the component along the unit `direction` of what it keeps at `position`: [prompt]."""
    found = []
    for program in programs:
        states = [read(model, inputs, program, (position,), WHOLE)[0][:, 0].cpu().double() for inputs in batches]
        found.append(torch.cat(states) @ direction)
    return found
