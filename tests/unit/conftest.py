"""Rules of the unit suite: properties are tried on the same examples everywhere, at any speed."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Hypothesis' own profile draws other examples in each run and fails one that takes 0.2 s, which is
# a verdict on the machine.
settings.register_profile(
    "mpipipe",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mpipipe")
