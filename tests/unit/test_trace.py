"""trace.json is whole after a kill, and a resumed run goes on in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.observe.trace import phase, read_trace, start_trace, stop_trace


def test_events_survive_a_kill_and_a_resumed_run_follows(tmp_path: Path) -> None:
    with phase("before"):  # no trace yet: nothing to write to
        pass
    start_trace(tmp_path)
    with phase("step"), phase("rollout"):
        pass
    with pytest.raises(ValueError), phase("update"):
        raise ValueError
    path = tmp_path / "trace.json"
    killed = path.read_text()  # stop_trace never came
    assert [event["name"] for event in json.loads(killed.rstrip().rstrip(",") + "]")] == ["rollout", "step", "update"]

    path.write_text(killed + '{"name": "sy')  # a write that was cut short
    start_trace(tmp_path)
    with phase("sync"):
        pass
    stop_trace()
    with phase("after"):
        pass
    events = read_trace(tmp_path)
    assert [event["name"] for event in events] == ["rollout", "step", "update", "sync"]
    assert events == json.loads(path.read_text().rstrip().rstrip(",") + "]")
    rollout, step, update, sync = events
    assert (
        step["ts"]
        <= rollout["ts"]
        <= rollout["ts"] + rollout["dur"]
        <= step["ts"] + step["dur"]
        <= update["ts"]
        <= sync["ts"]
    )
