"""Do the tensor arithmetic of directions: project, remove, add, score.

Everything here is a pure function of tensors and imports torch alone, because its source travels to an NDIF server
and runs inside the trace. Projections and scores are computed in float32 or wider whatever the model's dtype: in
bfloat16 a projection of 40 leaves 0.055 behind, and probabilities rounded before the logarithm move the KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Keeps both logarithms of the refusal score finite; it bounds the score to +-18.42 nats (Arditi et al., 2024).
SCORE_EPSILON = 1e-8
#: Stands inside both logarithms of the KL, as in the authors' code, so that scores are comparable with theirs.
KL_EPSILON = 1e-6


def unit(vector: Tensor) -> Tensor:
    """Scale `vector` [..., d_model] to length one; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    scaled: Tensor = vector / norm.where(norm > 0, torch.ones_like(norm))
    return scaled


def orthonormal(vectors: Tensor) -> Tensor:
    """Return an orthonormal basis [rank, d_model] of the span of `vectors` [n, d_model].

    Directions that add less than 1e-6 of the largest singular value are dropped, so a repeated vector counts once.
    Of a single vector it is the unit vector, which can be differentiated.
    """
    wide = vectors.double()
    if len(wide) == 1:
        return unit(wide[wide.any(-1)])
    _, singular, rows = torch.linalg.svd(wide, full_matrices=False)
    keep = singular > 1e-6 * singular.max()
    basis: Tensor = rows[keep]
    return basis


def widen(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged when it is wider already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def edit(x: Tensor, remove: Tensor | None, add: Tensor | None) -> Tensor:
    """Remove the subspace `remove` from `x` and then add `add`; the result has the dtype of `x`.

    x [prompt, position, d_model], or [prompt * position, d_model] as experts return it; remove [rank, d_model] or
    [prompt, rank, d_model], rows orthonormal; add [d_model] or [prompt, 1, d_model].
    """
    wide = widen(x)
    if x.ndim == 2:
        prompts = [tensor.shape[0] for tensor in (remove, add) if tensor is not None and tensor.ndim == 3]
        wide = wide.reshape(*prompts[:1], -1, x.shape[-1])
    if remove is not None:
        basis = remove.to(device=wide.device, dtype=wide.dtype)
        wide = wide - (wide @ basis.transpose(-1, -2)) @ basis
    if add is not None:
        wide = wide + add.to(device=wide.device, dtype=wide.dtype)
    return wide.to(x.dtype).reshape(x.shape)


def hidden(output: Tensor | tuple[Tensor, ...], prompts: int) -> Tensor:
    """Return the hidden state [prompt, position, d_model] of a module's output.

    Some modules wrap it in a tuple, and some with experts return it flat, as [prompt * position, d_model].
    """
    state = output[0] if isinstance(output, tuple) else output
    return state if state.ndim == 3 else state.reshape(prompts, -1, state.shape[-1])


def edit_output(
    output: Tensor | tuple[Tensor, ...], remove: Tensor | None, add: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Apply `edit` to a module's output and keep whatever else the module returns beside the hidden state."""
    if isinstance(output, tuple):
        return (edit(output[0], remove, add), *output[1:])
    return edit(output, remove, add)


def refusal_score(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-odds, in nats, that the next token opens a refusal: [prompt] from logits [prompt, d_vocab].

    `log(P + eps) - log(1 - P + eps)` with P the total probability of `token_ids` (Arditi et al. 2024, section 3.2).
    Computed in float64.
    """
    probability = logits.double().softmax(-1)[:, token_ids.to(logits.device)].sum(-1)
    return (probability + SCORE_EPSILON).log() - (1 - probability + SCORE_EPSILON).log()


def kl_nats(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference || logits) of the next-token distributions in nats: [prompt] from two [prompt, d_vocab].

    Computed in float64, with the authors' epsilon inside both logarithms.
    """
    p = reference.to(logits.device).double().softmax(-1)
    q = logits.double().softmax(-1)
    return (p * ((p + KL_EPSILON).log() - (q + KL_EPSILON).log())).sum(-1)


def drawn_log_probability(logits: Tensor, quantile: Tensor) -> Tensor:
    """Return the log-probability [prompt] of the next token at `quantile` [prompt] of the distribution's sum.

    With quantiles spread evenly the tokens are a sample of the distribution, and half the squared change of their
    log-probability has the expectation of the KL to second order (the Fisher information). Computed in float64.
    """
    log_probability = logits.double().log_softmax(-1)
    drawn = (log_probability.detach().exp().cumsum(-1) < quantile[:, None].to(logits.device)).sum(-1)
    return log_probability.gather(-1, drawn.clamp(max=logits.shape[-1] - 1)[:, None])[:, 0]


def completion_loss(logits: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Sum the cross-entropy, in nats, of the tokens that `mask` marks: [prompt].

    logits [prompt, position, d_vocab] predict the token one position later; token_ids, mask [prompt, position].
    """
    log_probability = logits[:, :-1].double().log_softmax(-1)
    picked = log_probability.gather(-1, token_ids[:, 1:, None].to(logits.device))[..., 0]
    return -(picked * mask[:, 1:].to(logits.device)).sum(-1)


def orthogonalize(weight: Tensor, basis: Tensor, axis: int) -> Tensor:
    """Remove `basis` [rank, d_model] from what `weight` writes along `axis`, the one of length d_model.

    Computed in float32 or wider and returned in the dtype of `weight` (Arditi et al. 2024, section 4.1).
    """
    moved = weight.movedim(axis, -1)
    return edit(moved, basis, None).movedim(-1, axis).contiguous()
