"""Run a judge's checkpoint on this machine, with transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from refusalkit.checkpoint import revision_of
from refusalkit.errors import InputError, RunError
from refusalkit_judges.judge import Judge, Pair, Reply

if TYPE_CHECKING:
    from torch import Tensor

HOW_TO_NAME = "name a folder with a checkpoint, or a hub model that you can reach (with no network: one that is cached)"


class Place(NamedTuple):
    """Say which weights to load, and how."""

    model: str
    revision: str | None
    dtype: str
    device: str
    attention: str | None
    fingerprint: str
    """Tells when other weights lie in the same folder."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """Hold a judge in memory."""

    module: Any
    tokenizer: Any


class LocalJudge(Judge, ABC):
    """Provide a judge whose weights are loaded on this machine."""

    model: str
    """The judge: a hub name or a folder."""
    revision: str | None = None
    """The branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The weights' type; `auto` takes the checkpoint's own."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda:1`; `balanced` spreads layers over all GPUs."""
    batch_size: Annotated[int, Field(ge=1, strict=True)] = 8
    """Completions judged at a time."""

    format_version: ClassVar[int] = 1
    """Raised when what the judge is shown changes."""
    attention: ClassVar[str | None] = None

    @property
    def where(self) -> str:
        """What errors name."""
        return f"evaluate.metrics: {self.label}"

    @property
    def place(self) -> Place:
        """Which weights it is, and where they go."""
        return Place(self.model, self.revision, self.dtype, self.device, self.attention, fingerprint(self.folder))

    @property
    def folder(self) -> Path:
        """Where its files are; raises `InputError` where there are none."""
        return folder_of(self.model, self.revision, self.where)

    @property
    def identity(self) -> Mapping[str, Any]:
        weights = {"weights": fingerprint(self.folder), "dtype": self.dtype}
        return {"judge": self.metric, **weights, "format": self.format_version}

    def check(self) -> None:
        folder_of(self.model, self.revision, self.where)

    def ask(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Reply | None]]:
        import torch

        loaded = held(self.place, self.where)
        rows = [self.tokens(loaded.tokenizer, *pair) for pair in pairs]
        # Alike in length, so that little is padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids, mask = padded([rows[index] for index in batch], loaded)
            try:
                with torch.inference_mode():
                    replies = self.answer(loaded, ids, mask)
            except torch.OutOfMemoryError:
                raise RunError(
                    "memory runs out while it judges",
                    where=self.where,
                    hint="lower its `batch_size`, or give it another `device`; verdicts so far are kept",
                ) from None
            yield from zip(batch, replies, strict=True)

    @abstractmethod
    def tokens(self, tokenizer: Any, prompt: str, completion: str) -> list[int]:
        """Return what the judge reads, in its tokens."""

    @abstractmethod
    def answer(self, loaded: Loaded, ids: Tensor, mask: Tensor) -> Sequence[Reply]:
        """Return the reply to every row of `ids` [row, token]; `mask` is 0 on padding, which stands on the left."""


def written(loaded: Loaded, ids: Tensor, mask: Tensor, n_tokens: int) -> list[str]:
    """Let a judge write up to `n_tokens` tokens, greedily."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=n_tokens,
        pad_token_id=loaded.tokenizer.pad_token_id,
        eos_token_id=loaded.module.generation_config.eos_token_id,
    )
    made = loaded.module.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    texts: list[str] = loaded.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def padded(rows: Sequence[Sequence[int]], loaded: Loaded) -> tuple[Tensor, Tensor]:
    """Return token ids [row, token] padded on the left, and the mask of what is not padding, where the judge is."""
    import torch

    longest = max(map(len, rows))
    ids = [[loaded.tokenizer.pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    device = loaded.module.device
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# -- where the weights are ----------------------------------------------------------------------------------------


def folder_of(model: str, revision: str | None, where: str) -> Path:
    """Find the folder of a checkpoint or an adapter, in the hub's cache too.

    Raises `InputError` where there is none.
    """
    scheme, _, family = model.partition(":")
    if scheme == "tiny":
        from refusalkit import tiny

        return tiny.checkpoint(family)
    from transformers.utils import cached_file

    path = Path(model).expanduser()
    said = "holds no config.json" if path.is_dir() else "cannot be found"
    for name in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(
                str(path) if path.is_dir() else model,
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
            )
        except (OSError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            break
        if found is not None:
            return Path(found).parent
    raise InputError(f"the judge {model!r} cannot be read: {said}", where=where, hint=HOW_TO_NAME)


def fingerprint(folder: Path) -> str:
    """Return what identifies a checkpoint: its commit in the hub's cache, else a hash over its files."""
    return folder.name if folder.parent.name == "snapshots" else revision_of(str(folder))


# -- one judge at a time --------------------------------------------------------------------------------------------

_HELD: dict[Place, Loaded] = {}


def held(place: Place, where: str) -> Loaded:
    """Return a judge, loading it where another one is in memory."""
    if place not in _HELD:
        # Let go of the old one first: there may not be room for both.
        _HELD.clear()
        _HELD[place] = load(place, where)
    return _HELD[place]


def load(place: Place, where: str) -> Loaded:
    """Load a judge's weights and tokenizer; raises `InputError` where they cannot be read or put on the device."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from refusalkit.engine.load import pick_device

    folder = folder_of(place.model, place.revision, where)
    source = str(folder) if folder.parent.name != "snapshots" else place.model
    balanced = place.device == "balanced"
    options: dict[str, Any] = {"revision": place.revision, "dtype": place.dtype}
    if place.attention is not None:
        options["attn_implementation"] = place.attention
    if balanced:
        options["device_map"] = "balanced"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=place.revision, padding_side="left")
        module, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
        module = module if balanced else module.to(pick_device(place.device))
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"the judge {place.model!r} cannot be loaded: {said[0]}", where=where, hint=HOW_TO_NAME
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise InputError(
            f"the judge {place.model!r} lacks {len(missing)} weights, {missing[0]} among them",
            where=where,
            hint="check that the download is complete",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(module.eval().requires_grad_(False), tokenizer)
