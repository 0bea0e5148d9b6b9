"""Settle which prompts are used: find the refusal openers, then keep the prompts the model treats as they are meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from refusalkit import algebra
from refusalkit.artifacts import FilterCount, Openers, PromptSplits, Split, Template
from refusalkit.engine.request import Opened, Openings
from refusalkit.errors import RunError
from refusalkit.metric import SIDES, Side
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
    over_refusal: Mapping[Split, tuple[str, ...]] | None = None
    openers_needed: bool = True
    """Whether something rests on refusal scores, so that a run without openers means nothing."""

    @property
    def sides(self) -> dict[Side, Mapping[Split, tuple[str, ...]]]:
        """The prompts of every side there is, by split."""
        present = {side: getattr(self, side) for side in SIDES}
        return {side: splits for side, splits in present.items() if splits is not None}


def settle(request: Request, bench: Bench) -> PromptSplits:
    """Choose the openers on the training prompts, then filter train and validation by refusal score.

    Raises `RunError` when the model refuses no harmful prompt or too few prompts are left.
    """
    sides = request.sides
    parts: list[tuple[Side, Split]] = [(side, split) for side in sides for split in ("train", "validation")]
    # Training splits first, and of these harmful before harmless: the first two are compared.
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
        passes = scores < 0 if side == "harmless" else scores > 0
        prompts = sides[side][split]
        if request.filter:
            kept[side][split] = tuple(p for p, good in zip(prompts, passes.tolist(), strict=True) if good)
        counts.append(
            FilterCount(
                side=side, split=split, kept=len(kept[side][split]), of=len(prompts), mean_score=scores.mean().item()
            )
        )
    before, after = bench.template.around()
    splits = PromptSplits(
        **kept,
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
    for side, split in parts:
        # Whether the model over-refuses is a result, which only those who find from it depend on.
        if side != "over_refusal":
            check_enough(splits, side, split)
    return splits


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
    if not found and not request.openers_needed:
        return Openers(
            texts=(), token_ids=(), source="found", reason="no token opens a refusal, and nothing in this run needs one"
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


def check_enough(splits: PromptSplits, side: Side, split: Split) -> None:
    """Raise `RunError` when the filter has left too few prompts of a side and split to find or select on."""
    for count in splits.filtered:
        if (count.side, count.split) != (side, split) or count.kept >= min(FEWEST, count.of):
            continue
        does = "answers" if side == "harmless" else "refuses"
        raise RunError(
            f"the model {does} only {count.kept} of {count.of} {side} {split} prompts (mean refusal score "
            f"{count.mean_score:.2f} nats with the openers {', '.join(map(repr, splits.openers.texts))})",
            where=f"prompts.{side}",
            hint="there is little over-refusal to repair in this model; use other prompts, or find another direction"
            if side == "over_refusal"
            else "use prompts it treats as they are meant, name the openers in `select.openers`, or set "
            "`prompts.filter: false`",
        )
