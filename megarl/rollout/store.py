"""The run's store, as rank 0 opens it and as a rollout worker finds it (launch.store): is it a run's, and does the
worker fit that run?
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import torch
import torch.distributed as dist

import megarl
from megarl.addresses import LOCAL, host_and_port, is_loopback, own_address, resolve
from megarl.announce import announce
from megarl.config import Config
from megarl.door import run_secret, signed, verified
from megarl.errors import UserError
from megarl.rollout.registry import OPEN, STRANGERS, claim, open_store, tell_refused
from megarl.weights.map.weight_map import load_hf_config

KNOWN_WITHIN_S = 5.0  # from a store's opening to rank 0's word in it
VLLM = "run/vllm"  # the release of the first worker that fits, signed
CONTEXT, ROUTES = "context in tokens", "recording of routes"
MAY_BE_MORE = (CONTEXT, ROUTES)  # of a worker than the trainers need
UNUSED = ("_name_or_path", "transformers_version")  # keys of config.json that make no other model


def open_run_store(config: Config, *, spans_hosts: bool) -> tuple[dist.TCPStore, tuple[str, int]]:
    """The store, opened on rank 0's host, and the address at which all others find it. Port 0 is drawn here, and
    printed. UserError where launch.store is another host's.
    """
    given, interface, within_s = config.launch.store, config.launch.interface, config.rollout.start_timeout_s
    host, port = host_and_port(given)
    try:
        unset = port == 0 and host in LOCAL and spans_hosts
        address = own_address(None, interface) if unset else resolve(host, interface, within_s)
    except OSError as error:
        raise UserError(f"launch.store {given!r}: {host!r} is no host's name here ({error.strerror})") from None
    store = open_store(address, port, is_master=True, timeout_s=within_s, facts=facts(config))
    if not is_loopback(address) and not run_secret():
        announce(
            f"megarl: warning: MEGARL_TOKEN is not set: whoever reaches {address}:{store.port} can change the servers' "
            "weights; set the same on all hosts (docs/security.md)"
        )
    if port == 0:
        announce(f"the run's store is open: megarl rollout CONFIG launch.store={address}:{store.port}")
    return store, (address, store.port)


def facts(config: Config) -> dict[str, Any]:
    """What trainers and servers must have alike, by the name under which a difference is told: else a server samples
    otherwise, and nobody sees it.
    """
    rollout, hf = config.rollout, load_hf_config(config.model.path)
    text = json.dumps({key: value for key, value in hf.items() if key not in UNUSED}, sort_keys=True)
    return {
        "megarl release": megarl.__version__,
        "vocabulary size": hf.get("vocab_size"),
        "config.json (its digest)": hashlib.sha256(text.encode()).hexdigest()[:12],
        "dtype": config.rollout_dtype(on_gpu=torch.cuda.is_available()),
        "rollout.quantization": rollout.quantization,
        "rollout.kv_cache_dtype": rollout.kv_cache_dtype,
        "rollout.batch_invariant": rollout.batch_invariant,
        CONTEXT: config.server_context,  # of a shorter one responses end early, as if at rollout.max_new_tokens
        ROUTES: config.wants_routes,
    }


def refuse_foreign(store: dist.Store, name: str) -> dict[str, Any]:
    """The facts of the run. UserError where `store` is no store of a run, or of one with another secret."""
    deadline = time.monotonic() + KNOWN_WITHIN_S
    while not store.check([OPEN]):
        if time.monotonic() > deadline:
            raise UserError(
                f"launch.store {name}: the store there is no run's, but maybe torchrun's own: give the trainers' "
                "launch.store, another port than --master-port and --rdzv-endpoint"
            )
        time.sleep(0.1)
    if (word := verified(OPEN, store.get(OPEN))) is None:
        claim(store, STRANGERS)
        raise UserError(
            f"launch.store {name}: the run there has another MEGARL_TOKEN than this worker: set the same on all hosts "
            "(docs/security.md)"
        )
    return json.loads(word)


def refuse_other(store: dist.Store, theirs: dict[str, Any], facts: dict[str, Any], vllm: str, worker: str) -> None:
    """UserError where `worker`, described for a reader, does not fit the trainers; they are told too. theirs: facts of
    the trainers; facts: the worker's. vllm: its release, which that of the first worker that fits decides.
    """
    wrong = [
        f"its {what} is {facts.get(what)}, the trainers' is {value}"
        for what, value in theirs.items()
        if facts.get(what) != value and not (what in MAY_BE_MORE and facts.get(what, 0) > value)
    ]
    first = verified(VLLM, store.compare_set(VLLM, "", signed(VLLM, vllm))) if vllm and not wrong else None
    if first not in (None, vllm):
        wrong.append(f"its vLLM release is {vllm}, that of the first worker is {first}")
    if wrong:
        line = (
            f"{worker} does not fit the run: {'; '.join(wrong)}; start it with the CONFIG and the model of the trainers"
        )
        tell_refused(store, line)
        raise UserError(line)
