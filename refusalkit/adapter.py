"""Describe where an architecture writes its residual stream, as data.

An adapter names modules and weights; it runs nothing. The engine reads it to place interventions, the weight edit to
find every matrix that writes the stream, and the laws in `refusalkit.testing` to check it:
`resid_pre + attn_out + mlp_out == resid_post` at every layer. Where the stream is not of that kind, it says so and
refuses. A path is what follows the model, or the block, in
attribute notation: `model.layers`, `self_attn.o_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """Name a weight or bias whose rows or columns land in the residual stream."""

    path: str
    """Path from the block to the parameter."""
    axis: int = 0
    """The axis of length d_model: 0 for the weight of a `Linear` ([out, in]); -1 for a bias and for the weight of a
    `Conv1D` ([in, out]); 1 for experts [expert, d_model, d_mlp], -1 for experts [expert, d_mlp, d_model]. Declared
    because shapes cannot tell: GPT-OSS has d_model == d_mlp."""
    gain: Gain | None = None
    """A norm behind this parameter alone, before that of its `Write` (Gemma 4 with experts)."""


@dataclass(frozen=True)
class Gain:
    """Name a norm that stands between the matrices and the residual stream (Gemma 2 and 3, OLMo 2)."""

    path: str
    """Path from the block to the norm's weight."""
    offset: float = 0.0
    """What the norm adds to its weight before it multiplies: 1.0 in Gemma, which stores the gain minus one."""


@dataclass(frozen=True)
class Write:
    """Describe one addition a block makes to the residual stream."""

    output: str
    """Path from the block to the module whose output is added, after any norm that stands behind the projection."""
    matrices: tuple[Matrix, ...]
    """Every parameter behind that output. One that a block lacks (a bias that is switched off) is passed over only
    when `Matrix.path` ends in `bias`."""
    gain: Gain | None = None
    """The norm between the matrices and the stream, if there is one."""
    multiplier: str | None = None
    """Path from the block to a number by which the output is multiplied before it is added (Granite). The site is
    read and edited before that."""
    heads: str = field(default="num_attention_heads", repr=False)
    """The setting of the text configuration that counts an attention's heads. They lie side by side, each as wide as
    the others, in what enters its projection."""


@dataclass(frozen=True)
class Refusal:
    """Say why no result on an architecture could be trusted, for which its adapter turns it away."""

    reason: str
    setting: str | None = None
    """The setting of the text configuration that brings this about where it is not zero; None: every checkpoint."""

    def __str__(self) -> str:
        where = "every checkpoint" if self.setting is None else f"those whose {self.setting} is not zero"
        return f"refuses {where}: {self.reason}"


@dataclass(frozen=True)
class Family:
    """Say how the checkpoints of a family talk, as far as measuring a refusal needs it."""

    openers: tuple[str, ...] = ("I",)
    """The texts that open this family's refusals; turned into token ids with the tokenizer at hand."""
    thinking: str | None = None
    """The chat-template variable that switches a thinking mode, where the family has one."""
    answer_header: str = ""
    """What a family that marks answers, and not thoughts, puts before an answer (GPT-OSS's final channel)."""


@dataclass(frozen=True)
class Adapter:
    """Describe an architecture: which checkpoints it is for and where they write the residual stream."""

    name: str
    architectures: tuple[str, ...]
    """Values of `config.architectures` that this adapter is for."""
    attention: Write | tuple[Write, ...] = ()
    """What attention writes. Where blocks differ in kind, every kind: a block has the first of which it has the module
    and the matrices."""
    mlp: Write | tuple[Write, ...] = ()
    """What the MLP writes, in the same way."""
    model_ids: tuple[str, ...] = ()
    """Lower-case patterns (`*yi-*`) that narrow the match to some checkpoints; an adapter that matches one of its
    patterns goes before an adapter that has none."""
    embedding: str = "model.embed_tokens"
    also_embedding: tuple[str, ...] = ()
    """Further parameters [..., d_model] that write the stream before the first block (position embeddings)."""
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    family: Family = field(default_factory=Family)
    block_multiplier: str | None = None
    """Path from the block to a number by which it multiplies the stream at its end (Gemma 4)."""
    inexact: str | None = None
    """Why no weight edit equals directional ablation here; None claims that they are equal (after untying)."""
    refuses: Refusal | None = None
    """Why checkpoints of these architectures are turned away; an adapter that refuses all needs no writes."""
    tiny: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings of the configuration that the laws need to build a tiny random model, beside the usual ones."""

    def matches(self, architecture: str, model_id: str) -> int:
        """Rank the match: 0 for none, 1 for the architecture, 2 for the architecture and the model id."""
        if architecture not in self.architectures:
            return 0
        if not self.model_ids:
            return 1
        return 2 if any(fnmatch(model_id.lower(), pattern) for pattern in self.model_ids) else 0

    @property
    def exactness(self) -> str:
        """Say in a phrase whether the weight edit equals ablation, or that there is none."""
        if self.refuses is not None and self.refuses.setting is None:
            return "refused"
        return "equal to ablation" if self.inexact is None else "not equal to ablation"

    @property
    def writes(self) -> tuple[tuple[Write, ...], tuple[Write, ...]]:
        """The kinds of a block's two writes, in forward order."""
        attention, mlp = (kinds if isinstance(kinds, tuple) else (kinds,) for kinds in (self.attention, self.mlp))
        return attention, mlp
