"""glibc's malloc in processes that compute on a CPU."""

from __future__ import annotations

import os


def huge_pages() -> dict[str, str]:
    """Environment: malloc asks for transparent huge pages, where the kernel leaves that to programs ("madvise").

    Every large temporary of torch is fresh memory from the kernel, and by pages of 4 KiB half of an update's time went
    into page faults. glibc 2.35 and newer; older ones ignore it. A GLIBC_TUNABLES that is set stands.
    """
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
