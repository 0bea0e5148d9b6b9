"""Choose one of the directions found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from refusalkit.arithmetic import Find
from refusalkit.artifacts import Activations, Candidates, Choice, PromptSplits, ScoreRow
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.selector import SelectInputs, Selection, Selector
from refusalkit.stages.bench import Bench
from refusalkit.stages.find import cosines, directions_from
from refusalkit.stages.prompts import check_enough
from refusalkit.stages.states import states_everywhere
from refusalkit.strategy import Captured


def select(
    selector: Selector, found: tuple[Find, Activations, Candidates], splits: PromptSplits, bench: Bench
) -> Choice:
    """Let the selector choose on the validation prompts; raises `RunError` when nothing survives."""
    section, activations, candidates = found

    def find(captured: Mapping[Side, Captured], **options: Any) -> Tensor:
        return directions_from(section.model_copy(update=options), captured)

    for side in selector.sides:
        check_enough(splits, side, "validation")
    validation = {side: bench.tokens(splits.of(side, "validation")) for side in selector.sides}
    selection = selector.select(
        SelectInputs(
            directions=candidates.directions,
            positions=candidates.positions,
            site=candidates.site,
            opener_ids=splits.openers.token_ids,
            advance=bench.progress.advance,
            **validation,
            training={side: bench.tokens(splits.of(side, "train")) for side in activations.captured},
            captured=activations.captured,
            states=states_everywhere(splits, bench, candidates.site, candidates.positions),
            find=None if section.needs_model else find,
        ),
        bench.engine,
    )
    chosen = next((score for score in selection.scores if score.status == "chosen"), None)
    if chosen is None:
        raise nothing_survived(selection)
    row = candidates.positions.index(chosen.position)
    direction = _direction(selection, candidates, (row, chosen.layer))
    difference = activations.harmful_mean - activations.harmless_mean
    return Choice(
        selector=selector.selector,
        position=chosen.position,
        layer=chosen.layer,
        direction=direction.clone(),
        scores=tuple(
            ScoreRow(
                position=score.position,
                layer=score.layer,
                refusal_score=score.refusal_score,
                induced_score=score.induced_score,
                kl_nats=score.kl_nats,
                status=score.status,
                extra=score.extra,
            )
            for score in selection.scores
        ),
        baseline_refusal_score=selection.baseline_refusal_score,
        baseline_harmless_score=selection.baseline_harmless_score,
        cosine=cosines(direction, difference[row, chosen.layer]).item(),
        meanings=dict(selector.meanings),
    )


def _direction(selection: Selection, candidates: Candidates, at: tuple[int, int]) -> Tensor:
    direction = candidates.directions[at] if selection.direction is None else selection.direction
    if not direction.any():
        raise RunError(
            f"the direction at position {candidates.positions[at[0]]}, layer {at[1]} is zero: nothing was found there",
            where="select",
            hint="choose another place: at layer 0 template tokens are the same in every prompt, and a direction "
            "that is trained is found at one place",
        )
    return direction


def nothing_survived(selection: Selection) -> RunError:
    """Say how many candidates fell to which filter, and what came closest."""
    counts = Counter(score.status for score in selection.scores)
    fell = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return RunError(
        f"none of {len(selection.scores)} candidates survives: {fell}. Nearest miss: {selection.nearest_miss}",
        where="select",
        hint=selection.hint,
    )
