"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Time says nothing on a machine that is shared.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared machine")
