"""Choose where the two sides lie furthest apart along the direction, without running the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from refusalkit.builtin.candidates import Fraction, candidates_of, dropped, scores
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.selector import Score, SelectInputs, Selection, Selector, Subject
from refusalkit.strategy import Captured

if TYPE_CHECKING:
    from torch import Tensor

TESTED: tuple[Side, Side] = ("harmful", "harmless")


class Separation(Selector):
    """Choose where the projection on the direction tells harmful from harmless prompts best; runs no model.

    The area under the ROC curve is cross-validated: directions are found again without a fold of the training prompts,
    whose projections are then ranked (scikit-learn). Where several reach the same, as many do, the sides that are
    furthest apart for their spread (d') decide. What separates the sides need not be what the model acts on.
    """

    selector: Literal["separation"] = "separation"
    needs = "samples"
    runs_model = False
    scores_refusals = False
    finds_again = True
    meanings: ClassVar[Mapping[str, tuple[str, str]]] = {
        "auroc": ("AUROC", "Area under the ROC curve of held-out projections: 1 tells the sides apart, 0.5 is chance."),
        "d_prime": ("Distance of the sides", "Of their mean held-out projections, in standard deviations (d')."),
    }
    folds: Annotated[int, Field(ge=2, strict=True)] = 5
    """How many parts the training prompts are divided into."""
    min_auroc: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Smallest area under the curve; 0.5 is chance."""
    prune_last: Fraction = 0.2
    """Share of the last layers whose candidates are never chosen."""
    seed: Annotated[int, Field(strict=True)] = 0
    """Decides which prompts make a fold."""

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        everything = candidates_of(inputs)
        fell = dropped(everything, inputs, self.prune_last)
        auroc, distance = self._separated(inputs)
        at = {candidate: (candidate.row, candidate.layer) for candidate in everything}
        fell |= {
            c: f"AUROC below {self.min_auroc:g}" for c in everything if c not in fell and auroc[at[c]] < self.min_auroc
        }
        ranked = sorted(
            (candidate for candidate in everything if candidate not in fell),
            key=lambda candidate: (-auroc[at[candidate]].item(), -distance[at[candidate]].item()),
        )
        best = ranked[0] if ranked else None
        known = {
            c: Score(
                c.position,
                c.layer,
                None,
                None,
                None,
                "",
                {"auroc": auroc[at[c]].item(), "d_prime": distance[at[c]].item()},
            )
            for c in everything
            if inputs.directions[at[c]].isfinite().all()
        }
        miss = max(everything, key=lambda candidate: auroc[at[candidate]].item())
        return Selection(
            scores(everything, fell, best, known),
            None,
            None,
            nearest_miss=f"{miss} reaches an AUROC of {auroc[at[miss]].item():.3f}: {fell.get(miss)}",
            hint="lower `select.min_auroc` or `select.prune_last`, use more prompts, or capture other positions",
        )

    def _separated(self, inputs: SelectInputs) -> tuple[Tensor, Tensor]:
        """Return AUROC and d', means over folds: two [position, layer] float64."""
        import torch
        from sklearn.metrics import roc_auc_score

        found, places = [], inputs.directions.shape[:2]
        for training, held_out in self._divided(inputs.captured):
            assert inputs.find is not None
            directions = inputs.find(training)
            leading = (directions if directions.ndim == 3 else directions[:, :, 0]).nan_to_num(posinf=0, neginf=0)
            # [prompt, position, layer] of each side.
            along = [torch.einsum("npld,pld->npl", held_out[side].double(), leading) for side in TESTED]
            labels = torch.cat([torch.full((len(side),), 1.0 - number) for number, side in enumerate(along)])
            together = torch.cat(along).flatten(1)
            auroc = [roc_auc_score(labels.numpy(), column.numpy()) for column in together.T]
            spread = torch.stack([side.var(0) for side in along]).mean(0).sqrt()
            distance = (along[0].mean(0) - along[1].mean(0)) / spread.where(spread > 0, torch.inf)
            found.append((torch.tensor(auroc, dtype=torch.float64).reshape(places), distance))
        first, second = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
        return first, second

    def _divided(self, captured: Mapping[Side, Captured]) -> Iterator[tuple[dict[Side, Captured], dict[Side, Tensor]]]:
        """Yield what each fold is found from, and the samples it is tested on; other sides are never held out."""
        from sklearn.model_selection import KFold

        least = min(captured[side].n_prompts for side in TESTED)
        # The spread of a held-out part takes two prompts.
        if least < 2 * self.folds:
            raise RunError(
                f"{self.folds} folds of {least} prompts",
                where="select.folds",
                hint=f"{least // 2} at most, or more prompts",
            )
        splitter = KFold(self.folds, shuffle=True, random_state=self.seed)
        parts = zip(*(splitter.split(range(captured[side].n_prompts)) for side in TESTED), strict=True)
        for fold in parts:
            training, held_out = dict(captured), {}
            for side, (kept, left) in zip(TESTED, fold, strict=True):
                samples = captured[side].samples
                assert samples is not None
                training[side] = Captured(samples[kept].double().mean(0), len(kept), samples[kept])
                held_out[side] = samples[left]
            yield training, held_out
