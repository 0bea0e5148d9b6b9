"""Look at an NDIF server without sending it any work: what it hosts, and how its versions differ from ours."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnsight.schema.config import CONFIG

from refusalkit.engine.server import Server

#: Packages whose versions decide results, or whether a job can be read at all.
COMPARED = ("python", "nnsight", "torch", "transformers")


@dataclass(frozen=True)
class Hosted:
    """Hold one model of a server."""

    model_key: str
    state: str

    @property
    def name(self) -> str:
        """The hub name or folder, with the revision where there is one."""
        named = self._named
        revision = named.get("revision")
        return f"{named.get('repo_id', self.model_key)}" + (f" at {revision}" if revision else "")

    def same_model(self, model_key: str) -> bool:
        """Whether this is the model that a key asks for; `main` is the revision of a key without one."""
        return self._plain == Hosted(model_key, "")._plain

    @property
    def _named(self) -> Mapping[str, Any]:
        try:
            found = json.loads(self.model_key.partition(":")[2])
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def _plain(self) -> tuple[str, str, str]:
        named = self._named
        return str(named.get("repo_id")).lower(), named.get("revision") or "main", str(named.get("task"))


@dataclass(frozen=True)
class Status:
    """Hold what a server says of itself."""

    host: str
    has_key: bool
    hosted: tuple[Hosted, ...]
    versions: Mapping[str, tuple[str, str]]
    """By package: (here, there)."""


def look(host: str) -> Status:
    """Ask a server what it hosts and runs; raises `RunError` when it cannot be reached or is no NDIF server."""
    server = Server(host, "", "")
    deployments = server.get("/status").get("deployments", {})
    environment = server.get("/env")
    hosted = [
        # The key follows an identifier and the class of the actor.
        Hosted(value.get("model_key") or name[name.find("nnsight.") :], str(value.get("application_state", "unknown")))
        for name, value in deployments.items()
    ]
    there = {"python": str(environment.get("python_version", "")).split(" ")[0], **environment.get("packages", {})}
    here = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in COMPARED[1:]}}
    versions = {name: (here[name], str(there.get(name, "unknown"))) for name in COMPARED}
    return Status(host, bool(CONFIG.API.APIKEY), tuple(hosted), versions)
