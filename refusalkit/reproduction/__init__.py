"""Repeat the authors' published runs and compare with them."""
