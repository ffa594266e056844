"""Who may ask a rollout server what, and whose words in the run's store count (docs/security.md).

A server asks every caller for a token: its data token, to sample and to score, or its control token, for everything
else (weights, sleep, vLLM's own control routes). Where the run has a secret (MEGARL_TOKEN, the same on all hosts;
`megarl run` makes one) both follow from it, and it signs what the processes tell each other in the store; it is never
sent. Without it a worker makes tokens of its own and hands them through the store, and whoever reaches the store has
them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field

RUN_SECRET = "MEGARL_TOKEN"
SERVER_TOKEN, SERVER_CONTROL = "MEGARL_SERVER_TOKEN", "MEGARL_SERVER_CONTROL"  # of the server process alone
# not vLLM's /inference/v1/abort_requests: who may sample does not end what others sample
_DATA = ("/megarl/generate", "/megarl/score", "/megarl/sync/version", "/inference/v1/generate")
_DATA_FOLDER = "/v1/"


@dataclass(frozen=True)
class Tokens:
    """Of one server. An agent that only samples is given `data`."""

    data: str = field(repr=False)
    control: str = field(repr=False)


def run_secret() -> str:
    """MEGARL_TOKEN, or "" where the run has none."""
    return os.environ.get(RUN_SECRET, "")


def new_secret() -> str:
    return secrets.token_urlsafe(24)


def server_tokens() -> Tokens | None:
    """Those of every server of a run that has a secret; None for a run without one."""
    return Tokens(_mac("data"), _mac("control")) if run_secret() else None


def header(token: str) -> dict[str, str]:
    """The HTTP header that carries a token."""
    return {"Authorization": f"Bearer {token}"}


def refused(method: str, path: str, authorization: str, tokens: Tokens) -> str | None:
    """Why a server does not answer this request, in one line; None where it does. An empty token opens nothing."""
    if method == "GET" and path == "/health":
        return None
    given = authorization.removeprefix("Bearer ")
    if tokens.control and hmac.compare_digest(given.encode(), tokens.control.encode()):
        return None
    with_data = bool(tokens.data) and hmac.compare_digest(given.encode(), tokens.data.encode())
    if with_data and (path in _DATA or path.startswith(_DATA_FOLDER)):
        return None
    if with_data:
        return f"{path} is the trainer's alone; a data token opens {', '.join([*_DATA, _DATA_FOLDER])}"
    return "no token of this run, or another's; send the header 'Authorization: Bearer TOKEN' (docs/security.md)"


def signed(key: str, value: str) -> str:
    """`value` as it goes into the store under `key`."""
    return f"{_signature(key, value)} {value}"


def verified(key: str, text: bytes) -> str | None:
    """What stands in the store under `key`; None where whoever wrote it does not have the run's secret."""
    signature, _, value = text.decode(errors="replace").partition(" ")
    return value if hmac.compare_digest(signature.encode(), _signature(key, value).encode()) else None


def _signature(key: str, value: str) -> str:
    return _mac(f"{key}\n{value}")


def _mac(text: str) -> str:
    return hmac.new(run_secret().encode(), text.encode(), hashlib.sha256).hexdigest()
