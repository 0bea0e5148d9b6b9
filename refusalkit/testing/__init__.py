"""Help plugin authors test what they provide: tiny random models and the laws that built-ins obey too."""

from refusalkit.testing.law_sets import broken_laws
from refusalkit.testing.laws import (
    Law,
    check_adapter,
    check_command,
    check_intervention,
    check_metric,
    check_prompt_source,
    check_selector,
    check_strategy,
)
from refusalkit.testing.models import random_engine, random_model, tiny_tokenizer

__all__ = [
    "Law",
    "broken_laws",
    "check_adapter",
    "check_command",
    "check_intervention",
    "check_metric",
    "check_prompt_source",
    "check_selector",
    "check_strategy",
    "random_engine",
    "random_model",
    "tiny_tokenizer",
]
