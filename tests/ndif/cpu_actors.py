"""Let NDIF's model actors serve from the processor: what a machine without a graphics card has to do differently.

The server loads this module by name; refusalkit is not installed there, so nothing of it is imported.
"""

from __future__ import annotations

import ray
import torch
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

if not torch.cuda.is_available():
    # Called after every request.
    torch.cuda.synchronize = lambda device=None: None


class OnProcessor:
    """Load the weights into main memory, in place of the cards that the controller believes in."""

    def load_from_disk(self):
        """Load the model as the actor would, on the processor."""
        self.gpu_mem_bytes_by_id = {}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model


class _Plain(OnProcessor, BaseModelDeployment):
    """Run a job in the actor's own process."""


class _Sandbox(OnProcessor, SandboxModelDeployment):
    """Run a job in a process of its own, as a public server does."""


@ray.remote(num_cpus=0, max_restarts=-1)
class Plain(_Plain):
    """Run a job in the actor's own process."""


@ray.remote(num_cpus=0, max_restarts=-1)
class Sandbox(_Sandbox):
    """Run a job in a process of its own, as a public server does."""
