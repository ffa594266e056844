"""A buffer shared with a second process: the same bytes, the same memory, a handle that is plain JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from megarl.weights.transport.ipc import share

READER = """
import json, sys, torch
from megarl.weights.transport.ipc import open_shared
for line in sys.stdin:
    view = open_shared(json.loads(line), torch.device("cpu"))
    print(int(view.sum(dtype=torch.int64)), view.numel(), flush=True)
    view[0] = 7  # the owner sees it: no copy was made
"""


def test_another_process_reads_the_memory_itself() -> None:
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None and reader.stdout is not None
    whole = torch.arange(4096, dtype=torch.int32).view(torch.uint8)
    try:
        for buffer in (whole.clone(), whole[64:1024]):  # a view: its offset travels
            expected = int(buffer.sum(dtype=torch.int64))
            handle = share(buffer)
            reader.stdin.write(json.dumps(handle) + "\n")
            reader.stdin.flush()
            assert reader.stdout.readline().split() == [str(expected), str(buffer.numel())]
        reader.stdin.close()
        assert reader.wait(timeout=300) == 0
        assert buffer[0] == 7 and whole[64] == 7 and whole[63] != 7
    finally:
        reader.kill()
