"""Fixtures of the contracts."""

from tests.contracts.runtime_stage import stage

__all__ = ["stage"]
