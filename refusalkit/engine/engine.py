"""Run a model: capture, measure, generate, each under an intervention.

The engine batches prompts by length, shares what they have in common at the front, starts a forward pass at the
first layer an intervention touches, and halves the batch when memory runs out. None of this changes a result by more
than the rounding of the model's own dtype.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.adapter import Adapter
from refusalkit.engine import attribution, blocks, weights
from refusalkit.engine.batch import Batch, Tokens, batch, check_lengths, chunks, halved, prefix_inputs, shared_prefix
from refusalkit.engine.beside import completion_kl, likelihoods, losses, projections
from refusalkit.engine.layout import layout_of
from refusalkit.engine.lower import Pack, counted_from, lower, packs
from refusalkit.engine.memory import out_of_memory
from refusalkit.engine.request import Request, answer
from refusalkit.engine.states import mean_states
from refusalkit.errors import RunError
from refusalkit.intervention import NOTHING, Intervention, Site
from refusalkit.selector import Advance, Attribution, Measure

DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class Clean:
    """Hold the unmodified residual stream of one batch, from which a steered pass can start at any layer."""

    resid: list[Tensor]
    """[layer] of [prompt, position, d_model]: every block's input."""
    prefix_resid: list[Tensor]
    """The same of the shared front, one row; empty when there is none."""
    prefix_cache: Any
    """Keys and values of the shared front, one row; None when there is none."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Hold captured activations: sums for the means, and every prompt's where they were asked for."""

    mean: Tensor
    """[position, layer, d_model] float64."""
    n_prompts: int
    samples: Tensor | None
    """[prompt, position, layer, d_model] float32."""


class Engine:
    """Run one loaded model."""

    def __init__(self, model: Any, adapter: Adapter, batch_size: int | None = None) -> None:
        self.model = model
        self.module: Any = model._module
        self.adapter = adapter
        self.layout = layout_of(self.module, adapter)
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        config = self.module.config.get_text_config()
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.prompt_passes = 0.0
        """How many forward passes of one prompt through all layers have run. Partial passes count in part, and the
        tokens of a completion by their share of the prompt."""
        self.shares_prefix = True
        # transformers 5.24 renames the argument.
        renamed = "cache" in inspect.signature(self.module.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.module.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> str:
        """The type of the weights."""
        return str(self.module.dtype).removeprefix("torch.")

    def run(self, requests: Sequence[Request], advance: Advance | None = None) -> list[Any]:
        """Answer requests in their order (see `refusalkit.engine.request`)."""
        return [answer(self, request, advance) for request in requests]

    # -- reading -----------------------------------------------------------------------------------------------

    def capture(
        self,
        prompts: Sequence[Tokens],
        positions: Sequence[int],
        site: Site = "resid_pre",
        *,
        layers: Sequence[int] | None = None,
        intervention: Intervention | None = None,
        keep_samples: bool = False,
        advance: Advance | None = None,
    ) -> Samples:
        """Read the residual stream at `positions` of every layer, or of `layers` (ascending), and stop after the last.

        It is the float64 mean, and samples where asked. Under an intervention it is read as it is after the edits of
        each place. Raises `RunError` for a prompt shorter than the deepest position.
        """
        check_lengths(prompts, positions)
        reads: list[tuple[Site, int]] = [(site, layer) for layer in layers or range(self.n_layers)]
        depth = min(self.n_layers, reads[-1][1] + (site != "resid_pre")) if layers else self.n_layers
        total: Tensor | None = None
        samples: list[tuple[tuple[int, ...], Tensor]] = []

        def run(group: Batch, options: dict[str, Any]) -> None:
            nonlocal total
            inputs = group.repeated(1)
            program = lower([intervention or NOTHING], self.layout, len(group.indices), self.device, reads)
            if keep_samples:
                found = blocks.read(self.model, inputs, program, positions, options)
                rows = torch.stack([row.cpu() for row in found], 2).float()
                samples.append((group.indices, rows))
                part = rows.double().sum(0)
            else:
                part = blocks.read_sums(self.model, inputs, program, positions, options)
            self.prompt_passes += len(group.indices) * depth / self.n_layers
            total = part if total is None else total + part

        front = self._prefix(prompts, keep=-min(positions)) if intervention is None and depth else ()
        self._over(prompts, run, prefix=front, depth=depth, advance=advance)
        assert total is not None
        kept = None
        if keep_samples:
            kept = torch.empty((len(prompts), *samples[0][1].shape[1:]))
            for indices, rows in samples:
                kept[list(indices)] = rows
        return Samples(total / len(prompts), len(prompts), kept)

    def logits(self, prompts: Sequence[Tokens], intervention: Intervention | None = None) -> Tensor:
        """Return the last-position logits [prompt, d_vocab], on the CPU, in float32 or wider."""
        found: dict[int, Tensor] = {}
        pack = Pack((0,), (intervention or NOTHING,))
        prefix = self._prefix(prompts, keep=1, interventions=pack.interventions)

        def run(group: Batch, options: dict[str, Any]) -> None:
            front = self._front(pack, prefix, None) if prefix else None
            rows = algebra.widen(self._packed_logits(group, pack, front, None)).cpu()
            found.update(zip(group.indices, rows, strict=True))

        self._over(prompts, run, prefix=prefix)
        return torch.stack([found[index] for index in range(len(prompts))])

    def measure(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        measure: Measure,
        advance: Advance | None = None,
    ) -> Tensor:
        """Reduce every prompt's last-position logits under every intervention: [intervention, prompt] float64.

        Not-a-number stands for the prompts after which an intervention was given up (`Measure.stop_above`).
        """
        if measure.kind == "kl_nats" and measure.reference is None:
            measure = replace(measure, reference=self.logits(prompts))
        values = torch.full((len(interventions), len(prompts)), math.nan, dtype=torch.float64)
        limit = math.inf if measure.stop_above is None else measure.stop_above * len(prompts)
        prefix = self._prefix(prompts, keep=1, interventions=interventions)
        done, total = 0, len(interventions) * len(prompts)

        def alive(indices: Iterable[int]) -> list[int]:
            return [index for index in indices if not values[index].nansum() > limit]

        def run(group: Batch, options: dict[str, Any]) -> None:
            nonlocal done
            left = alive(range(len(interventions)))
            clean = self._clean(group, prefix) if any(interventions[index].first_layer for index in left) else None
            for pack in packs([(index, interventions[index]) for index in left], self.batch_size):
                for part, kept, logits in self._pack_by_parts(pack, group, prefix, clean, alive):
                    reduced = _reduce(logits, measure, part.indices, len(kept.indices)).cpu()
                    for index, row in zip(kept.indices, reduced.reshape(len(kept.indices), -1), strict=True):
                        values[index, list(part.indices)] = row
                done += len(group.indices) * len(pack.indices)
                if advance is not None:
                    advance(min(done, total), total)

        self._over(prompts, run, prefix=prefix)
        return values

    mean_states = mean_states
    losses = losses
    completion_kl = completion_kl
    likelihoods = likelihoods
    projections = projections

    def _pack_by_parts(
        self,
        pack: Pack,
        group: Batch,
        prefix: Tokens,
        clean: Clean | None,
        alive: Callable[[Iterable[int]], Sequence[int]],
    ) -> Iterator[tuple[Batch, Pack, Tensor]]:
        """Yield logits of a pack on a few prompts at a time, and drop the interventions that are given up between.

        The more interventions share a pass, the fewer prompts do, and the less of it is padding.
        """
        start = _start(pack, clean)
        front = self._front(pack, prefix, clean) if prefix else None
        row = 0
        while row < len(group.indices):
            rows = slice(row, row + max(1, self.batch_size // len(pack.indices)))
            part = group.part(rows)
            resid = clean.resid[start][rows, -part.input_ids.shape[1] :] if clean is not None and start else None
            yield part, pack, self._packed_logits(part, pack, front, resid)
            row = rows.stop
            going_on = alive(pack.indices)
            if not going_on:
                return
            if len(going_on) < len(pack.indices):
                kept = [place for place, index in enumerate(pack.indices) if index in going_on]
                pack = pack.of(kept)
                if front is not None:
                    front.batch_select_indices(torch.tensor(kept, device=self.device))

    def attribute(
        self, prompts: Sequence[Tokens], bases: Tensor, site: Site, measures: Sequence[Measure]
    ) -> list[Attribution]:
        """Estimate what candidates do to each measure from one forward pass and one backward pass a measure.

        bases [candidate, rank, d_model], rows orthonormal or zero.
        """
        places = attribution.sites(site, self.n_layers)
        at = [index for index, (place, _) in enumerate(places) if place == site]
        directions = bases.float().to(self.device)
        values = torch.zeros(len(measures), len(prompts), dtype=torch.float64)
        gradient = torch.zeros(len(measures), self.n_layers, self.d_model, dtype=torch.float64)
        removal = torch.zeros(len(measures), len(bases), len(prompts), dtype=torch.float64)

        def run(group: Batch, _: dict[str, Any]) -> None:
            rows = list(group.indices)
            states, found = attribution.attribute_batch(self.model, self.layout, group, places, measures)
            for index, (value, grads) in enumerate(found):
                values[index, rows] = value.cpu()
                gradient[index] += torch.stack([grads[place].double().sum((0, 1)).cpu() for place in at])
                removal[index][:, rows] = attribution.removed(places, states, grads, directions).cpu()
            # A backward pass costs about two forward passes.
            self.prompt_passes += len(rows) * (1 + 2 * len(measures))

        self._over(prompts, run)
        gradient /= len(prompts)
        return [
            Attribution(values[index], gradient[index], values[index] + removal[index])
            if measure.kind == "refusal_score"
            else Attribution(torch.zeros_like(values[index]), gradient[index], removal[index].square() / 2)
            for index, measure in enumerate(measures)
        ]

    def _packed_logits(self, group: Batch, pack: Pack, front: Any, resid: Tensor | None) -> Tensor:
        """Return logits [intervention * prompt, d_vocab] of a pack on one batch.

        `front` holds the keys and values of the shared front, a row for each intervention; None when there is none.
        resid [prompt, position, d_model] is the input of the first block that the pack touches, where the pass can
        start there.
        """
        times, rows = len(pack.interventions), len(group.indices)
        start = 0 if resid is None else pack.first_layer or 0
        options: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
        if front is not None:
            cache = copy.deepcopy(front)
            cache.batch_repeat_interleave(rows)
            options.update(self._with_cache(cache))
        program = lower(pack.interventions, self.layout, rows, self.device)
        self.prompt_passes += times * rows * (self.n_layers - start) / self.n_layers
        skip = self._skip(start, resid, times)
        return blocks.last_logits(self.model, group.repeated(times), program, options, skip)

    def _front(self, pack: Pack, prefix: Tokens, clean: Clean | None) -> Any:
        """Return the keys and values of the shared front under each intervention of a pack, a row each."""
        times, start = len(pack.interventions), _start(pack, clean)
        if clean is not None and not any(intervention.edits for intervention in pack.interventions):
            below = copy.deepcopy(clean.prefix_cache)
            below.batch_repeat_interleave(times)
            return below
        cache = self._empty_cache()
        # The prompt's last token is not in the front, so nothing that starts there reaches it.
        program = counted_from(lower(pack.interventions, self.layout, 1, self.device), -1)
        skip = self._skip(start, clean.prefix_resid[start] if clean is not None and start else None, times)
        options = {"logits_to_keep": 1, **self._with_cache(cache)}
        blocks.last_logits(self.model, prefix_inputs(prefix, times, self.device), program, options, skip)
        if start and clean is not None:
            # Layers that did not run have left no keys; theirs are the unmodified model's.
            below = copy.deepcopy(clean.prefix_cache)
            below.batch_repeat_interleave(times)
            cache.layers[:start] = below.layers[:start]
        return cache

    def _skip(self, start: int, resid: Tensor | None, times: int) -> tuple[list[str], Tensor | None]:
        """Return the blocks before `start` and what stands in for their output, once for each intervention."""
        skipped = [self.layout.block(layer) for layer in range(start)]
        return skipped, None if resid is None else resid.to(self.device).repeat(times, 1, 1)

    def _clean(self, group: Batch, prefix: Tokens) -> Clean:
        """Run the unmodified model on one batch and keep every block's input."""
        reads: list[tuple[Site, int]] = [("resid_pre", layer) for layer in range(self.n_layers)]
        options: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
        prefix_resid: list[Tensor] = []
        cache = None
        if prefix:
            cache = self._empty_cache()
            inputs = prefix_inputs(prefix, 1, self.device)
            # Not stopped after the last input: the cache needs the last block too.
            last = lower([NOTHING], self.layout, 1, self.device, [*reads, ("resid_post", self.n_layers - 1)])
            front = blocks.read(self.model, inputs, last, None, self._with_cache(cache))
            prefix_resid = front[:-1]
            used = copy.deepcopy(cache)
            used.batch_repeat_interleave(len(group.indices))
            options.update(self._with_cache(used))
        program = lower([NOTHING], self.layout, 1, self.device, reads)
        resid = blocks.read(self.model, group.repeated(1), program, None, options)
        self.prompt_passes += len(group.indices)
        return Clean(resid, prefix_resid, cache)

    # -- writing -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Tokens],
        intervention: Intervention | None = None,
        max_new_tokens: int = 64,
        advance: Advance | None = None,
    ) -> list[Tokens]:
        """Return each prompt's greedy completion as token ids, without the end-of-turn token that ended it."""
        stops = self._stop_ids()
        found: dict[int, Tokens] = {}
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            # A checkpoint's sampling settings mean nothing to a greedy run, and transformers warns about them.
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": self._pad_id(),
        }

        def run(group: Batch, _: dict[str, Any]) -> None:
            inputs = group.repeated(1)
            del inputs["position_ids"]
            if intervention is None or not intervention.edits:
                ids = blocks.generate_plainly(self.model, inputs, options)
            else:
                program = lower([intervention], self.layout, len(group.indices), self.device)
                ids = blocks.generate(self.model, inputs, program, options)
            # The last token is not read again.
            self.prompt_passes += len(group.indices) * (ids.shape[1] - 1) / group.input_ids.shape[1]
            for index, row in zip(group.indices, ids[:, group.input_ids.shape[1] :].tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in stops]
                found[index] = tuple(row[: ends[0]] if ends else row)

        self._over(prompts, run, advance=advance)
        return [found[index] for index in range(len(prompts))]

    @contextmanager
    def edited_weights(self, basis: Tensor, keep_norms: bool = False) -> Iterator[weights.Edited]:
        """Remove `basis` [rank, d_model] from every weight that writes the residual stream, and put it back after."""
        with weights.edited(self.module, self.adapter, basis, keep_norms) as edited:
            yield edited

    # -- batching ----------------------------------------------------------------------------------------------

    def _prefix(self, prompts: Sequence[Tokens], keep: int, interventions: Sequence[Intervention] = ()) -> Tokens:
        # What a gate decides at the end of a prompt changes its front.
        shares = self.shares_prefix and all(intervention.gate is None for intervention in interventions)
        if not shares or not self._cache_can_be_shared(max(len(prompt) for prompt in prompts)):
            return ()
        return shared_prefix(prompts, keep)

    def _over(
        self,
        prompts: Sequence[Tokens],
        run: Callable[[Batch, dict[str, Any]], None],
        *,
        prefix: Tokens = (),
        depth: int = 0,
        advance: Advance | None = None,
    ) -> None:
        """Call `run` on every batch, halving the batch when memory runs out and remembering the size that fits.

        The prompts come without the front `prefix` that all of them share; where there is a `depth`, with the keys and
        values of the front in as many layers.
        """
        shared = self._shared_cache(prefix, depth) if prefix and depth else None
        pending = chunks([len(prompt) for prompt in prompts], self.batch_size)
        done = 0
        while pending:
            indices = pending.pop(0)
            group = batch(prompts, indices, len(prefix), self._pad_id(), self.device)
            options: dict[str, Any] = {"use_cache": False}
            if shared is not None:
                used = copy.deepcopy(shared)
                used.batch_repeat_interleave(len(indices))
                options = self._with_cache(used)
            try:
                run(group, options)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise RunError(
                        "memory runs out on a single prompt",
                        where=f"a prompt of {len(prompts[indices[0]])} tokens",
                        hint="use a smaller dtype, a shorter prompt or a larger device",
                    ) from None
                self.batch_size = max(1, len(indices) // 2)
                pending = halved([indices, *pending], self.batch_size)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            done += len(indices)
            if advance is not None:
                advance(done, len(prompts))

    def _shared_cache(self, prefix: Tokens, depth: int) -> Any:
        cache = self._empty_cache()
        inputs = prefix_inputs(prefix, 1, self.device)
        program = lower([NOTHING], self.layout, 1, self.device, [("resid_post", depth - 1)])
        blocks.read(self.model, inputs, program, None, self._with_cache(cache))
        return cache

    def _with_cache(self, cache: Any) -> dict[str, Any]:
        return {self._cache_argument: cache, "use_cache": True}

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.module.config)

    def _cache_can_be_shared(self, longest: int) -> bool:
        """Whether a shared front changes nothing: recurrent states cannot be repeated row by row, and padding between
        the front and the rest would count towards a sliding window that the prompts reach."""
        layers = self._empty_cache().layers
        if not all(type(layer).__name__ in _PLAIN_LAYERS for layer in layers):
            return False
        return all(longest <= getattr(layer, "sliding_window", longest) for layer in layers)

    def _pad_id(self) -> int:
        tokenizer = self.model.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)

    def _stop_ids(self) -> set[int]:
        stops = self.module.generation_config.eos_token_id
        if stops is None:
            stops = self.model.tokenizer.eos_token_id
        return set(stops) if isinstance(stops, list) else {stops}


def _start(pack: Pack, clean: Clean | None) -> int:
    """Return the layer at which a pass can start: the first that is touched, where its unmodified input is known."""
    return 0 if clean is None else pack.first_layer or 0


_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def _reduce(logits: Tensor, measure: Measure, rows: Sequence[int], times: int) -> Tensor:
    if measure.kind == "refusal_score":
        return algebra.refusal_score(logits, torch.tensor(measure.token_ids))
    assert measure.reference is not None
    return algebra.kl_nats(measure.reference[list(rows)].repeat(times, 1), logits)
