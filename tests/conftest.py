"""Fixtures of every test."""

from fixtures import family, interruptible, no_network  # noqa: F401
