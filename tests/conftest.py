"""Fixtures that every test may use, and how patient hypothesis is."""

from hypothesis import HealthCheck, settings

from tests.docker_engine import docker_engine

# How long an example takes says something about the machine, and nothing about what is tested. (In CI the
# library's own profile is the parent: the same examples in every run.)
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

__all__ = ["docker_engine"]
