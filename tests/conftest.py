"""Hypothesis: the same examples on every run; LPLB_HYPOTHESIS_EXAMPLES sets how many (40 by default)."""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lplb",
    max_examples=int(os.environ.get("LPLB_HYPOTHESIS_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lplb")


@pytest.fixture(scope="session")
def highs() -> None:
    """For tests that solve with HiGHS."""
    pytest.importorskip("highspy", reason="needs highspy, which is not installed")
