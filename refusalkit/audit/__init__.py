"""Audit a checkpoint: how brittle its refusals are, and whether that stays within thresholds."""
