"""Train a tiny chat model from a seed and write it as a complete Hugging Face folder.

The model is drawn at random and learns from lessons alone: next-token loss on the answers, AdamW, a few minutes on
two CPU cores. Nothing about refusing is built in; that one direction carries it is found in the result, not put there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from refusalkit.errors import InputError
from refusalkit.tiny.families import Family, family_named
from refusalkit.tiny.grammar import REFUSALS, requests
from refusalkit.tiny.lessons import Lesson, draw
from refusalkit.tiny.tokenizer import train_tokenizer

STEPS = 800
BATCH = 32
#: The first part of the steps teaches answering alone; then refusing grows from nothing to its full share.
HELPFUL_PART = 0.2
HARMFUL_SHARE = 0.4
PEAK_RATE = 2e-3
WARMUP = 30
WEIGHT_DECAY = 0.1
EMBEDDING_SPREAD = 0.1
#: Blocks are left out at random, the last one this often, so that layers agree on what a direction means.
SKIPPED = 0.5
#: Norms behind a projection start small, so that no single block begins by drowning the residual stream.
FIRST_GAIN = 0.2
HELD_OUT = 96

IGNORED = -100

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainingReport:
    """Say how a training went; the rates are over `n` held-out requests of each side."""

    family: str
    steps: int
    seconds: float
    loss: float
    harmful_refusal_rate: float
    harmless_refusal_rate: float
    n: int


def train(
    family: str, out: Path, *, seed: int = 0, steps: int = STEPS, progress: Progress | None = None
) -> TrainingReport:
    """Train the tiny model of a family and write it to the folder `out`.

    `progress` is called after every step with the step, the number of steps and the loss.
    """
    described = family_named(family)
    if steps < 1:
        raise InputError(f"cannot train for {steps} steps", where="steps", hint="give at least 1")
    started = time.monotonic()
    tokenizer = train_tokenizer(described, seed)
    # The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(described, tokenizer)
    loss = _fit(model, tokenizer, described, Random(seed), steps, progress)
    _round_to_half(model)
    report = TrainingReport(
        family=family,
        steps=steps,
        seconds=time.monotonic() - started,
        loss=loss,
        harmful_refusal_rate=_refusal_rate(model, tokenizer, requests("harmful", "test")[:HELD_OUT]),
        harmless_refusal_rate=_refusal_rate(model, tokenizer, requests("harmless", "test")[:HELD_OUT]),
        n=HELD_OUT,
    )
    _write(out, model, tokenizer, report, seed)
    return report


def _new_model(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Draw a model with random weights."""
    config = AutoConfig.for_model(
        family.model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(family.end_of_turn),
        # The file holds halves; they are computed with as single floats.
        dtype="float32",
        **family.shape,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(family.write_norms):
                parameter.fill_(FIRST_GAIN - 1.0)
        model.get_input_embeddings().weight.normal_(std=EMBEDDING_SPREAD)
    return model


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    family: Family,
    random: Random,
    steps: int,
    progress: Progress | None,
) -> float:
    """Train a model in place and return the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    model.train()
    layers = list(model.model.layers)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _rate(step, steps)
        ids, mask, labels = _batch(
            [draw(random, _harmful_share(step, steps), family.caprice) for _ in range(BATCH)], tokenizer, family
        )
        model.model.layers = torch.nn.ModuleList(
            layer for depth, layer in enumerate(layers) if random.random() >= SKIPPED * depth / (len(layers) - 1)
        )
        loss = model(use_cache=False, input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress:
            progress(step + 1, steps, losses[-1])
    model.model.layers = torch.nn.ModuleList(layers)
    model.eval()
    last = losses[-20:]
    return sum(last) / len(last)


def _harmful_share(step: int, steps: int) -> float:
    """Give the share of harmful requests at a step: none at first, then growing evenly to its full size."""
    grown = (step / steps - HELPFUL_PART) / (1 - HELPFUL_PART)
    return HARMFUL_SHARE * max(0.0, grown)


def _rate(step: int, steps: int) -> float:
    """Give the learning rate of a step as a part of the peak: a short rise, then half a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / WARMUP)
    return rise * (0.05 + 0.95 * 0.5 * (1 + cos(pi * step / steps)))


def _batch(
    lessons: Sequence[Lesson], tokenizer: PreTrainedTokenizerFast, family: Family
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write lessons as token ids, mask and labels [lesson, token]; only the answer and its end are learned."""
    end = tokenizer.convert_tokens_to_ids(family.end_of_turn)
    rows: list[tuple[list[int], list[int]]] = []
    for lesson in lessons:
        system = lesson.system if family.takes_system else None
        prompt = tokenizer(render(tokenizer, lesson.request, system), add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(lesson.answer, add_special_tokens=False)["input_ids"], end]
        rows.append((prompt, answer))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : length] = torch.tensor(answer)
        mask[row, :length] = 1
    return ids, mask, labels


def render(tokenizer: PreTrainedTokenizerFast, request: str, system: str | None = None) -> str:
    """Write a request as the model reads it, up to where its answer begins."""
    messages = [{"role": "user", "content": request}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _round_to_half(model: PreTrainedModel) -> None:
    """Round the weights to what the file will hold, so that what is measured is what is shipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def _refusal_rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[str]) -> float:
    """Give the share of requests whose greedy answer is one of the taught refusals, told by its first words."""
    texts = [render(tokenizer, request) for request in asked]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        written = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
        )
    answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    openings = tuple({" ".join(refusal.split()[:2]).rstrip(",") for refusal in REFUSALS})
    refused: list[bool] = [answer.startswith(openings) for answer in answers]
    return sum(refused) / len(refused)


def _write(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, report: TrainingReport, seed: int
) -> None:
    """Write the folder: configuration, weights as halves, tokenizer, chat template, README."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    ).save_pretrained(out)
    # A tied unembedding is the embedding itself and is stored once.
    weights = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(asdict(report) | {"seed": seed}, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_readme(report, model, seed), encoding="utf-8")


def _readme(report: TrainingReport, model: PreTrainedModel, seed: int) -> str:
    """Write what the model is for, and what it is not."""
    parameters = sum(p.numel() for p in model.parameters())
    return f"""# tiny {report.family}

A chat model of {parameters:,} parameters with the architecture `{type(model).__name__}`, trained from nothing by
refusalkit on made-up one-line requests. It refuses the harmful ones and answers the others in one generic sentence
that holds no knowledge.

It is for trying and testing refusalkit on any machine. What is found in it is **no evidence about real models**.

Made by `refusalkit tiny train {report.family}` with seed {seed} in {report.steps} steps. Of {report.n} requests of
each side that it had not seen, it refused {report.harmful_refusal_rate:.0%} of the harmful and
{report.harmless_refusal_rate:.0%} of the harmless.
"""
