"""Find a checkpoint and read what it says of itself, without loading a weight."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusalkit.adapter import Adapter
from refusalkit.errors import InputError, nearest
from refusalkit.recipe import ModelSection
from refusalkit.registry import Registry


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a checkpoint's configuration and tokenizer, and the adapter that fits it."""

    section: ModelSection
    source: str
    """What `from_pretrained` is given: a folder or a hub name."""
    revision: str
    """The hub commit, or a hash of the folder's files."""
    config: Any
    tokenizer: Any
    adapter: Adapter

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the language model."""
        return self.config.get_text_config()

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.text_config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config.hidden_size)

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return int(self.text_config.vocab_size)

    @property
    def dtype(self) -> str:
        """The dtype to load in: the recipe's, or the checkpoint's own, or float32 for the embedded models."""
        if self.section.dtype != "auto":
            return self.section.dtype
        if self.section.id.startswith("tiny:"):
            return "float32"
        return str(getattr(self.text_config, "dtype", None) or "float32").removeprefix("torch.")

    @property
    def architecture(self) -> str:
        """The model class the checkpoint names."""
        return _architecture(self.config)


def quiet() -> None:
    """Keep transformers' own bars and advice out of our output."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def open_checkpoint(section: ModelSection, registry: Registry) -> Checkpoint:
    """Read the configuration and tokenizer that a recipe's `model` section names, and resolve the adapter.

    Raises `InputError` when there is no such model, it cannot be read, or no adapter fits it.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = _source(section)
    config = _read(AutoConfig, "configuration", source, section)
    adapter = _resolve(section, config, registry)
    _check_not_refused(section, config, adapter)
    if section.adapter is not None:
        _check_fits(section, config, adapter)
    tokenizer = _read(AutoTokenizer, "tokenizer", source, section, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Checkpoint(section, source, revision_of(source, config), config, tokenizer, adapter)


def skeleton(section: ModelSection, config: Any) -> Any:
    """Build the transformers model of a configuration without its weights, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)


def cached_commit(hub: str) -> str | None:
    """Return the commit of a hub model whose weights are in this machine's cache; never reaches for the network."""
    from transformers.utils import cached_file

    for name in ("model.safetensors.index.json", "model.safetensors"):
        try:
            return Path(cached_file(hub, name, local_files_only=True)).parent.name
        except OSError:
            continue
    return None


def _read(kind: Any, what: str, source: str, section: ModelSection, **options: Any) -> Any:
    """Let transformers read a part of the checkpoint; whatever it makes of a broken file is the user's to know."""
    try:
        return kind.from_pretrained(
            source, revision=section.revision, trust_remote_code=section.trust_remote_code, **options
        )
    # tokenizers raises a bare Exception for a tokenizer.json it cannot read, so nothing narrower catches it.
    except Exception as error:  # noqa: BLE001
        lines = str(error).strip().splitlines()
        said = lines[0].strip() if isinstance(error, OSError | ValueError) and lines else repr(error)
        raise InputError(
            f"the {what} cannot be read: {said}",
            where=f"model.id {section.id!r}",
            hint="read the code in the checkpoint, and if you trust it set `model.trust_remote_code: true`"
            if "custom code" in str(error) and not section.trust_remote_code
            else _HOW_TO_NAME,
        ) from None


def _source(section: ModelSection) -> str:
    scheme, _, family = section.id.partition(":")
    if scheme == "tiny":
        from refusalkit import tiny

        if family not in tiny.FAMILIES:
            names = [f"tiny:{name}" for name in tiny.FAMILIES]
            raise InputError(
                "no such embedded model", where=f"model.id {section.id!r}", hint=nearest(section.id, names)
            )
        return str(tiny.checkpoint(family))
    # os.path leaves an unknown user's `~name` as it is, where pathlib raises an error that says nothing of the model.
    path = Path(os.path.expanduser(section.id))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                "the folder has no config.json", where=f"model.id {section.id!r}", hint="name a checkpoint's folder"
            )
        return str(path)
    if section.id.startswith((".", "/", "~")) or path.is_file():
        raise InputError("there is no such folder", where=f"model.id {section.id!r}", hint=_HOW_TO_NAME)
    return section.id


_HOW_TO_NAME = (
    "name a folder with a config.json, a model hub name you can reach (with no network: one that is cached), "
    "or an embedded model such as tiny:llama"
)


def _check_not_refused(section: ModelSection, config: Any, adapter: Adapter) -> None:
    """Turn away a checkpoint of an architecture whose residual stream adapters cannot express."""
    refusal = adapter.refuses
    if refusal is None or (refusal.setting and not getattr(config.get_text_config(), refusal.setting, None)):
        return
    raise InputError(
        f"{_architecture(config)} cannot be studied: {refusal.reason}",
        where=f"model.id {section.id!r}",
        hint="`refusalkit adapters` lists the architectures that can",
    )


def _check_fits(section: ModelSection, config: Any, adapter: Adapter) -> None:
    """Refuse an adapter named in the recipe whose modules this architecture does not have."""
    known = {name for name, _ in skeleton(section, config).named_modules()}
    missing = [
        path
        for path in (adapter.embedding, adapter.blocks, adapter.final_norm, adapter.unembedding)
        if path not in known
    ]
    for kinds in adapter.writes:
        outputs = [f"{adapter.blocks}.0.{write.output}" for write in kinds]
        if not known.intersection(outputs):
            missing.append(" or ".join(outputs))
    if missing:
        raise InputError(
            f"the adapter {adapter.name!r} does not fit {_architecture(config)}, which has no {', '.join(missing)}",
            where="model.adapter",
            hint="leave it out to take the adapter that matches the checkpoint",
        )


def _architecture(config: Any) -> str:
    names = getattr(config, "architectures", None) or []
    return str(names[0]) if names else f"{config.model_type} (the configuration names no architecture)"


def _resolve(section: ModelSection, config: Any, registry: Registry) -> Adapter:
    architecture = _architecture(config)
    if section.adapter is not None:
        if section.adapter not in registry.adapters:
            raise InputError(
                f"no adapter is called {section.adapter!r}",
                where="model.adapter",
                hint=nearest(section.adapter, list(registry.adapters)),
            )
        return registry.adapters[section.adapter]
    ranked = sorted(registry.adapters.values(), key=lambda adapter: -adapter.matches(architecture, section.id))
    best = ranked[0].matches(architecture, section.id) if ranked else 0
    if best == 0:
        known = sorted({name for adapter in registry.adapters.values() for name in adapter.architectures})
        raise InputError(
            f"no adapter is for the architecture {architecture}",
            where=f"model.id {section.id!r}",
            hint=f"known: {', '.join(known)}; a plugin can add one (docs/how-to/write-a-plugin.md)",
        )
    tied = [adapter.name for adapter in ranked if adapter.matches(architecture, section.id) == best]
    if len(tied) > 1:
        raise InputError(
            f"several adapters fit {architecture}: {', '.join(tied)}", where="model.adapter", hint="name one of them"
        )
    return ranked[0]


def revision_of(source: str, config: Any = None) -> str:
    """Return what identifies the weights: the hub commit, or a hash over the folder's file names, sizes and times."""
    commit = getattr(config, "_commit_hash", None)
    folder = Path(source)
    if commit or not folder.is_dir():
        return str(commit or "unknown")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model"))
    parts = []
    for path in files:
        status = path.stat()
        # Small files by content; hashing 140 GB of weights would take longer than most stages.
        small = status.st_size < 64 * 2**20
        mark = hashlib.sha256(path.read_bytes()).hexdigest() if small else f"{status.st_size} {status.st_mtime_ns}"
        parts.append([path.name, mark])
    return "files-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
