"""Hold a detector as data: what it reads of a prompt, and above which score it flags.

Both kinds are the mean over layers of a product with one vector a layer, so that a detector is understood from its
file alone: `score = mean over layers of (h[layer] @ vectors[layer])`, with `h` scaled to length one or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import Artifact, Frozen
from refusalkit.engine.engine import Engine
from refusalkit.engine.request import Capture
from refusalkit.intervals import Interval, auroc, wilson
from refusalkit.intervention import Site
from refusalkit.metric import Side

if TYPE_CHECKING:
    from refusalkit.engine.remote import RemoteEngine

Kind = Literal["projection", "latent_guard"]
Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rule:
    """Say how a prompt is scored."""

    position: int
    site: Site
    layers: tuple[int, ...]
    vectors: Tensor
    """[layer, d_model], a row for each of `layers`."""
    scaled: bool
    """Whether activations are scaled to length one first, so that the products are cosines."""

    def scores(self, prompts: Sequence[Tokens], engine: Engine | RemoteEngine) -> tuple[float, ...]:
        """Score tokenised prompts; the forward pass stops after the last of `layers`."""
        if not prompts:
            return ()
        (found,) = engine.run([Capture(prompts, (self.position,), self.site, True, self.layers)])
        states = found.samples[:, 0].double()
        states = algebra.unit(states) if self.scaled else states
        # The digits after these depend on which prompts share a batch.
        return tuple((states * self.vectors.double()).sum(-1).mean(-1).round(decimals=5).tolist())


class Area(Frozen):
    """Hold the area under the ROC curve on the test prompts with its 95% interval."""

    value: float
    low: float
    high: float


class Detector(Artifact):
    """Hold a rule, the threshold that was set on validation prompts, and what both do on test prompts."""

    position: int
    site: Site
    layers: tuple[int, ...]
    vectors: Tensor
    """[layer, d_model] float64."""
    scaled: bool
    fpr: float
    """The largest share of harmless validation prompts that may be flagged."""
    threshold: float
    """A prompt with a higher score is flagged."""
    auroc: Area
    validation: dict[Side, tuple[float, ...]]
    """The score of every validation prompt."""
    test: dict[Side, tuple[float, ...]]
    """The score of every test prompt."""
    weights: tuple[str, str, str]
    """Revision, dtype and quantization of the model that the scores are of."""
    template_hash: str

    @property
    def rule(self) -> Rule:
        """How a prompt is scored."""
        return Rule(self.position, self.site, self.layers, self.vectors, self.scaled)

    def at(self, fpr: float) -> Detector:
        """Return the detector with the threshold for another false-positive rate."""
        return self.model_copy(update={"fpr": fpr, "threshold": threshold(self.validation["harmless"], fpr)})

    def flags(self, score: float) -> bool:
        """Tell whether a prompt with this score is flagged."""
        return score > self.threshold

    def flagged(self, scores: Sequence[float]) -> Interval:
        """Return the share of prompts with these scores that are flagged, with its 95% interval."""
        return wilson([float(self.flags(score)) for score in scores])


class Projection(Detector):
    """Project the residual stream on the direction, at the position and layer it was found at."""

    stage = "projection"


class LatentGuard(Detector):
    """Compare the instruction's last token with the means of both sides, in every layer (2507.11878).

    `mean over layers of (cos(h, mean of refused harmful) - cos(h, mean of answered harmless))`.
    """

    stage = "latent_guard"


KINDS: dict[Kind, type[Detector]] = {"projection": Projection, "latent_guard": LatentGuard}


def projection(direction: Tensor, position: int, layer: int, site: Site) -> Rule:
    """Return the rule that projects on a direction [d_model]; of a subspace [rank, d_model] on its first row."""
    main = direction.reshape(-1, direction.shape[-1])[:1]
    return Rule(position, site, (layer,), algebra.unit(main.double()), scaled=False)


def latent_guard(harmful: Tensor, harmless: Tensor, position: int, site: Site) -> Rule:
    """Return the rule that compares with the mean activations of both sides, each [layer, d_model]."""
    vectors = algebra.unit(harmful.double()) - algebra.unit(harmless.double())
    return Rule(position, site, tuple(range(len(vectors))), vectors, scaled=True)


def threshold(harmless: Sequence[float], fpr: float) -> float:
    """Return the smallest of the scores above which at most a share `fpr` of them lies."""
    # A product that should be whole may come out a little below.
    allowed = math.floor(fpr * len(harmless) + 1e-9)
    return sorted(harmless, reverse=True)[allowed]


def area(test: dict[Side, tuple[float, ...]]) -> Area:
    """Measure how well scores tell the sides apart."""
    found = auroc(test["harmful"], test["harmless"])
    return Area(value=found.value, low=found.low, high=found.high)


def card(detector: Detector) -> dict[str, Any]:
    """Return what a detector is and does as JSON values."""
    return {
        "score": detector.stage,
        "position": detector.position,
        "site": detector.site,
        "layers": list(detector.layers),
        "fpr": detector.fpr,
        "threshold": detector.threshold,
        "auroc": detector.auroc.model_dump(),
        "flagged": {
            "harmless_validation": detector.flagged(detector.validation["harmless"])._asdict(),
            **{f"{side}_test": detector.flagged(scores)._asdict() for side, scores in detector.test.items()},
        },
    }


def sentence(detector: Detector) -> str:
    """Say in words what a detector reads and how well it tells the sides apart."""
    reads = f"layer {detector.layers[0]}" if len(detector.layers) == 1 else f"{len(detector.layers)} layers"
    harmless = detector.validation["harmless"]
    above = sum(map(detector.flags, harmless))
    shares = {side.replace("_", "-"): detector.flagged(scores) for side, scores in detector.test.items()}
    flags = ", ".join(
        f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}] of {found.n} {side}" for side, found in shares.items()
    )
    area = detector.auroc
    return (
        f"{detector.stage} at {reads}, position {detector.position}: flags scores above {detector.threshold:.4g}, "
        f"as {above} of {len(harmless)} harmless validation prompts have. On held-out test prompts: AUROC "
        f"{area.value:.3f} [{area.low:.3f}, {area.high:.3f}]; flags {flags}."
    )
