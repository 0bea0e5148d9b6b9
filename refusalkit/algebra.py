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

#: What a module returns or is given: a hidden state, alone or before other things.
Output = Tensor | tuple[Tensor, ...]
#: The first and the last position, counted from the last column of the first pass, which is 0; None is open. A number,
#: or one a prompt [prompt, 1].
Span = tuple[int | Tensor | None, int | Tensor | None]
#: (what `edit` takes beside the hidden state, where, whether only for prompts that the gate lets through)
Change = tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], Span | None, bool]
#: (vector [d_model] or [prompt, d_model], threshold, position as in `Span`: a number or [prompt])
Gate = tuple[Tensor, float | Tensor, int | Tensor]
#: (how many prompts, how many decode steps went before, what the gate decided [prompt], if it did)
Seen = tuple[int, int, list[Tensor]]


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


def minus_projection(directions: Tensor, others: Tensor, share: float = 1.0) -> Tensor:
    """Return `directions` without their projection on the span of `others`, or without a share of it.

    Both [position, layer, d_model] or [position, layer, rank, d_model], ranks of their own. What is left of a direction
    that lies within the span is rounding, and becomes zero. Computed in float64.
    """
    rows, span = (x.double().reshape(*x.shape[:2], -1, x.shape[-1]) for x in (directions, others))
    left = rows - share * (rows @ torch.linalg.pinv(span) @ span)
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (left, rows)]
    kept: Tensor = left.masked_fill(norms[0] <= 1e-6 * norms[1], 0.0)
    return kept.reshape(directions.shape)


def widen(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged when it is wider already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def edit(
    x: Tensor,
    remove: Tensor | None = None,
    add: Tensor | None = None,
    turn: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """Return `x - P x + |P x| turn + add`, with P the projection on `remove`, in the dtype of `x`.

    x [prompt, position, d_model]; remove [rank, d_model] or [prompt, rank, d_model], rows orthonormal; the others
    [d_model] or [prompt, 1, d_model]. With a unit vector of the removed plane, `turn` is a rotation in it. Positions
    whose component along `along` is not positive stay as they are.
    """
    wide = widen(x)
    edited = wide
    if remove is not None:
        basis = remove.to(device=wide.device, dtype=wide.dtype)
        components = wide @ basis.transpose(-1, -2)
        edited = edited - components @ basis
        if turn is not None:
            length = torch.linalg.vector_norm(components, dim=-1, keepdim=True)
            edited = edited + length * turn.to(device=wide.device, dtype=wide.dtype)
    if add is not None:
        edited = edited + add.to(device=wide.device, dtype=wide.dtype)
    if along is not None:
        ahead = (wide * along.to(device=wide.device, dtype=wide.dtype)).sum(-1, keepdim=True) > 0
        edited = edited.where(ahead, wide)
    return edited.to(x.dtype)


def hidden(output: Output, prompts: int) -> Tensor:
    """Return the hidden state [prompt, position, d_model] of a module's output.

    Some modules wrap it in a tuple, and some with experts return it flat, as [prompt * position, d_model].
    """
    state = output[0] if isinstance(output, tuple) else output
    return state if state.ndim == 3 else state.reshape(prompts, -1, state.shape[-1])


def apply(output: Output, change: Change, seen: Seen) -> Output:
    """Change a module's output, or input, where the change reaches, and keep what it returns beside the hidden state.

    Rows and positions that are not reached keep every bit.
    """
    prompts, step, decided = seen
    edits, span, gated = change
    original = output[0] if isinstance(output, tuple) else output
    state = hidden(output, prompts)
    edited = edit(state, *edits)
    if span is not None:
        edited = edited.where(within(span, state, step), state)
    if gated:
        edited = edited.where(decided[0].to(state.device)[:, None, None], state)
    edited = edited if state is original else edited.reshape(original.shape)
    return (edited, *output[1:]) if isinstance(output, tuple) else edited


def within(span: Span, state: Tensor, step: int) -> Tensor:
    """Say which positions of `state` [prompt, position, d_model] lie in a span: [1 or prompt, position, 1]."""
    columns = torch.arange(1 - state.shape[1], 1, device=state.device)[None] + step
    first, last = span
    reached = torch.ones_like(columns, dtype=torch.bool)
    if first is not None:
        reached = reached & (columns >= torch.as_tensor(first, device=state.device))
    if last is not None:
        reached = reached & (columns <= torch.as_tensor(last, device=state.device))
    return reached[..., None]


def decide(output: Output, gate: Gate, prompts: int) -> Tensor:
    """Say of which prompts the component along the gate's vector is at least its threshold: [prompt]."""
    vector, threshold, column = gate
    state = hidden(output, prompts)
    rows = torch.arange(prompts, device=state.device)
    columns = torch.as_tensor(column, device=state.device) - 1
    read = widen(state[rows, columns.expand(prompts)])
    onto = vector.to(device=read.device, dtype=read.dtype)
    return (read * onto).sum(-1) >= torch.as_tensor(threshold, device=read.device)


def refusal_score(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-odds, in nats, that the next token opens a refusal: [prompt] from logits [prompt, d_vocab].

    `log(P + eps) - log(1 - P + eps)` with P the total probability of `token_ids` (Arditi et al. 2024, section 3.2).
    Computed in float64.
    """
    return log_odds(logits.double().softmax(-1)[:, token_ids.long().to(logits.device)].sum(-1))


def log_odds(probability: Tensor) -> Tensor:
    """Return the log-odds, in nats, of probabilities, as the refusal score bounds them."""
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


def kl_along(reference: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Sum KL(reference || logits), in nats, of the predictions of the tokens that `mask` marks: [prompt].

    Both [prompt, position, d_vocab] predict the token one position later; mask [prompt, position]. One prompt after the
    other, because a vocabulary's distributions at every token of a batch are large in float64.
    """
    chosen = mask[:, 1:].to(logits.device)
    sums = [
        kl_nats(before[marked], after[marked]).sum()
        for before, after, marked in zip(reference.to(logits.device)[:, :-1], logits[:, :-1], chosen, strict=True)
    ]
    return torch.stack(sums)


def orthogonalize(weight: Tensor, basis: Tensor, axis: int, keep_norms: bool = False) -> Tensor:
    """Remove `basis` [rank, d_model] from what `weight` writes along `axis`, the one of length d_model.

    With `keep_norms` every vector along that axis gets its length back, unless nothing of it is left. Computed in
    float32 or wider and returned in the dtype of `weight` (Arditi et al. 2024, section 4.1).
    """
    moved = widen(weight.movedim(axis, -1))
    projected = edit(moved, basis)
    if keep_norms:
        # Lengthening a short rest would also lengthen what rounding has left along the basis.
        projected = edit(unit(projected), basis) * torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    return projected.to(weight.dtype).movedim(-1, axis).contiguous()
