"""Ask a model on an NDIF server what stages and selectors ask of one on this machine.

The requests that are made together travel as one job. Nothing that saves time here alone is done: prompts run whole,
one intervention at a time; batches and programs are what a job can be cut between. There are no weights on this
machine; the model's modules are known from its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.checkpoint import Checkpoint
from refusalkit.engine import work
from refusalkit.engine.batch import Batch, Tokens, batch, check_lengths, chunks, targets
from refusalkit.engine.engine import DEFAULT_BATCH_SIZE, Samples
from refusalkit.engine.jobs import Call, Jobs
from refusalkit.engine.layout import layout_of
from refusalkit.engine.ledger import Ledger
from refusalkit.engine.lower import Program, counted_from, lower
from refusalkit.engine.request import (
    Capture,
    CompletionKL,
    Completions,
    Cosines,
    Likelihoods,
    Losses,
    Opened,
    Openings,
    Projections,
    Reading,
    Readings,
    Request,
    Scores,
    States,
)
from refusalkit.engine.server import Server, chosen_host
from refusalkit.engine.weights import Edited
from refusalkit.errors import RunError
from refusalkit.intervention import NOTHING, Intervention, Site
from refusalkit.selector import Advance, Attribution, Measure

CPU = torch.device("cpu")
#: What is asked, and what to make of the answer.
Question = tuple[Call, Callable[[Any], Any]]


def connect(checkpoint: Checkpoint, folder: Path, tell: Callable[[str], None]) -> RemoteEngine:
    """Return an engine for a model on the server that the user chose; jobs are written down in `folder`.

    Raises `InputError` when no server is chosen. Nothing is sent yet.
    """
    import nnsight
    from nnsight.modeling.transformers import TransformersModel

    section = checkpoint.section
    nnsight.register("refusalkit")
    options = {"trust_remote_code": True} if section.trust_remote_code else {}
    model = TransformersModel(
        checkpoint.source, task="text-generation", tokenizer=checkpoint.tokenizer, revision=section.revision, **options
    )
    server = Server(chosen_host(section.host), model_key(checkpoint), section.id)
    batch_size = None if section.batch_size == "auto" else section.batch_size
    return RemoteEngine(model, checkpoint, Jobs(server, model, Ledger(folder), tell), batch_size)


def model_key(checkpoint: Checkpoint) -> str:
    """Return the name under which nnsight's servers know a model."""
    import json

    section = checkpoint.section
    named: dict[str, Any] = {"repo_id": checkpoint.source, "revision": section.revision}
    if section.trust_remote_code:
        named["trust_remote_code"] = True
    named["task"] = "text-generation"
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(named)}"


class RemoteEngine:
    """Run one model on a server."""

    def __init__(self, model: Any, checkpoint: Checkpoint, jobs: Jobs, batch_size: int | None = None) -> None:
        self.module: Any = model._module
        self.adapter = checkpoint.adapter
        self.layout = layout_of(self.module, checkpoint.adapter)
        self.tokenizer = checkpoint.tokenizer
        self.jobs = jobs
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self.n_layers = checkpoint.n_layers
        self.d_model = checkpoint.d_model
        self.prompt_passes = 0.0
        self._stops = _stop_ids(checkpoint, self.module)

    @property
    def device(self) -> str:
        """Where the model runs: the server's address."""
        return self.jobs.server.host

    @property
    def dtype(self) -> str:
        """The type of the weights, which the server decides and does not tell."""
        return "the server's dtype"

    def run(self, requests: Sequence[Request], advance: Advance | None = None) -> list[Any]:
        """Answer requests that are made together, in one job where the server allows it."""
        questions = [self.question(request) for request in requests]
        answers = self.jobs.run([call for call, _ in questions], advance)
        return [read(answer) for (_, read), answer in zip(questions, answers, strict=True)]

    # -- what selectors and tests ask for one at a time --------------------------------------------------------

    def capture(
        self,
        prompts: Sequence[Tokens],
        positions: Sequence[int],
        site: Site = "resid_pre",
        *,
        keep_samples: bool = False,
        advance: Advance | None = None,
    ) -> Samples:
        """Read the residual stream at `positions` of every layer."""
        found: Samples = self.run([Capture(prompts, positions, site, keep_samples)], advance)[0]
        return found

    def logits(self, prompts: Sequence[Tokens], intervention: Intervention | None = None) -> Tensor:
        """Return the last-position logits [prompt, d_vocab]: a large download."""
        found: list[Reading] = self.run([Readings(prompts, [intervention or NOTHING], (0,), keep_logits=True)])[0]
        assert found[0].logits is not None
        return found[0].logits

    def measure(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        measure: Measure,
        advance: Advance | None = None,
    ) -> Tensor:
        """Reduce every prompt's last-position logits under every intervention: [intervention, prompt] float64."""
        found: Tensor = self.run([Scores(prompts, interventions, measure)], advance)[0]
        return found

    def mean_states(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        layers: Sequence[int],
        advance: Advance | None = None,
    ) -> Tensor:
        """Return what blocks hand on at the prompts' last token, averaged: [intervention, layer, d_model] float64."""
        found: Tensor = self.run([States(prompts, interventions, layers)], advance)[0]
        return found

    def generate(
        self,
        prompts: Sequence[Tokens],
        intervention: Intervention | None = None,
        max_new_tokens: int = 64,
        advance: Advance | None = None,
    ) -> list[Tokens]:
        """Return each prompt's greedy completion as token ids, without the end-of-turn token that ended it."""
        found: list[Tokens] = self.run([Completions(prompts, intervention or NOTHING, max_new_tokens)], advance)[0]
        return found

    def attribute(
        self, prompts: Sequence[Tokens], bases: Tensor, site: Site, measures: Sequence[Measure]
    ) -> list[Attribution]:
        """Refuse: gradients do not pass the process in which a server runs foreign code."""
        raise RunError("a server computes no gradients for strangers", where=self.device, hint="run it locally")

    @contextmanager
    def edited_weights(self, basis: Tensor, keeps_norms: bool = False) -> Iterator[Edited]:
        """Refuse: others use the same weights."""
        raise RunError("nobody may edit weights that others use", where=self.device, hint="run it locally")
        yield

    # -- requests as tasks -------------------------------------------------------------------------------------

    def question(self, request: Request) -> Question:
        """Return a request as a task, and what to make of its answer."""
        makers: dict[type[Request], Callable[[Any], Question]] = {
            Capture: self._capture,
            Scores: self._scores,
            States: self._states,
            Openings: self._openings,
            Readings: self._readings,
            Completions: self._completions,
            Losses: self._losses,
            Likelihoods: self._likelihoods,
            Cosines: self._cosines,
            CompletionKL: self._completion_kl,
            Projections: self._projections,
        }
        return makers[type(request)](request)

    def _capture(self, request: Capture) -> Question:
        check_lengths(request.prompts, request.positions)
        groups = self._batches(request.prompts)
        n_prompts = len(request.prompts)
        fixed = (self._reads(request.site, request.layers), tuple(request.positions))
        if not request.keep_samples:
            call = Call(work.capture_sums, _inputs(groups), fixed, _per_batch(groups))
            return call, lambda total: Samples(total * work.SPREAD / n_prompts, n_prompts, None)
        call = Call(work.capture_samples, _inputs(groups), fixed, _per_batch(groups))

        def sampled(found: list[Tensor]) -> Samples:
            samples = _in_order(groups, found).float()
            return Samples(samples.double().sum(0) / n_prompts, n_prompts, samples)

        return call, sampled

    def _scores(self, request: Scores) -> Question:
        measure, n_prompts = request.measure, len(request.prompts)
        # A mean that can be given up is computed in four parts, as on this machine.
        size = self.batch_size if measure.stop_above is None else max(1, -(-n_prompts // 4))
        groups = self._batches(request.prompts, size)
        reference = measure.reference
        batches = tuple(
            (group.repeated(1), None if reference is None else reference[list(group.indices)]) for group in groups
        )
        token_ids = torch.tensor(measure.token_ids) if measure.kind == "refusal_score" else None
        limit = None if measure.stop_above is None else measure.stop_above * n_prompts
        call = self._per_program(work.scores, request.interventions, groups, (batches, token_ids, limit))
        return call, lambda found: torch.stack([_in_order(groups, [values]) for values in found])

    def _states(self, request: States) -> Question:
        groups = self._batches(request.prompts)
        reads: list[tuple[Site, int]] = [("resid_post", layer) for layer in request.layers]
        programs = tuple(lower([each], self.layout, 1, CPU, reads) for each in request.interventions)
        self.prompt_passes += (len(programs) - 1) * len(request.prompts)
        call = Call(work.states, programs, (_inputs(groups),), _per_batch(groups) * len(groups))
        # Kept in forward order, whatever the order they are asked for in.
        order = [sorted(request.layers).index(layer) for layer in request.layers]
        return call, lambda found: torch.stack(found)[:, order] / len(request.prompts)

    def _readings(self, request: Readings) -> Question:
        groups = self._batches(request.prompts)
        fixed = (_inputs(groups), torch.tensor(request.token_ids), request.keep_logits)

        def numbers(found: list[Tensor]) -> list[Reading]:
            step = 2 if request.keep_logits else 1
            made = []
            for place in range(0, len(found), step):
                rows = _in_order(groups, [found[place]])
                logits = algebra.widen(_in_order(groups, [found[place + 1]])) if request.keep_logits else None
                made.append(Reading(rows[:, 0], rows[:, 1], bool(rows[:, 2].all()), bool(rows[:, 3].any()), logits))
            return made

        return self._per_program(work.readings, request.interventions, groups, fixed), numbers

    def _openings(self, request: Openings) -> Question:
        groups = [self._batches(prompts) for prompts in request.groups]
        everything = tuple(_inputs(each) for each in groups)
        call = Call(
            work.openings,
            (everything,),
            (request.token_ids, request.most),
            sum(_per_batch(each) * len(each) for each in groups),
        )

        def probabilities(found: list[Tensor]) -> Opened:
            rows = (_in_order(each, [part]) for each, part in zip(groups, found[1:], strict=True))
            return Opened(tuple(found[0].tolist()), tuple(rows))

        return call, probabilities

    def _completions(self, request: Completions) -> Question:
        groups = self._batches(request.prompts)
        inputs = tuple(
            {name: tensor for name, tensor in group.repeated(1).items() if name != "position_ids"} for group in groups
        )
        options = {
            "max_new_tokens": request.max_new_tokens,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": self._pad_id(),
        }
        blocks = [self.layout.block(layer) for layer in range(self.n_layers)]
        before = dict(zip(blocks, [self.adapter.embedding, *blocks], strict=False))
        fixed = (self._program(request.intervention), options, before)
        most = _per_batch(groups) + request.max_new_tokens * max(len(group.indices) for group in groups)

        def written(found: list[Tensor]) -> list[Tokens]:
            completions: dict[int, Tokens] = {}
            for group, rows in zip(groups, found, strict=True):
                for index, row in zip(group.indices, rows.tolist(), strict=True):
                    ends = [place for place, token in enumerate(row) if token in self._stops]
                    completions[index] = tuple(row[: ends[0]] if ends else row)
            return [completions[index] for index in range(len(request.prompts))]

        return Call(work.completions, inputs, fixed, most), written

    def _losses(self, request: Losses) -> Question:
        call, scored = self._likelihoods(request)
        counts = torch.tensor([len(completion) for completion in request.completions])
        return call, lambda found: (-scored(found)[0], counts)

    def _likelihoods(self, request: Losses | Likelihoods) -> Question:
        counts = torch.tensor([len(completion) for completion in request.completions])
        whole = [prompt + made for prompt, made in zip(request.prompts, request.completions, strict=True)]
        groups = self._batches(whole)
        program = self._program(request.intervention)
        items = []
        for group in groups:
            width, ends = targets(group, counts)
            counted = counted_from(program, counts[list(group.indices), None])
            items.append((group.repeated(1), counted, ends, width))

        def scored(found: list[Tensor]) -> tuple[Tensor, Tensor]:
            sums, greedy = _in_order(groups, found).unbind(1)
            return sums, greedy.bool()

        return Call(work.likelihoods, tuple(items), (), _per_batch(groups)), scored

    def _cosines(self, request: Cosines) -> Question:
        check_lengths(request.prompts, (request.position,))
        groups = self._batches(request.prompts)
        fixed = (self._reads(request.site), request.position, algebra.unit(request.direction.float()).cpu())
        call = Call(work.cosines, _inputs(groups), fixed, _per_batch(groups))
        return call, lambda found: _in_order(groups, found)

    def _completion_kl(self, request: CompletionKL) -> Question:
        counts = torch.tensor([len(completion) for completion in request.completions])
        whole = [prompt + made for prompt, made in zip(request.prompts, request.completions, strict=True)]
        groups = self._batches(whole)
        programs = [self._program(intervention) for intervention in request.interventions]
        self.prompt_passes += len(programs) * len(whole)
        items = []
        for group in groups:
            width, (_, mask) = targets(group, counts)
            counted = tuple(counted_from(program, counts[list(group.indices), None]) for program in programs)
            items.append((group.repeated(1), counted, mask, width))
        call = Call(work.completion_kl, tuple(items), (), _per_batch(groups) * (1 + len(programs)))
        return call, lambda found: (_in_order(groups, found).T, counts)

    def _projections(self, request: Projections) -> Question:
        place = request.place
        check_lengths(request.prompts, (place.position,))
        groups = self._batches(request.prompts)
        reads: list[tuple[Site, int]] = [(place.site, place.layer)]
        programs = tuple(lower([each], self.layout, 1, CPU, reads) for each in request.interventions)
        self.prompt_passes += (len(programs) - 1) * len(request.prompts)
        fixed = (_inputs(groups), place.position, algebra.unit(request.direction.double()).cpu())
        call = Call(work.projections, programs, fixed, _per_batch(groups) * len(groups))
        return call, lambda found: torch.stack([_in_order(groups, [values]) for values in found])

    # -- batches and programs ----------------------------------------------------------------------------------

    def _batches(self, prompts: Sequence[Tokens], size: int | None = None) -> list[Batch]:
        self.prompt_passes += len(prompts)
        groups = chunks([len(prompt) for prompt in prompts], min(size or self.batch_size, self.batch_size))
        return [batch(prompts, indices, 0, self._pad_id(), CPU) for indices in groups]

    def _per_program(
        self, task: work.Task, interventions: Sequence[Intervention], groups: Sequence[Batch], fixed: tuple[Any, ...]
    ) -> Call:
        programs = tuple(self._program(intervention) for intervention in interventions)
        self.prompt_passes += (len(programs) - 1) * sum(len(group.indices) for group in groups)
        return Call(task, programs, fixed, _per_batch(groups) * len(groups))

    def _program(self, intervention: Intervention) -> Program:
        # One intervention needs the same tensors for any number of rows.
        return lower([intervention], self.layout, 1, CPU)

    def _reads(self, site: Site, layers: Sequence[int] | None = None) -> Program:
        return lower([NOTHING], self.layout, 1, CPU, [(site, layer) for layer in layers or range(self.n_layers)])

    def _pad_id(self) -> int:
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _stop_ids(checkpoint: Checkpoint, module: Any) -> set[int]:
    """Return the tokens at which generation ends on the server, which loads the checkpoint's own settings."""
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(checkpoint.source, revision=checkpoint.section.revision)
    except OSError:
        settings = module.generation_config
    stops = settings.eos_token_id
    if stops is None:
        stops = checkpoint.tokenizer.eos_token_id
    return set(stops) if isinstance(stops, list) else {stops}


def _inputs(groups: Sequence[Batch]) -> tuple[dict[str, Tensor], ...]:
    return tuple(group.repeated(1) for group in groups)


def _per_batch(groups: Sequence[Batch]) -> float:
    """Return the most tokens that one batch passes through the model."""
    return float(max(group.attention_mask.numel() for group in groups))


def _in_order(groups: Sequence[Batch], found: Sequence[Tensor]) -> Tensor:
    """Join rows that come in the batches' order and put them into the prompts' order."""
    rows = torch.cat(list(found))
    order = [index for group in groups for index in group.indices]
    sorted_rows = torch.empty_like(rows)
    sorted_rows[order] = rows
    return sorted_rows
