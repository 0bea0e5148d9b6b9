"""Run models: all code that touches nnsight lives here."""
