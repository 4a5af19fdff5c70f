"""Fixtures of every test."""

from fixtures import family, no_network  # noqa: F401
