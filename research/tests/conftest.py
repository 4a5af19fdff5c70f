"""Fixtures of every test: those of the package's own tests."""

from fixtures import family, no_network  # noqa: F401
