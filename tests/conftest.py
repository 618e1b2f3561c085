"""Settings for the whole suite."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A loaded machine is slow at everything, drawing examples included: that says nothing about the
# code, and neither does the time that one example takes.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
