import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# 100 MB, again and again: how many pages are new to the process in the end? At first aligned memory finds no place that is
# large enough among what was freed.
SCRIPT = """
import resource, sys
import torch as th
from sb3_ext.common.malloc import keep_freed_memory

print(keep_freed_memory())
for _ in range(20):
    th.ones(25_000_000).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
th.ones(25_000_000).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**clean, **env}, capture_output=True, text=True, check=True)
    kept, n_pages = done.stdout.split()
    return kept == "True", int(n_pages)


def test_freed_memory_is_used_again():
    kept, n_pages = run()
    assert kept and n_pages < 1000


def test_the_users_own_settings_stay():
    kept, n_pages = run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert not kept and n_pages > 20_000
