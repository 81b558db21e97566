"""What every test shares: Hypothesis profiles, a Postgres, and an environment without our settings."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.postgres", "tests.server"]

# A machine that runs the product may have it configured; a test configures what it needs itself.
for name in [name for name in os.environ if name.startswith("PECULIUM_")]:
    del os.environ[name]

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "deep", parent=settings.get_profile("ci"), max_examples=20_000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
