"""Recognising that disk or memory ran out, whichever package says so."""

import errno
import re
from typing import Literal

import torch

from .errors import causes

#: A quota and a limit of a file's size (`ulimit -f`, FAT32) are full disks to whoever writes.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: safetensors and torch report failed writes as errors of their own, in words; torch's do not say why they failed.
FULL_DISK_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|PytorchStreamWriter failed writing|iostream error"
)
#: torch's allocator for CPUs, and that for Apple's GPUs.
NO_MEMORY_TEXT = re.compile(r"can't allocate memory|Cannot allocate memory|out of memory")


def ran_out(error: BaseException) -> Literal["disk", "memory"] | None:
    """What ran out, if an error, or one that led to it, says that something did."""
    for each in causes(error):
        if isinstance(each, (MemoryError, torch.OutOfMemoryError)):
            return "memory"
        if isinstance(each, OSError) and each.errno is not None:
            if each.errno in FULL_DISK:
                return "disk"
            if each.errno == errno.ENOMEM:
                return "memory"
        elif isinstance(each, Exception):
            if FULL_DISK_TEXT.search(str(each)):
                return "disk"
            if isinstance(each, RuntimeError) and NO_MEMORY_TEXT.search(str(each)):
                return "memory"
    return None
