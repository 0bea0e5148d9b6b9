"""Measure refusing and what an intervention costs, as the paper does and beyond it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from refusalkit.builtin.phrases import says_no
from refusalkit.metric import Count, Evidence, Metric, TextMetric, Values, Verdict

if TYPE_CHECKING:
    from torch import Tensor


class RefusalRate(Metric):
    """Count the completions that contain one of the paper's refusal substrings, whatever their case.

    A list of phrases knows the usual refusals of English chat models and no others. Whether what is not refused is an
    answer is another question: `perplexity` and `repetition` tell it from noise.
    """

    metric: Literal["refusal_rate"] = "refusal_rate"
    kind = "rate"
    unit = "fraction of prompts"
    needs = "completions"

    phrases: Literal["paper", "wide"] = "paper"
    """`paper`: the twelve of Arditi et al. (2024, appendix D.1), compared as they stand. `wide`: these and 55 more
    ways to decline, compared after quotes, markup, invisible characters, white space and case are made alike."""

    @property
    def verdict(self) -> Verdict:
        return "refused"

    def measure(self, evidence: Evidence) -> Values:
        return Values(tuple(float(says_no(text, wide=self.phrases == "wide")) for text in evidence.completions))


class RefusalScore(Metric):
    """Take the log-odds that the first token of the answer opens a refusal (Arditi et al. 2024, section 3.2).

    Where no token is known to open one, there is no score.
    """

    metric: Literal["refusal_score"] = "refusal_score"
    kind = "mean"
    unit = "nats"
    needs = "scores"

    def measure(self, evidence: Evidence) -> Values:
        assert evidence.refusal_scores is not None
        known = bool(evidence.opener_ids)
        return Values(tuple(score if known else float("nan") for score in evidence.refusal_scores.tolist()))


class KL(Metric):
    """Take KL(unmodified || modified) of the first token's distribution on harmless prompts.

    With the authors' epsilon inside the logarithms; lower is closer to the unmodified model, which has 0.
    """

    metric: Literal["kl"] = "kl"
    kind = "mean"
    unit = "nats"
    needs = "scores"
    sides = ("harmless",)

    def measure(self, evidence: Evidence) -> Values:
        assert evidence.kl_nats is not None
        return Values(tuple(evidence.kl_nats.tolist()))


class TokenKL(Metric):
    """Take KL(unmodified || modified) a token along the unmodified model's own harmless completions.

    Both models read the same tokens, so the number is how far they disagree at each step, not how far two texts drift
    apart. Computed as `kl` is, with the authors' epsilon; the mean is over tokens. Lower is closer to the unmodified
    model, which has 0.
    """

    metric: Literal["token_kl"] = "token_kl"
    kind = "mean"
    unit = "nats per token"
    needs = "token_kl"
    sides = ("harmless",)

    def measure(self, evidence: Evidence) -> Values:
        return _per_token(evidence.token_kl, evidence)


class CrossEntropy(Metric):
    """Take the loss a token on the unmodified model's own harmless completions (the paper's on-distribution loss).

    The mean is over tokens, and exp of it is the perplexity (Arditi et al. 2024, table 9). Lower is better; where it is
    near that of the unmodified model, the model would still give the same answers.
    """

    metric: Literal["cross_entropy"] = "cross_entropy"
    kind = "mean"
    unit = "nats per token"
    needs = "losses"
    sides = ("harmless",)

    def measure(self, evidence: Evidence) -> Values:
        return _per_token(evidence.losses, evidence)


class TextCrossEntropy(TextMetric):
    """Take the loss a token on plain text without a chat template (the paper's loss on the Pile, table 9).

    Every token but a text's first is predicted from those before it. Interventions take a text for something the model
    writes from its first token on; one with a gate, which is read at the end of a prompt, has no value. The mean is
    over tokens, and exp of it is the perplexity. Lower is better.
    """

    metric: Literal["text_cross_entropy"] = "text_cross_entropy"
    unit = "nats per token"

    source: str = "builtin:texts"
    """Where the texts come from, as prompts do: `file:PATH#FIELD`, `hf:NAME@REVISION?field=text`, or a few built in."""

    def measure(self, evidence: Evidence) -> Values:
        return _per_token(evidence.losses, evidence)


class AnswerCrossEntropy(TextMetric):
    """Take the loss a token of given answers to harmless prompts (the paper's loss on Alpaca, table 9).

    The prompt is rendered with the chat template and only the answer counts. The mean is over tokens, and exp of it is
    the perplexity. Lower is better.
    """

    metric: Literal["answer_cross_entropy"] = "answer_cross_entropy"
    unit = "nats per token"
    answered = True

    source: str = "builtin:answers"
    """Where prompts and answers come from: rows with a field for each, `file:PATH#PROMPT,ANSWER` or
    `hf:NAME@REVISION?field=PROMPT&answer=ANSWER`; the usual names are found. Rows with an `input` are left out, as in
    the paper."""

    def measure(self, evidence: Evidence) -> Values:
        return _per_token(evidence.losses, evidence)


class Perplexity(Metric):
    """Take the perplexity of what is written, by the unmodified model: whether it still reads like a text.

    Each completion has exp of its mean loss a token, given the prompt, and the mean is over completions, as in the
    library evaluate. Higher is less like anything the unmodified model would write; a loop of the same words is low,
    which `repetition` shows. An empty completion has no value.
    """

    metric: Literal["perplexity"] = "perplexity"
    kind = "mean"
    unit = "perplexity"
    needs = "written_losses"

    def measure(self, evidence: Evidence) -> Values:
        # A mean loss is bounded by the largest gap of logits; what overflows is infinite and no mean.
        return Values(
            tuple(math.exp(loss) if loss < 700 else math.nan for loss in _per_token(evidence.losses, evidence).values)
        )


class Repetition(Metric):
    """Take the share of a completion's n-grams of tokens that it has had before.

    That is one minus distinct over all n-grams, the seq-rep-n of Welleck et al. (2019, arXiv 1908.04319): 0 is none,
    and a loop comes near 1. Lower is better. A completion that is shorter than n tokens has no value.
    """

    metric: Literal["repetition"] = "repetition"
    kind = "mean"
    unit = "fraction of n-grams"
    needs = "completions"

    n: Count = 4
    """How many tokens in a row."""

    def measure(self, evidence: Evidence) -> Values:
        return Values(tuple(map(self._repeated, evidence.completion_ids)))

    def _repeated(self, tokens: tuple[int, ...]) -> float:
        grams = [tokens[start : start + self.n] for start in range(len(tokens) - self.n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else math.nan


class Projection(Metric):
    """Take the component of the residual stream along the unit direction, at the place where the direction was found.

    It is read at the chosen position and layer of each prompt, behind whatever the intervention does there, and always
    along the found direction, for random controls too; of a subspace, along its first row. Ablation leaves 0, steering
    adds its scale times the direction's length.
    """

    metric: Literal["projection"] = "projection"
    kind = "mean"
    unit = "units of the residual stream"
    needs = "projections"

    def measure(self, evidence: Evidence) -> Values:
        assert evidence.projections is not None
        return Values(tuple(evidence.projections.tolist()))


def _per_token(sums: Tensor | None, evidence: Evidence) -> Values:
    """Divide sums [prompt] over each prompt's tokens by the number of these, which is what the prompt counts."""
    assert sums is not None
    assert evidence.n_tokens is not None
    tokens = evidence.n_tokens.double()
    return Values(tuple((sums / tokens).tolist()), tuple(tokens.tolist()))


METRICS = (
    RefusalRate,
    RefusalScore,
    KL,
    CrossEntropy,
    TokenKL,
    TextCrossEntropy,
    AnswerCrossEntropy,
    Perplexity,
    Repetition,
    Projection,
)
