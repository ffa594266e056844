"""What vLLM's engine samples for a request goes to the API server once, when the request ends.

vLLM sends each token of each request by itself: a step of 128 requests is a message of 128 outputs with four arrays
each, packed in the engine's process, under the lock of the very interpreter that decodes, and unpacked again in the API
server, which keeps them until the request ends. Here they are kept where they were made. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Message = tuple[int, Any]  # client of the engine, its EngineCoreOutputs


@dataclass
class _Held:
    """first: the earliest EngineCoreOutput kept back, with what only a request's first one says."""

    client: int
    first: Any
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)

    def add(self, output: Any) -> None:
        self.tokens += output.new_token_ids
        if output.new_logprobs is not None:
            self.logprobs.append(output.new_logprobs)
        if output.routed_experts is not None:
            self.routes.append(output.routed_experts)

    def put_into(self, output: Any) -> None:
        """`output`, whose own part was added, says all of it."""
        output.new_token_ids = self.tokens
        if self.logprobs:
            arrays = zip(*(chunk[:3] for chunk in self.logprobs), strict=True)
            output.new_logprobs = type(self.logprobs[0])(*map(np.concatenate, arrays))
        if self.routes:
            output.routed_experts = np.concatenate(self.routes)
        for name in ("prefill_stats", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs"):
            if (said := getattr(self.first, name)) is not None:
                setattr(output, name, said)


class HeldOutputs:
    """Of one engine. The version of the weights is told with each message, so nothing is kept over a change of it."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._version: str | None = None

    def before(self, version: str, message: Callable[..., Any]) -> list[Message]:
        """What is to be sent before anything sampled under `version`: all that was kept under another one.

        message: makes an EngineCoreOutputs.
        """
        held, old = self._held, self._version
        self._version = version
        if version == old or not held:
            return []
        self._held = {}
        outputs: dict[int, list[Any]] = {}
        for each in held.values():
            each.put_into(each.first)
            outputs.setdefault(each.client, []).append(each.first)
        return [(client, message(outputs=kept, weight_version=old)) for client, kept in outputs.items()]

    def take(self, step: dict[int, Any], requests: dict[str, Any], waits: Callable[[Any], bool]) -> None:
        """Keeps back what need not go yet out of one step's messages, by client; messages that say nothing more go.

        requests: those that the engine has, by id; waits: whether one wants its output at its end alone.
        """
        for client, message in [*step.items()]:
            message.outputs = [out for out in message.outputs if not self._keeps(client, out, requests, waits)]
            if not message.outputs and message.finished_requests is None and message.scheduler_stats is None:
                del step[client]
        if len(self._held) > len(requests):  # some were aborted
            self._held = {name: held for name, held in self._held.items() if name in requests}

    def _keeps(self, client: int, output: Any, requests: dict[str, Any], waits: Callable[[Any], bool]) -> bool:
        held = self._held.get(output.request_id)
        if output.finish_reason is not None:
            if held is not None:
                del self._held[output.request_id]
                held.add(output)
                held.put_into(output)
            return False
        if held is None:
            request = requests.get(output.request_id)
            if request is None or not waits(request):
                return False
            held = self._held[output.request_id] = _Held(client, output)
        held.add(output)
        return True
