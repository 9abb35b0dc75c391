"""What the C library does with memory that is no longer used."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# Names and numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
# Of single blocks, in glibc before version 2.35
_LARGEST_BEFORE_2_35 = 2**25


@functools.cache
def keep_freed_memory() -> bool:
    """
    Let this process keep the memory that it frees, up to 2 GiB, for what it allocates next.

    By default glibc gives much of it back to the system, which clears each page anew when it is next touched. Where the
    activations of one update take hundreds of megabytes, that costs time. It stays so until the process ends.

    :return: Whether it is so. Not without glibc, nor where the environment has variables of its malloc (``MALLOC_...``,
        ``GLIBC_TUNABLES``), which are left as they are.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    keeps_its_top = mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    return bool(keeps_its_top and (mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)))
