"""The routes that our vLLM servers have besides vLLM's own: `--middleware megarl.server.endpoints.RolloutEndpoint`.

    GET  /megarl/alive       how many requests are at work; the engine was asked, unless a weight sync holds it
    POST /megarl/generate    a batch of prompts in one request, one binary body back
    POST /megarl/score       teacher-forced log-probabilities and routes of one sequence
    POST /megarl/sync/init      the group that weights come by, and what will come
    POST /megarl/sync/pause     requests stop where they are, for a sync while they are in flight (rollout.in_flight)
    POST /megarl/sync/resume    that sync failed and this server is in no other: what it has goes on, or ends where its
                                weights are not whole
    POST /megarl/sync/receive   receive and check a whole sync; with load, go on to load it
    POST /megarl/sync/load      load it, drop the prefix cache, score the canary where one is given
    POST /megarl/sync/check     compare digests with an engine loaded from disk
    POST /megarl/sync/commit    set the version
    POST /megarl/sync/version   which version the engine holds
    POST /megarl/sync/sleep     give the GPU's memory to the trainer (launch.colocate): the weights go to host memory,
                                the KV cache goes
    POST /megarl/sync/wake      take it back

Errors come back as status 500 and a JSON object {"error": one line}; whatever would use weights that no version was
committed for, or that sleep, as 503; who has no right to
ask (megarl/door.py), as 403. Runs in the API server process.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from megarl import door
from megarl.rollout.wire import ENGINE_DIED, encode, encode_parts
from megarl.server.arrivals import name_of

Parts = list[bytes | memoryview]  # of one body, sent one after the other

PREFIX = "/megarl/"
DIRTY = (
    "a weight update has begun and no version was committed: the weights are neither old nor new; a whole weight "
    "sync mends it"
)
ASLEEP = "the server is asleep while the trainer has the GPU (launch.colocate); it answers again once it was woken"
SHUTS_DOWN = "Server shutting down"  # what vLLM's engine answers to all but a request, once it has got SIGTERM
_numbers = itertools.count()


class RolloutEndpoint:
    """ASGI middleware: answers what lies under /megarl/, hands everything else on."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._moe_layers: list[int] | None = None
        self._staged = True
        self._dirty = False  # loading has begun and no version was committed since
        self._asleep = False
        self._running = self._syncing = 0  # requests; of these the steps of a weight sync
        self._in_flight = ""  # of the sync that is under way: what becomes of requests; "" where none are expected
        self._loads = 0  # that have begun
        self._version: int | None = None  # that was set last: the engine has it
        self._engine: Any = None  # whose requests come by _adding
        self._serving = asyncio.Event()
        self._serving.set()
        self._tokens = door.Tokens(os.environ.get(door.SERVER_TOKEN, ""), os.environ.get(door.SERVER_CONTROL, ""))

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        counts = scope["type"] == "http" and scope["method"] == "POST"
        # the version is no step: who asks a hung engine for it, again and again, must not make it look alive
        syncs = counts and scope["path"].startswith(f"{PREFIX}sync/") and not scope["path"].endswith("/version")
        self._running, self._syncing = self._running + counts, self._syncing + syncs
        try:
            await self._handle(scope, receive, send)
        finally:
            self._running, self._syncing = self._running - counts, self._syncing - syncs

    async def _handle(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if locked := self._locked(scope):
            await _respond(send, 403, json.dumps({"error": locked}).encode())
            return
        if scope["method"] == "POST" and (refused := self._refused(scope["path"])):
            await _respond(send, 503, json.dumps({"error": refused}).encode())
            return
        engine = scope["app"].state.engine_client
        if engine is not self._engine:
            self._engine, engine.add_request = engine, self._adding(engine)
        if not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        request = await _body(receive)
        work = asyncio.ensure_future(self._answer(scope["path"].removeprefix(PREFIX), engine, request))
        gone = asyncio.ensure_future(receive())  # nothing but a disconnect can come after the body
        # vLLM leaves a call to its workers pending for ever when their process dies; `errored` tells.
        while not (work.done() or gone.done() or engine.errored):
            await asyncio.wait((work, gone), timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not work.done():
            work.cancel()  # the caller went away: vLLM aborts its requests
            return
        gone.cancel()
        if not work.done():
            work.cancel()
            await _respond(send, 500, json.dumps({"error": ENGINE_DIED}).encode())
            return
        status, body = work.result()
        await _respond(send, status, body)

    def _locked(self, scope: dict[str, Any]) -> str | None:
        given = dict(scope["headers"]).get(b"authorization", b"").decode(errors="replace")
        return door.refused(scope["method"], scope["path"], given, self._tokens)

    def _adding(self, engine: Any) -> Callable[..., Awaitable[Any]]:
        """engine.add_request, by which every route comes, vLLM's own too. Requests share cached blocks of one load
        alone: a sync may keep older ones (rollout.in_flight), and trainers that begin again give a version once more.
        So what comes while a sync has paused waits for its load.
        A token that the model does not have is refused, which would kill the engine.
        """
        add, size = engine.add_request, engine.model_config.get_vocab_size()

        async def salted(request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._serving.is_set():
                await self._serving.wait()
                if self._dirty:
                    raise EngineDeadError  # no load has ended the pause: another server may be asked
            if isinstance(prompt, dict):
                tokens = prompt.get("prompt_token_ids") or [0]
                for token in (min(tokens), max(tokens)):
                    if not 0 <= token < size:
                        raise VLLMValidationError(f"token {token} of the prompt is none of the model's {size}")
                prompt = {**prompt, "cache_salt": f"{self._loads} {prompt.get('cache_salt') or ''}"}
            return await add(request_id, prompt, *args, **kwargs)

        return salted

    def _refused(self, path: str) -> str | None:
        step = path.removeprefix(PREFIX + "sync/")
        if self._asleep and step not in ("sleep", "wake"):
            return ASLEEP
        return DIRTY if self._dirty and step == path and self._serving.is_set() else None

    async def _answer(self, path: str, engine: EngineClient, request: dict[str, Any]) -> tuple[int, bytes | Parts]:
        try:
            if path.startswith("sync/"):
                return 200, await self._sync(engine, path.removeprefix("sync/"), request)
            if path == "alive":
                if not (self._syncing or self._asleep):
                    await engine.get_weight_version()  # answered by the engine's own process, between two of its steps
                return 200, json.dumps({"running": self._running}).encode()
            if path == "generate":
                return 200, await self._generate(engine, **request)
            if path == "score":
                return 200, await self._score(engine, **request)
            return 404, json.dumps({"error": f"no route {PREFIX}{path}"}).encode()
        except EngineDeadError:  # its own words point at a stack trace that the user does not see
            return 500, json.dumps({"error": ENGINE_DIED}).encode()
        except Exception as error:
            what = " ".join(str(error).split()) or type(error).__name__
            return 500, json.dumps({"error": ENGINE_DIED if what == SHUTS_DOWN else what}).encode()

    async def _generate(
        self, engine: EngineClient, prompts: list[list[int]], sampling: dict[str, Any], seeds: list[int] | None
    ) -> Parts:
        of_prompt: list[int | None] = [*seeds] if seeds else [None] * len(prompts)
        batch, size = next(_numbers), len(prompts) * sampling.get("n", 1)
        runs = [
            _run(engine, prompt, {**sampling, "seed": seed}, name_of(batch, size, number))
            for number, (prompt, seed) in enumerate(zip(prompts, of_prompt, strict=True))
        ]
        outputs = await asyncio.gather(*runs)
        choices = [choice for output in outputs for choice in output.outputs]
        header = {
            "lengths": [len(choice.token_ids) for choice in choices],
            "cached": [output.num_cached_tokens for output in outputs],
            "finish": [choice.finish_reason for choice in choices],
            "versions": [
                [[_version(span.version), span.start, span.end] for span in choice.weight_versions or ()]
                for choice in choices
            ],
        }
        arrays: dict[str, list[np.ndarray]] = {
            "tokens": [np.array(choice.token_ids, np.int32) for choice in choices],
            "logprobs": [np.array(choice.logprobs.logprobs, np.float32) for choice in choices],
        }
        if choices[0].routed_experts is not None:
            arrays["routes"] = [await self._routes(engine, choice) for choice in choices]
        return encode_parts(header, arrays)

    async def _score(self, engine: EngineClient, tokens: list[int]) -> bytes:
        """prompt_logprobs turns the prefix cache's reads off, so the
        routes are of the very pass that gave the log-probabilities.
        """
        sampling = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0}
        output = await _run(engine, tokens, sampling, name_of(next(_numbers), 1, 0))
        arrays = {"logprobs": np.array(output.prompt_logprobs.logprobs, np.float32)}
        if output.outputs[0].routed_experts is not None:
            arrays["routes"] = (await self._routes(engine, output.outputs[0]))[: len(tokens) - 1]
        return encode({"version": _version(await engine.get_weight_version())}, arrays)

    async def _sync(self, engine: EngineClient, step: str, request: dict[str, Any]) -> bytes:
        if step == "init":
            self._staged = request["init"]["staged"]
            await _on_workers(engine, "sync_init", request["init"], request["remember_disk"])
        elif step == "pause":
            self._in_flight = request["in_flight"]
            self._serving.clear()
            await _pause(engine, "wait" if self._in_flight == "finish" else "keep")
        elif step == "resume":
            await self._let_go(engine)
        elif step == "receive":
            self._dirty = self._dirty or not self._staged
            await _on_workers(engine, "sync_receive")
            if request["load"]:
                return await self._load(engine, request["canary"], request["version"])
        elif step == "load":
            return await self._load(engine, request["canary"], request["version"])
        elif step == "check":
            folder = request["folder"]  # of run.dir, which this host may not share
            seen = all(await engine.collective_rpc("sync_remembers")) if folder is None else os.path.isdir(folder)
            if seen:
                await _on_workers(engine, "sync_check", folder)
            return json.dumps({"compared": seen}).encode()
        elif step == "commit":
            # A load in flight has set it; an engine at work answers between two of its steps, for which nobody waits.
            if request["version"] != self._version:
                await self._set_version(engine, request["version"])
            self._dirty = False
            found = await engine.collective_rpc("sync_agreeing") if request["agreeing"] else []
            return json.dumps({"version": self._version, "agreeing": found}).encode()
        elif step == "sleep":
            self._asleep = True
            await engine.sleep(level=1)
        elif step == "wake":
            if not await engine.wake_up():
                raise RuntimeError("vLLM did not take all of its memory back")
            self._asleep = False
        elif step != "version":
            raise ValueError(f"no step {step!r} in a weight sync")
        return json.dumps({"version": _version(await engine.get_weight_version())}).encode()

    async def _set_version(self, engine: EngineClient, version: int) -> None:
        self._version = None
        await engine.update_weight_version(str(version))
        self._version = version

    async def _let_go(self, engine: EngineClient) -> None:
        """Ends a pause that no load will end. A load that is under way may still do so."""
        if not self._in_flight:
            return
        if self._syncing > 1:
            raise RuntimeError("a step of the last weight sync is not done")
        if self._dirty:
            await engine.pause_generation(mode="abort")
        self._in_flight = ""
        await engine.resume_generation()
        self._serving.set()

    async def _load(self, engine: EngineClient, canary: list[int] | None, version: int) -> bytes:
        """From here on the weights are neither old nor agreed upon, until a version is committed.

        After a pause the requests that were kept go on here, under the new version, before the canary is compared:
        where it differs the run ends before it trains on what they sampled.
        """
        self._dirty, self._version = True, None
        self._loads += 1
        await _on_workers(engine, "sync_load")
        # Cached keys, values and routes are of the old weights. Requests still running are recomputed; kept ones go on
        # with what they have, and a new one hits nothing of an older load, whose blocks have its salt (_adding).
        if self._in_flight != "keep" and not await engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache could not be reset after a weight update")
        if self._in_flight:
            await self._set_version(engine, version)
            self._dirty, self._in_flight = False, ""
            await engine.resume_generation()
            self._serving.set()
        return await self._score(engine, canary) if canary else encode({}, {})

    async def _routes(self, engine: EngineClient, choice: CompletionOutput) -> np.ndarray:
        """[tokens, MoE layers, K] of all layers' [tokens, layers, K]."""
        if self._moe_layers is None:
            self._moe_layers = (await engine.collective_rpc("moe_layers"))[0]
        routes = choice.routed_experts
        return routes if routes.shape[1] == len(self._moe_layers) else routes[:, self._moe_layers]


async def _on_workers(engine: EngineClient, method: str, *args: Any) -> None:
    """Raises RuntimeError with the first worker's account of what went wrong, if any."""
    for error in await engine.collective_rpc(method, args=args):
        if error is not None:
            raise RuntimeError(error)


async def _pause(engine: Any, mode: str) -> None:
    """As EngineClient.pause_generation, less the 20 ms that it sleeps once the engine has paused, so that what ended
    before is told before: no order of ours, while trainers and engine wait.
    """
    await engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=False)


async def _run(engine: EngineClient, prompt: list[int], sampling: dict[str, Any], name: str) -> RequestOutput:
    """Raises EngineDeadError where the engine, told to end, answers with as much as it has sampled."""
    params = SamplingParams(
        **sampling, logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    outputs = [output async for output in engine.generate(tokens_input(prompt), params, name)]
    if any(choice.finish_reason == "abort" for choice in outputs[-1].outputs):
        raise EngineDeadError
    return outputs[-1]


def _version(label: str) -> int:
    """vLLM's label of the weights it was started with is "default": optimizer step 0."""
    return 0 if label == "default" else int(label)


async def _respond(send: Any, status: int, body: bytes | Parts) -> None:
    parts = body if isinstance(body, list) else [body]
    length = str(sum(len(part) for part in parts)).encode()
    headers = [(b"content-length", length), (b"content-type", b"application/octet-stream")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for number, part in enumerate(parts, start=1):  # send() waits while the socket takes no more
        await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})


async def _body(receive: Any) -> dict[str, Any]:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return json.loads(b"".join(parts) or b"{}")
