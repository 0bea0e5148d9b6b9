"""Find directions from every prompt's activations, with the estimators of statistics.

A difference in means is as long as the two sides are apart. What these estimators return has no length of its own, so
each is scaled to that of the difference in means at its place and points the same way: steering by any two of them
differs in direction alone. Where the difference is exactly zero there is nothing to find.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from refusalkit.strategy import Captured, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class PerPlace(Strategy):
    """Estimate a direction, or the rows of a subspace, at each place on its own."""

    needs: ClassVar[Literal["means", "samples"]] = "samples"

    @abstractmethod
    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        """Return [d_model] or [rank, d_model] from the samples of one place, each [prompt, d_model] float64."""

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        import torch

        assert harmful.samples is not None
        assert harmless.samples is not None
        difference = harmful.mean - harmless.mean
        found = []
        for row in range(difference.shape[0]):
            for layer in range(difference.shape[1]):
                sides = (samples[:, row, layer].double() for samples in (harmful.samples, harmless.samples))
                place = difference[row, layer]
                found.append(_alike(self.fit(*sides), place) if place.any() else None)
        shape = next((one.shape for one in found if one is not None), difference.shape[2:])
        stacked = torch.stack([torch.zeros(shape, dtype=torch.float64) if one is None else one for one in found])
        return stacked.reshape(*difference.shape[:2], *shape)


def _alike(found: Tensor, difference: Tensor) -> Tensor:
    """Give every row the length of `difference` [d_model], and the sign under which it points the same way."""
    from refusalkit import algebra

    signs = (found @ difference).sign()
    signs = signs.where(signs != 0, signs.new_ones(signs.shape))
    scaled: Tensor = algebra.unit(found) * signs[..., None] * difference.norm()
    return scaled


class Pca(PerPlace):
    """Take the first principal component of the activations (representation engineering, Zou et al. 2023, 2310.01405).

    `paired` centres each harmful prompt with a harmless one on their midpoint, which keeps what tells the two sides
    apart (as in CAST, Lee et al. 2024, 2409.05907); `pooled` centres all prompts on their common mean.
    """

    strategy: Literal["pca"] = "pca"
    pairing: Literal["paired", "pooled"] = "paired"
    """What is subtracted before the component is taken."""

    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        import torch

        if self.pairing == "paired":
            rows = _pair_differences(harmful, harmless)
        else:
            rows = torch.cat([harmful, harmless])
            rows = rows - rows.mean(0)
        component: Tensor = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        return component


class SvdSubspace(PerPlace):
    """Span the `rank` leading right singular vectors of the differences between harmful and harmless prompts.

    The first row is the difference in means projected on that span: it is what steering adds. The others complete an
    orthogonal basis, and ablation removes all of them jointly.
    """

    strategy: Literal["svd_subspace"] = "svd_subspace"
    rank: Annotated[int, Field(ge=1)] = 2
    """The dimension of the subspace."""

    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        import torch

        pairs = _pair_differences(harmful, harmless)
        _too_few(min(pairs.shape), self.rank, "rank")
        basis = torch.linalg.svd(pairs, full_matrices=False).Vh[: self.rank]
        lead = (harmful.mean(0) - harmless.mean(0)) @ basis.T
        # A rotation within the span whose first row is the lead.
        rotation = torch.linalg.qr(torch.cat([lead[:, None], torch.eye(len(lead), dtype=lead.dtype)], 1)).Q.T
        rows: Tensor = rotation @ basis
        return rows


class LogisticProbe(PerPlace):
    """Take the weights of a logistic regression that tells harmful from harmless activations (scikit-learn).

    A probe finds what separates the sides best, which need not be what the model acts on: compare its causal scores.
    """

    strategy: Literal["logistic_probe"] = "logistic_probe"
    c: Annotated[float, Field(gt=0)] = 1.0
    """Inverse strength of the L2 penalty, on activations scaled to unit mean square."""

    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        from sklearn.linear_model import LogisticRegression

        x, y = _labelled(harmful, harmless)
        scale = (x**2).mean() ** 0.5
        return _rows(LogisticRegression(C=self.c, max_iter=1000).fit(x / scale, y).coef_[0])


class Lda(PerPlace):
    """Whiten the difference in means by the covariance within the sides (linear discriminant analysis).

    The covariance is shrunk (Ledoit and Wolf 2004), because there are more dimensions than prompts. It is what
    scikit-learn estimates, shrunk and inverted by inner products of the prompts: in a second where d_model is 8192.
    """

    strategy: Literal["lda"] = "lda"
    shrinkage: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """`auto`, or the share of the covariance that is replaced by a multiple of the identity; 1 whitens nothing."""

    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        import torch

        sides = [side - side.mean(0) for side in (harmful, harmless)]
        diagonal, rows = torch.zeros(harmful.shape[1], dtype=harmful.dtype), []
        for x in sides:
            share = len(x) / sum(map(len, sides))
            kept, spread = self._shrunk(x)
            diagonal += share * spread
            rows.append(x * (share * kept / len(x)) ** 0.5)
        return _whitened(harmful.mean(0) - harmless.mean(0), diagonal, torch.cat(rows))

    def _shrunk(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the share of a side's covariance that is kept, and what is added to its diagonal [d_model]."""
        if self.shrinkage != "auto":
            return 1 - self.shrinkage, self.shrinkage * x.square().mean()
        scale = x.square().mean(0).sqrt()
        scale = scale.where(scale > 0, scale.new_ones(()))
        standard = x / scale
        (n, d), gram = x.shape, standard @ standard.T
        squares, lengths = gram.square().sum(), gram.diagonal().square().sum()
        # The covariance and its trace spread over all dimensions, mixed so that the expected error is least.
        best = (lengths - squares / n) / (squares - gram.trace() ** 2 / d)
        shrinkage = float(best.nan_to_num().clamp(0, 1))
        return 1 - shrinkage, shrinkage * standard.square().mean() * scale.square()


class Leace(PerPlace):
    """Whiten the difference in means by the covariance of all prompts, the direction that LEACE reads.

    LEACE (Belrose et al. 2023, 2306.03819) subtracts along the difference in means as much as it reads here. That is no
    orthogonal projection: ablation removes what LEACE reads, and leaves what it subtracts along. It is the direction of
    `lda` but for the shrinkage, which is linear and knows no coordinates (Bodnar et al. 2014, 1308.2608).
    """

    strategy: Literal["leace"] = "leace"

    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        import torch

        # The covariance of all prompts is that within the sides and a multiple of the difference's outer product, which
        # turns nothing: only what is within has to be estimated.
        x = torch.cat([side - side.mean(0) for side in (harmful, harmless)])
        (n, d), gram = x.shape, x @ x.T / len(x)
        trace, square = gram.trace(), gram.square().sum()
        # The covariance and its trace spread over all dimensions, mixed so that the expected error is least.
        kept = (1 - trace**2 / n / (square - trace**2 / d)).nan_to_num().clamp(0, 1)
        diagonal = ((1 - kept) * trace / d).expand(d)
        return _whitened(harmful.mean(0) - harmless.mean(0), diagonal, x * (kept / n).sqrt())


class Som(PerPlace):
    """Lay a self-organising map over harmful activations (Piras et al. 2025, 2511.08379, with MiniSom).

    Each neuron minus the mean of harmless prompts is a direction; the `rank` neurons that win most prompts are kept and
    removed jointly. A map of one neuron is the difference in means.
    """

    strategy: Literal["som"] = "som"
    rank: Annotated[int, Field(ge=1)] = 4
    """How many neurons become directions."""
    side: Annotated[int, Field(ge=1)] = 4
    """The map has `side` times `side` neurons."""
    iterations: Annotated[int, Field(ge=1)] = 2000
    """Training steps of one prompt each; the paper takes 10,000."""
    seed: int = 0
    """Seed of the map's start and of the order of prompts."""

    def fit(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        from minisom import MiniSom

        _too_few(self.side**2, self.rank, "rank")
        x = harmful.numpy()
        som = MiniSom(
            self.side,
            self.side,
            x.shape[1],
            sigma=0.33,
            learning_rate=0.01,
            topology="hexagonal",
            random_seed=self.seed,
        )
        som.random_weights_init(x)
        som.train_random(x, self.iterations)
        wins = som.activation_response(x).ravel()
        order = (-wins).argsort(kind="stable")[: self.rank]
        neurons = som.get_weights().reshape(-1, x.shape[1])[order]
        return _rows(neurons) - harmless.mean(0)


class Shuffled(Strategy):
    """Subtract the means of two random halves of all prompts: the difference that chance makes at this sample size."""

    strategy: Literal["shuffled"] = "shuffled"
    needs: ClassVar[Literal["means", "samples"]] = "samples"
    control: ClassVar[bool] = True
    seed: int = 0
    """Seed of the shuffle."""

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        import torch

        assert harmful.samples is not None
        assert harmless.samples is not None
        everything = torch.cat([harmful.samples, harmless.samples]).double()
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.seed))
        first, second = order[: harmful.n_prompts], order[harmful.n_prompts :]
        difference: Tensor = everything[first].mean(0) - everything[second].mean(0)
        # Rounding must not make a direction where all prompts are the same.
        same = (everything == everything[0]).all(-1).all(0)
        return difference.masked_fill(same[..., None], 0.0)


def _whitened(vector: Tensor, diagonal: Tensor, rows: Tensor) -> Tensor:
    """Return `(diag(diagonal) + rows^T rows)^-1 vector` [d_model], or without a diagonal what the pseudo-inverse gives.

    By Woodbury's identity no more than the inner products of the rows [n, d_model] has to be inverted.
    """
    import torch

    if not (diagonal > 1e-9 * rows.square().sum(0).mean()).all():
        if not rows.any():
            return vector
        _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
        large = singular > 1e-6 * singular[0]
        pseudo: Tensor = basis[large].T @ (basis[large] @ vector / singular[large] ** 2)
        return pseudo
    scaled = rows / diagonal
    inner = torch.eye(len(rows), dtype=rows.dtype) + scaled @ rows.T
    solved: Tensor = vector / diagonal - scaled.T @ torch.linalg.solve(inner, scaled @ vector)
    return solved


def _pair_differences(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Pair prompts in order; the longer side's rest has no partner."""
    n = min(len(harmful), len(harmless))
    return harmful[:n] - harmless[:n]


def _labelled(harmful: Tensor, harmless: Tensor) -> tuple[Any, Any]:
    import torch

    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    return torch.cat([harmful, harmless]).numpy(), labels.numpy()


def _rows(array: Any) -> Tensor:
    import torch

    return torch.from_numpy(array).double()


def _too_few(available: int, asked: int, key: str) -> None:
    from refusalkit.errors import RunError

    if asked > available:
        raise RunError(
            f"{asked} directions of {available} that there are", where=f"find.{key}", hint=f"{available} at most"
        )


ESTIMATORS = (Pca, SvdSubspace, LogisticProbe, Lda, Leace, Som, Shuffled)
