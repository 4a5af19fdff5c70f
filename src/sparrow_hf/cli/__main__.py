"""`python -m sparrow_hf.cli`: the `sparrow` command, for launchers that start a module."""

from . import main

main()
