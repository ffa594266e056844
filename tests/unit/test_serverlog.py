"""The cause of a dead server, from logs as vLLM 0.32 writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.server.serverlog import cause, log_tail

API, CORE = "(APIServer pid=1) ", "(EngineCore pid=2) ERROR 11-28 15:35:10 [core.py:1510] "
WARNING = f"{API}WARNING 11-28 15:34:30 [base.py:380] ValueError: Tokenizer not available when it is skipped\n"
ECHO = """Traceback (most recent call last):
  File "/x/vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
START = f"{WARNING}{CORE}EngineCore failed to start.\n{CORE}Traceback (most recent call last):\n"
LOGS = {
    "assert": (
        START
        + f'{CORE}  File "/x/layers/embedding.py", line 515, in weight_loader\n'
        + f"{CORE}    assert loaded_weight.shape[output_dim] == self.org_vocab_size\n"
        + f"{CORE}           ^^^^^^^^^^^^^^^^^^^^^^^^\n{CORE}AssertionError\n"
        + f"Process EngineCore:\nTraceback (most recent call last):\nAssertionError\n{ECHO}",
        "AssertionError, assert loaded_weight.shape[output_dim] == self.org_vocab_size (embedding.py:515)",
    ),
    "cache": (
        f"{START}{CORE}ValueError: No available memory for the cache blocks.\nProcess EngineCore:\n{ECHO}",
        "ValueError: No available memory for the cache blocks.",
    ),
    "while it serves": (
        f"{WARNING}{CORE}EngineCore encountered a fatal error.\n{CORE}Traceback (most recent call last):\n"
        f"{CORE}RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0\n"
        f"{API}ERROR 11-28 15:34:30 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
        "encountered an issue. See stack trace (above) for the root cause.\nINFO:     Shutting down\n",
        "RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0",
    ),
    "chained": (
        f"{START}{CORE}KeyError: 'w1'\n{CORE}\n{CORE}During handling of the above exception, another exception "
        f"occurred:\n{CORE}\n{CORE}ValueError: There is no module or parameter named 'w1'\n{ECHO}",
        "ValueError: There is no module or parameter named 'w1'",
    ),
    "of a worker": (
        "(Worker_TP1 pid=5) ERROR 11-28 15:35:10 [multiproc.py:9] WorkerProc failed to start.\n"
        "(Worker_TP1 pid=5) ERROR 11-28 15:35:10 [multiproc.py:9] torch.OutOfMemoryError: CUDA out of memory.\n"
        "(Worker_TP0 pid=4) ERROR 11-28 15:35:11 [multiproc.py:9] WorkerProc hit an exception.\n"
        "(Worker_TP0 pid=4) ERROR 11-28 15:35:11 [multiproc.py:9] RuntimeError: Connection closed by peer\n"
        f"{ECHO}",
        "torch.OutOfMemoryError: CUDA out of memory.",
    ),
    "of several lines": (
        f"{WARNING}Traceback (most recent call last):\npydantic_core._pydantic_core.ValidationError: 1 error "
        "for ModelConfig\n  Value error, max_model_len (99) is greater than 8\n    For further information\n\nmore\n",
        "pydantic_core._pydantic_core.ValidationError: 1 error for ModelConfig Value error, max_model_len (99) "
        "is greater than 8 For further information",
    ),
    "arguments": ("usage: api_server.py\napi_server.py: error: argument --dtype: invalid choice\n", "argument --dtype"),
    "only an echo": (
        ECHO,
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s)",
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_fault_14_the_cause_of_a_dead_server(tmp_path: Path, name: str) -> None:
    text, wanted = LOGS[name]
    (tmp_path / "log").write_text(text)
    found = cause(tmp_path / "log")
    assert found is not None and "\n" not in found and wanted in found
    if name not in ("arguments", "only an echo"):
        assert found == wanted


def test_a_log_without_a_cause_and_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"{WARNING}{API}WARNING [x.py:1] may cause errors like `OSError: too many`\nfine\n")
    assert cause(log) is None
    log.write_text('one\ntwo\n\nnanobind: leaked 3 functions!\n - leaked function "f"\n')
    assert log_tail(log, 2).splitlines() == ["one", "two"]
