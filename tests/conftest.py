"""Hypothesis: the same examples on every run; LPLB_HYPOTHESIS_EXAMPLES sets how many (40 by default)."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "lplb",
    max_examples=int(os.environ.get("LPLB_HYPOTHESIS_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lplb")
