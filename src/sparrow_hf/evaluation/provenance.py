"""Provenance of a measurement: its command, code, machine and numerics."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import sparrow_hf

from .._transformers import attention_of


def provenance(target: PreTrainedModel, **details: Any) -> dict[str, Any]:
    """Command, code, machine and numerics of a measurement on `target`, and whatever else `details` names."""
    device = target.device
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "sparrow_hf": sparrow_hf.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": attention_of(target.config),
        **details,
    }


def commit() -> str | None:
    """The commit this package is run from, with `-dirty` for changed files; `None` if it was installed without git."""
    here = Path(__file__)
    try:
        # An installed copy may lie inside someone else's repository.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor_name() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
