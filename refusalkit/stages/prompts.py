"""Settle which prompts are used: find the refusal openers, then keep the prompts the model treats as they are meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from refusalkit import algebra
from refusalkit.artifacts import FilterCount, Openers, PromptSplits, Split, Template
from refusalkit.engine.request import Opened, Openings
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.stages.bench import Bench

#: Below this many prompts a mean or a score says nothing.
FEWEST = 4
#: The family's openers are taken when they separate the sides at least this well, next to the best tokens found.
FAMILY_SHARE = 0.5
#: A found opener is at least this much more probable on harmful prompts than on harmless ones.
SMALLEST_GAP = 0.05
MOST_OPENERS = 4


@dataclass(frozen=True)
class Request:
    """Hold what was asked of this stage, resolved by the plan."""

    harmful: Mapping[Split, tuple[str, ...]]
    harmless: Mapping[Split, tuple[str, ...]]
    positions: tuple[int, ...]
    filter: bool
    openers: Literal["auto"] | tuple[str | int, ...]
    family_openers: tuple[str, ...]
    duplicates_dropped: int = 0


def settle(request: Request, bench: Bench) -> PromptSplits:
    """Choose the openers on the training prompts, then filter train and validation by refusal score.

    Raises `RunError` when the model refuses no harmful prompt or too few prompts are left.
    """
    sides: dict[Side, Mapping[Split, tuple[str, ...]]] = {"harmful": request.harmful, "harmless": request.harmless}
    parts: list[tuple[Side, Split]] = [(side, split) for side in sides for split in ("train", "validation")]
    # Both training splits first: these are compared.
    order = sorted(parts, key=lambda part: part[1])
    named = () if request.openers == "auto" else bench.template.opener_ids(request.openers)
    asked = Openings(
        [bench.tokens(sides[side][split]) for side, split in order],
        named or bench.template.opener_ids(request.family_openers),
        MOST_OPENERS,
    )
    (opened,) = bench.engine.run([asked], bench.advance("refusal scores"))
    probabilities = dict(zip(order, opened.probabilities, strict=True))
    for (side, split), found in probabilities.items():
        if not found.isfinite().all():
            raise RunError(
                f"the model's logits on {side} {split} prompts are not numbers",
                where="prompts",
                hint="float16 overflows on many models: load with `model.dtype: bfloat16` or `float32`; "
                "where it is one of these, a weight of the checkpoint is damaged",
            )
    openers = _openers(request, opened, bench)
    kept: dict[Side, dict[Split, tuple[str, ...]]] = {side: dict(splits) for side, splits in sides.items()}
    counts = []
    columns = [opened.token_ids.index(token) for token in openers.token_ids]
    for side, split in parts:
        scores = algebra.log_odds(probabilities[side, split][:, columns].sum(-1))
        passes = scores > 0 if side == "harmful" else scores < 0
        prompts = sides[side][split]
        if request.filter:
            kept[side][split] = tuple(p for p, good in zip(prompts, passes.tolist(), strict=True) if good)
        counts.append(
            FilterCount(
                side=side, split=split, kept=len(kept[side][split]), of=len(prompts), mean_score=scores.mean().item()
            )
        )
    if request.filter:
        _check_enough(counts, openers)
    before, after = bench.template.around()
    return PromptSplits(
        harmful=kept["harmful"],
        harmless=kept["harmless"],
        positions=request.positions,
        position_tokens=bench.template.labels(request.positions),
        template=Template(
            hash=bench.template.digest(),
            prefix=before,
            suffix=after,
            suffix_tokens=tuple(bench.template.tokenizer.decode([token]) for token in bench.template.suffix()),
        ),
        openers=openers,
        filtered=tuple(counts) if request.filter else (),
        duplicates_dropped=request.duplicates_dropped,
    )


def _openers(request: Request, opened: Opened, bench: Bench) -> Openers:
    """Decide which tokens open a refusal."""
    if request.openers != "auto":
        ids = bench.template.opener_ids(request.openers)
        texts = tuple(o if isinstance(o, str) else bench.template.tokenizer.decode([o]) for o in request.openers)
        return Openers(texts=texts, token_ids=ids, source="recipe", reason="the recipe names them")
    harmful, harmless = (rows.mean(0).tolist() for rows in opened.probabilities[:2])
    gap = {token: p - q for token, p, q in zip(opened.token_ids, harmful, harmless, strict=True)}
    found = [token for token in sorted(gap, key=lambda t: -gap[t])[:MOST_OPENERS] if gap[token] >= SMALLEST_GAP]
    best = sum(gap[token] for token in found)
    family = bench.template.opener_ids(request.family_openers)
    share = sum(gap[token] for token in family)
    if share > 0 and share >= FAMILY_SHARE * best:
        return Openers(
            texts=request.family_openers,
            token_ids=family,
            source="family",
            reason=f"the family's own; {share:.0%} more probable on harmful than on harmless training prompts",
        )
    if not found:
        raise RunError(
            "no token opens the answer to harmful prompts more often than to harmless ones: this model does not "
            "refuse these prompts",
            where="select.openers",
            hint="use harmful prompts that it refuses, or name the openers of its refusals in `select.openers`",
        )
    return Openers(
        texts=tuple(bench.template.tokenizer.decode([token]) for token in found),
        token_ids=tuple(found),
        source="found",
        reason=f"found on the training prompts, {best:.0%} more probable on harmful ones; the family's "
        f"({', '.join(map(repr, request.family_openers))}) reach {share:.0%}",
    )


def _check_enough(counts: list[FilterCount], openers: Openers) -> None:
    for count in counts:
        if count.kept >= min(FEWEST, count.of):
            continue
        does = "refuses" if count.side == "harmful" else "answers"
        raise RunError(
            f"the model {does} only {count.kept} of {count.of} {count.side} {count.split} prompts (mean refusal score "
            f"{count.mean_score:.2f} nats with the openers {', '.join(map(repr, openers.texts))})",
            where=f"prompts.{count.side}",
            hint="use prompts it treats as they are meant, name the openers in `select.openers`, or set "
            "`prompts.filter: false`",
        )
