"""A signal at a trainer rank: when it ends the rank at once, when it is remembered, when the time is over."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from megarl.errors import Stopped
from megarl.launch.stop import TWICE_S, StopRequest

RANK = """
import signal, sys, threading, time
from megarl.errors import Stopped
from megarl.launch import stop
{before}
if {supervised}:
    stop.supervised()
request = stop.StopRequest({within_s}, unsaved=lambda: {unsaved})
print("ready", flush=True)
{body}
"""
WAITS = """
try:
    with request.interruptible():
        time.sleep(600)
except Stopped as stopped:
    print("stopped by", stopped.signum)
"""
ELSEWHERE = """
threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
"""
UPDATES = """
until = time.monotonic() + 600
while not request.asked:
    time.sleep(0.05)
try:
    with request.interruptible():
        pass
except Stopped:
    print("stopped after the update")
"""
MANY_FILES = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
"""
# as in a collective: a call into C that ends for no signal
STUCK = """
import ctypes
mutex = (ctypes.c_char * 64)()
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def rank(
    body: str, *, unsaved: bool = True, within_s: float = 600, supervised: bool = False, before: str = ""
) -> subprocess.Popen[str]:
    given = {"unsaved": unsaved, "within_s": within_s, "supervised": supervised, "before": before}
    code = textwrap.dedent(RANK).format(body=body, **given)
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize(
    ("supervised", "signum"), [(False, signal.SIGTERM), (False, signal.SIGINT), (True, signal.SIGUSR1)]
)
def test_fault_18_a_wait_for_rollouts_ends_at_once_and_an_update_is_not_cut(supervised: bool, signum: int) -> None:
    for body, said in ((WAITS, f"stopped by {int(signum)}\n"), (UPDATES, "stopped after the update\n")):
        run = rank(body, supervised=supervised)
        run.send_signal(signum)
        out, err = run.communicate(timeout=300)
        assert (run.returncode, out, err) == (0, said, "")


def test_fault_18_a_signal_that_did_not_end_the_sleep_of_a_wait_comes_again() -> None:
    """As one that comes after Python has looked for signals, and before the kernel sleeps: here in another thread. The
    one sent again is no second signal, however late it is.
    """
    out, err = rank(ELSEWHERE + WAITS, before="stop.TWICE_S = 0.0").communicate(timeout=60)
    assert (out, err) == (f"stopped by {int(signal.SIGTERM)}\n", "")


def test_fault_18_a_rank_with_nothing_to_save_ends_at_once_wherever_it_is() -> None:
    run = rank(STUCK, unsaved=False)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143


def test_a_rank_that_holds_many_files_hears_a_signal() -> None:
    """Its thread ended by what select() says of a file above 1023; groups of many ranks have as many connections."""
    run = rank(STUCK, unsaved=False, before=MANY_FILES)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143


def test_fault_18_a_rank_that_cannot_save_in_time_ends_without() -> None:
    run = rank(STUCK, within_s=0.5)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=300)
    assert (run.returncode, err) == (143, "no checkpoint within run.preempt_s 0.5: ending without\n")


def test_fault_18_the_same_signal_by_two_ways_is_one_and_a_later_one_ends_the_rank() -> None:
    run = rank(STUCK)
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(2 * TWICE_S)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143


def test_a_second_signal_before_the_wait_has_ended_leaves_no_later_one_to_raise() -> None:
    """It would be raised in the middle of an update."""
    request = StopRequest(60, unsaved=lambda: True)
    try:
        with request.interruptible():
            with pytest.raises(Stopped):
                request._take(signal.SIGTERM, None)
            request._take(signal.SIGINT, None)
    finally:
        request.close()
