"""The evidence: everything docs/results.md says, measured by one command (see `__main__.py`)."""
