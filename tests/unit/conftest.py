"""Rules of the unit suite: properties are tried on the same examples everywhere, at any speed.

`MPIPIPE_EXAMPLES=random` draws new ones: a search for faults, not a verdict on a change.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Hypothesis' own profile draws other examples in each run and fails one that takes 0.2 s, which is
# a verdict on the machine.
settings.register_profile(
    "mpipipe",
    deadline=None,
    derandomize=os.environ.get("MPIPIPE_EXAMPLES") != "random",
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mpipipe")
