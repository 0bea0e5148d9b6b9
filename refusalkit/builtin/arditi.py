"""Read the prompts of Arditi et al. (2024) out of their repository's `dataset` folder, sampled as their code does.

The address is `FOLDER#SIDE`. The prompts are not shipped with this package; their hashes are.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refusalkit.builtin.sources import read_file
from refusalkit.errors import InputError, nearest
from refusalkit.prompt_source import PromptSource
from refusalkit.prompt_split import normalized

REPOSITORY = "https://github.com/andyrdt/refusal_direction"
COMMIT = "9d852fa"
SIDES = ("harmful", "harmless")


@dataclass(frozen=True)
class Sample:
    """Hold one list of prompts the authors' run draws: from which file, how many, and what comes out."""

    file: str
    size: int
    sha256: str
    """Of the prompts in the order drawn, joined by newlines."""


#: In the order in which the authors' code draws from one generator (`pipeline/run_pipeline.py`).
SAMPLES = {
    ("harmful", "train"): Sample(
        "splits/harmful_train.json", 128, "cf837dfec7da06ba51bd31d520038657d536572fd18bda4798b91f2bf0512a37"
    ),
    ("harmless", "train"): Sample(
        "splits/harmless_train.json", 128, "5ca55dc00e7afc7f5346c9acc12885a54e72e43129af816f44ecfb8fc425b6b3"
    ),
    ("harmful", "validation"): Sample(
        "splits/harmful_val.json", 32, "24f8c5eedfb496d3e822329bd36fdd6abb5fe1b96013364a62e24ae49297b509"
    ),
    ("harmless", "validation"): Sample(
        "splits/harmless_val.json", 32, "4810456d3d98030caf1a00d11fd3d8cfa702b617dbe44d004db2da75660a53ad"
    ),
    ("harmless", "test"): Sample(
        "splits/harmless_test.json", 100, "7c5b9234575615b50863b01622aca6ba5cb8fe4369cedcb1d75a0066061551f9"
    ),
}
#: JailbreakBench, taken whole and in order.
HARMFUL_TEST = Sample(
    "processed/jailbreakbench.json", 100, "f8cc489d29258926e9f7c4dfa349ff5f53535db199e995e6bbdb36a067245461"
)


def read_arditi(address: str, folder: Path) -> Mapping[str, tuple[str, ...]]:
    """Read one side's three splits, checked against the hashes of the published runs.

    One JailbreakBench request differs only in case from a training prompt, which the authors' comparison of exact
    strings misses. It is left out of `test`, so that training and selection stay those of the published runs.
    """
    name, _, side = address.partition("#")
    where = f"arditi:{address}"
    if side not in SIDES:
        raise InputError(f"names no side behind the hash: {side!r}", where=where, hint=nearest(side, SIDES))
    root = folder / os.path.expanduser(name)
    if not root.is_dir():
        raise InputError(
            "there is no such folder",
            where=where,
            hint=f"git clone {REPOSITORY}, check {COMMIT} out, and name its `dataset` folder",
        )
    generator = random.Random(42)
    drawn = {}
    for key, sample in SAMPLES.items():
        pool = _pool(sample, root)
        drawn[key] = _checked(generator.sample(pool, min(sample.size, len(pool))), sample, root)
    drawn["harmful", "test"] = _checked(_pool(HARMFUL_TEST, root), HARMFUL_TEST, root)
    trained = {normalized(prompt) for prompt in drawn["harmful", "train"]}
    tested = tuple(prompt for prompt in drawn[side, "test"] if normalized(prompt) not in trained)
    return {"train": drawn[side, "train"], "validation": drawn[side, "validation"], "test": tested}


def _pool(sample: Sample, root: Path) -> list[str]:
    return list(read_file(f"{sample.file}#instruction", root)["all"])


def _checked(prompts: list[str], sample: Sample, root: Path) -> tuple[str, ...]:
    found = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    if found != sample.sha256:
        raise InputError(
            f"what is drawn from it is not what the published runs drew: sha256 {found[:12]}…, not "
            f"{sample.sha256[:12]}…",
            where=str(root / sample.file),
            hint=f"take the files as they are at {COMMIT} of {REPOSITORY}",
        )
    return tuple(prompts)


ARDITI = PromptSource(
    "arditi",
    "the prompts of Arditi et al. (2024) as their runs drew them: FOLDER#harmful or FOLDER#harmless, where FOLDER is "
    "`dataset` in their repository",
    read_arditi,
)
