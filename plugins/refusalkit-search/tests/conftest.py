"""Keep the tests offline and on one thread: many small products on threads that wait for each other take minutes."""

from __future__ import annotations

import os

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
