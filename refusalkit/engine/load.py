"""Load a checkpoint into an engine."""

from __future__ import annotations

import logging
from typing import Any

import torch
from safetensors import SafetensorError

from refusalkit.adapter import Adapter
from refusalkit.checkpoint import Checkpoint
from refusalkit.engine.engine import Engine
from refusalkit.errors import InputError


def load(checkpoint: Checkpoint) -> Engine:
    """Load the weights that a recipe's `model` section names.

    Raises `InputError` when they cannot be read or the device is not there.
    """
    section = checkpoint.section
    placed = section.device == "balanced" or section.quantize != "none"
    module = load_module(checkpoint, **(_placement(checkpoint) if placed else {}))
    try:
        module = module if placed else module.to(pick_device(section.device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the model cannot be put on {section.device!r}: {str(error).splitlines()[0]}",
            where="model.device",
            hint="`auto` takes what there is",
        ) from None
    batch_size = None if section.batch_size == "auto" else section.batch_size
    return engine_of(module, checkpoint.tokenizer, checkpoint.adapter, batch_size)


def engine_of(module: Any, tokenizer: Any, adapter: Adapter, batch_size: int | None = None) -> Engine:
    """Put a transformers model that is in memory into an engine."""
    from nnsight.modeling.transformers import TransformersModel

    return Engine(TransformersModel(module, tokenizer=tokenizer, task="text-generation"), adapter, batch_size)


def _placement(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `from_pretrained` is told about packing the weights and where each goes."""
    from transformers import BitsAndBytesConfig

    section = checkpoint.section
    # It says at every multiplication that it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "device_map": "balanced" if section.device == "balanced" else {"": str(pick_device(section.device))}
    }
    if section.quantize == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif section.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, checkpoint.dtype)
        )
    return options


def load_module(checkpoint: Checkpoint, **options: Any) -> Any:
    """Load the plain transformers model in evaluation mode, on the CPU unless `options` place it."""
    from transformers import AutoModelForCausalLM

    section = checkpoint.section
    try:
        module, loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.source,
            output_loading_info=True,
            dtype=checkpoint.dtype,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the weights cannot be read: {str(error).strip().splitlines()[0]}",
            where=f"model.id {section.id!r}",
            hint="check that the download is complete",
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        # transformers fills what is missing with random numbers and goes on.
        raise InputError(
            f"the checkpoint lacks {len(missing)} of the model's weights, {missing[0]} among them",
            where=f"model.id {section.id!r}",
            hint="check that the download is complete",
        )
    return module.eval().requires_grad_(False)


def pick_device(name: str) -> torch.device:
    """Return the device a recipe names; `auto` prefers a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(
            f"no device is called {name!r}", where="model.device", hint="auto, cpu, cuda, cuda:0, mps, balanced"
        ) from None
