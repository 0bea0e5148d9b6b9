"""List the formats: what each is, what it can say, and what reads and writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from refusalkit.checkpoint import Checkpoint
from refusalkit.errors import InputError, nearest
from refusalkit.interchange import authors, control_vector, glp, lora, own, steered, svec
from refusalkit.interchange.content import Content, Operation, Trait, Wanted, ending

Recognise = Callable[[Path], bool]
Read = Callable[[Path, Wanted], Content]
#: Returns what there is to say of the file that was written.
Write = Callable[[Content, Path, Checkpoint | None], tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """Describe one format."""

    name: str
    what: str
    """What it is and who reads it."""
    suffixes: tuple[str, ...]
    """How its files end; the empty one stands for a folder."""
    says: tuple[Operation, ...]
    """What it can say is done with the direction; empty where it leaves that open."""
    keeps: frozenset[Trait]
    limits: str
    """What it cannot say, in words."""
    recognises: Recognise
    read: Read
    write: Write
    subspaces: bool = False
    """Whether it holds more than one direction a place."""
    needs: Literal["nothing", "model_type", "model"] = "nothing"
    """What it needs to know of the model to be written."""


def _keeps(*traits: Trait) -> frozenset[Trait]:
    return frozenset(traits)


FORMATS = (
    Format(
        "refusalkit",
        "our `direction.safetensors`, and the plain files of a run directory",
        (".safetensors", ""),
        (),
        _keeps("digits", "length", "layer", "position", "provenance", "run"),
        "what is done with it, the texts of completions (of another's run, the rates are kept)",
        *(own.recognises, own.read, own.write),
        subspaces=True,
    ),
    Format(
        "authors",
        "a run's folder of the paper's authors (andyrdt/refusal_direction), or its `direction.pt` alone",
        ("", ".pt"),
        (),
        _keeps("digits", "length", "layer", "position", "run"),
        "what is done with it, a subspace, sites other than `resid_pre`, positions that are not the last of the prompt",
        *(authors.recognises, authors.read, authors.write),
    ),
    Format(
        "gguf",
        "a control vector of repeng, read by llama.cpp",
        (".gguf",),
        ("steer",),
        _keeps("length", "operation", "layer", "position", "provenance"),
        "ablation, a subspace, layers 0 and 1 (`direction.N` is added at the output of block N, and N begins at 1)",
        *(control_vector.recognises, control_vector.read, control_vector.write),
        needs="model_type",
    ),
    Format(
        "glp",
        "a projective control vector (GLP), read by weightless; llama.cpp would add it",
        (".gguf",),
        ("ablate",),
        _keeps("operation", "layer", "position", "provenance"),
        "addition (write `gguf`), and `ablate` to the letter: it projects at the outputs of blocks, all but the first",
        *(glp.recognises, glp.read, glp.write),
        subspaces=True,
        needs="model",
    ),
    Format(
        "lora",
        "a PEFT LoRA adapter that removes the direction from the weights, equal to `ablate` in logits",
        ("",),
        ("ablate",),
        _keeps("operation", "layer", "position", "provenance"),
        "addition, biases that write along the direction, fused experts, architectures whose weight edit is not equal "
        "to ablation (`refusalkit adapters`)",
        *(lora.recognises, lora.read, lora.write),
        subspaces=True,
        needs="model",
    ),
    Format(
        "steered",
        "the file of lm-eval's model `steered`",
        (".pt",),
        ("ablate", "steer"),
        _keeps("length", "operation"),
        "a subspace, steering at layer 0",
        *(steered.recognises, steered.read, steered.write),
        needs="model",
    ),
    Format(
        "svec",
        "a steering vector of IBM's activation-steering and AISteer360",
        (".svec",),
        (),
        _keeps("digits", "length", "layer", "position", "provenance"),
        "what is done with it, a subspace, layer 0",
        *(svec.recognises, svec.read, svec.write),
        needs="model_type",
    ),
)
NAMES = tuple(kind.name for kind in FORMATS)


def recognise(path: Path) -> Format:
    """Return the format of a file or folder, told by its name and content."""
    if not path.exists():
        raise InputError("is not there", where=str(path), hint="name a run's folder, or a file with a direction")
    found = next((kind for kind in FORMATS if kind.recognises(path)), None)
    if found is None:
        raise InputError("is in none of the known formats", where=str(path), hint=f"they are {', '.join(NAMES)}")
    return found


def goal(path: Path, name: str | None) -> Format:
    """Return the format to write: the one that is named, or the only one whose files end like `path`."""
    if name is not None and name not in NAMES:
        raise InputError(f"no format is called {name!r}", where="--to", hint=nearest(name, NAMES))
    fit = [kind for kind in FORMATS if ending(path) in kind.suffixes and name in (None, kind.name)]
    if len(fit) == 1:
        return fit[0]
    if name is None:
        names, what = ", ".join(kind.name for kind in fit), ending(path) or "a folder"
        raise InputError(f"{what} may be one of {names}", where=str(path), hint="choose with --to")
    suffixes = next(kind.suffixes for kind in FORMATS if kind.name == name)
    ends = " or ".join(f"a file that ends in {suffix}" if suffix else "a folder" for suffix in suffixes)
    raise InputError(f"{name} is {ends}", where=str(path), hint="choose another name")
