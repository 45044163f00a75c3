"""How hypothesis searches: the same examples each time, or with --hypothesis-profile=deep many."""

from hypothesis import HealthCheck, settings

_BUSY_MACHINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("repeatable", max_examples=100, derandomize=True, **_BUSY_MACHINE)
settings.register_profile("deep", max_examples=5000, **_BUSY_MACHINE)
settings.load_profile("repeatable")
