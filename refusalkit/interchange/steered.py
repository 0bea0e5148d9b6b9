"""Read and write the files of lm-eval's model `steered`: vectors by the module whose output they are added to or
removed from.

`{hookpoint: {"steering_vector": [d_model], "steering_coefficient", "action": "add" | "clamp", "bias", "head_index"}}`,
a hookpoint being a module's path below `model.base_model`. `clamp` sets the component along the vector, of length one,
to the coefficient: 0 removes it. Clamping to 0 at everything that writes the residual stream is our `ablate`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.checkpoint import Checkpoint, skeleton
from refusalkit.engine.layout import Layout, layout_of, resolve
from refusalkit.errors import InputError
from refusalkit.interchange import torch_file
from refusalkit.interchange.content import Content, Wanted, checked, pick, unreadable

#: A block of a list of blocks, and not an expert of a block.
BLOCK = re.compile(r"(?:[^.]*[^.\d][^.]*\.)*(\d+)")
#: The least cosine between directions that count as one.
SAME = 1 - 1e-6


def recognises(path: Path) -> bool:
    """Tell a file of torch that holds a mapping."""
    return isinstance(torch_file.recognised(path), dict)


def read(path: Path, wanted: Wanted) -> Content:
    """Read the vector that is added at one block's output, or the one that is removed everywhere."""
    steps = {str(name): _step(name, step, path) for name, step in torch_file.load(path).items()}
    actions = {action for action, _, _ in steps.values()}
    if len(actions) != 1:
        raise unreadable(path, f"it holds {' and '.join(sorted(actions)) or 'no'} steps, and one kind can be read")
    blocks = {int(match[1]): name for name in steps if (match := BLOCK.fullmatch(name))}
    if actions == {"add"}:
        if len(blocks) < len(steps):
            odd = next(name for name in steps if name not in blocks.values())
            raise unreadable(path, f"it adds at {odd}, and only the outputs of blocks can be read")
        layer, name, others = pick({block + 1: name for block, name in blocks.items()}, wanted, path)
        _, vector, scale = steps[name]
        return Content(vector, layer, wanted.position, operation="steer", scale=scale, left_out=others)
    return _removed(steps, blocks, wanted, path)


def _step(name: Any, step: Any, path: Path) -> tuple[str, Tensor, float]:
    """Return what is done at a hookpoint: the action, the vector and the coefficient."""
    if not isinstance(step, Mapping) or not isinstance(step.get("steering_vector"), Tensor):
        raise unreadable(path, f"{name} has no steering_vector")
    action, scale = step.get("action"), step.get("steering_coefficient", 1.0)
    if action not in ("add", "clamp") or not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise unreadable(path, f"{name} has the action {action!r} and the coefficient {scale!r}")
    for extra in ("bias", "head_index"):
        if step.get(extra) is not None:
            raise InputError(
                f"{name} has a {extra}, which no intervention here can express", where=str(path), hint="leave it out"
            )
    vector = checked(step["steering_vector"], path)
    if vector.ndim != 1:
        raise unreadable(path, f"the vector of {name} has shape {list(vector.shape)}")
    return action, vector, float(scale)


def _removed(
    steps: Mapping[str, tuple[str, Tensor, float]], blocks: Mapping[int, str], wanted: Wanted, path: Path
) -> Content:
    """Return the direction that is clamped to 0 at every hookpoint of the file."""
    first = next(iter(steps))
    vector = steps[first][1]
    for name, (_, other, value) in steps.items():
        if value != 0:
            raise InputError(
                f"clamps to {value} at {name}, which is neither removing nor adding a direction",
                where=str(path),
                hint="the intervention `clamp` does that in a recipe",
            )
        if other.shape != vector.shape or _cosine(other, vector) < SAME:
            raise InputError(
                f"removes another direction at {name} than at {first}",
                where=str(path),
                hint="write one direction a file",
            )
    # Where it is removed at one block's output alone, that is where it was found.
    layer = next(iter(blocks)) + 1 if len(steps) == len(blocks) == 1 else wanted.layer
    return Content(vector, layer, wanted.position, operation="ablate")


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine without its sign: removing a vector removes its opposite."""
    return abs((algebra.unit(one.double()) @ algebra.unit(other.double())).item())


def write(content: Content, target: Path, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """Write the steps of lm-eval: one that adds, or one for everything that writes the residual stream."""
    assert checkpoint is not None, "the table says that the format needs the model"
    module = skeleton(checkpoint.section, checkpoint.config)
    layout = layout_of(module, checkpoint.adapter)
    if content.operation == "steer":
        paths, action, value = [layout.block(content.block(str(target)))], "add", content.scale
    else:
        paths, action, value = list(writing_modules(layout)), "clamp", 0.0
    step = {"steering_coefficient": value, "action": action, "bias": None, "head_index": None}
    names = {id(found): name for name, found in module.base_model.named_modules()}
    torch_file.save(
        target,
        {
            names[id(resolve(module, path))]: {"steering_vector": content.vector.to(torch.float32, copy=True), **step}
            for path in paths
        },
    )
    done = f"removes the direction at {len(paths)} modules" if action == "clamp" else "adds the direction at one module"
    return (
        f"{done}, in the dtype of the model that lm-eval loads: "
        f"lm_eval --model steered --model_args pretrained=...,steer_path={target.name}",
    )


def writing_modules(layout: Layout) -> Iterator[str]:
    """Yield the paths of all modules whose outputs are written to the residual stream, in forward order."""
    yield layout.adapter.embedding
    yield from (path.removesuffix(".weight") for path in layout.adapter.also_embedding)
    for layer, writes in enumerate(layout.writes):
        yield from (f"{layout.block(layer)}.{write.output}" for write in writes)
