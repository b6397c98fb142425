"""A server of rewards, for models that need another machine, process or environment.

GET /health  -> {"version": 1, "max_images": 64, "rewards": {name: {"differentiable": bool}},
                 "state": "ready" or "stopping", "in_flight": requests to /score that have no reply,
                 "waiting": {name: scorings that have not begun}}
GET /metrics -> the same and what was done so far, as text for Prometheus
POST /score  {"images": [base64 of an 8-bit RGB PNG, ...], "prompts": [text, ...],
              "metadata": [{...}, ...] or null, "names": [name, ...] or null for all rewards}
             -> {"scores": {name: [number, ...]}}

All need ``Authorization: Bearer TOKEN`` if the server has a token. An error is {"detail": why}:
401 token, 408 body too slow, 413 body too large, 422 malformed (which image, and why), 500 a reward
failed, 503 not started in time, or the server stops (safe to retry), 504 started but too slow.
Bodies are JSON and PNG; nothing is ever unpickled. There is no TLS: on an open network put a proxy
in front. ``rewards.connections`` limits connections and stops the server.
"""

# No `from __future__ import annotations`: FastAPI evaluates its handlers' annotations, whose names
# are local to `app`, so that only serving imports fastapi.
import asyncio
import ctypes
import hmac
import sys
import time
from concurrent.futures import Future
from typing import Any

import torch

from . import Spec, build
from .base import Reward, RewardError, evaluate
from .http import PROTOCOL
from .parsing import parse
from .threads import Worker

IDLE = 1.0  # seconds without a request after which memory goes back to the system


def app(
    spec: Spec,
    token: str | None = None,
    device: str = "cpu",
    max_images: int = 64,
    max_bytes: int = 2**27,
    max_pixels: int = 2**26,
    timeout: float = 120.0,
):
    """The FastAPI application that serves the unweighted rewards of ``spec``, as in ``build``.

    ``max_bytes`` bounds a request's body. ``max_pixels`` bounds the pixels of all its images, each
    counted once for every reward asked (64 of 1024x1024 for one reward); both are checked before
    decoding. Scoring takes another 15 bytes per pixel. A client has ``timeout`` seconds to send its
    request; its scoring, with the waiting before it, has as many. Each reward has one thread and
    scores one request at a time, in the order of arrival. A scoring that exceeds ``timeout`` cannot
    be interrupted; requests behind it get 503. What has not begun when its client leaves is not
    scored.

    ``app(...).state`` has ``requests``, the tasks that answer /score, and ``stopping``: set it, and
    further ones get 503. A task that is cancelled replies 503.
    """
    from fastapi import FastAPI, HTTPException, Request, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.requests import ClientDisconnect

    if token == "":
        raise ValueError("the token is empty; give one, or None to let everybody in")
    rewards = build(spec).to(device).parts
    for label, reward in rewards.items():
        if reward.per_group or reward.learns:
            why = "learns while training" if reward.learns else "compares the images of a group"
            raise ValueError(f"rewards.{label} {why}, which requests would split: not servable")
    queues = {label: Queue(label, reward, device) for label, reward in rewards.items()}
    api = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None)
    api.state.stopping, api.state.requests = False, set()
    registry, replies = _metrics(queues, api.state.requests)
    memory = Memory()

    def authorise(request: Request) -> None:
        given, wanted = request.headers.get("authorization", ""), f"Bearer {token}"
        if token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise HTTPException(401, "wrong or missing token", {"WWW-Authenticate": "Bearer"})

    def stops() -> HTTPException:
        headers = {"Connection": "close", "Retry-After": "5"}
        return HTTPException(503, "the server stops; ask again", headers)

    async def receive(request: Request) -> bytearray:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise HTTPException(413, f"the body is over {max_bytes} bytes; send fewer images")
        return body

    async def receive_in_time(request: Request) -> bytearray:
        try:
            return await asyncio.wait_for(receive(request), timeout)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {timeout:g} s"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(499, "the client left") from None

    async def scored(body: bytearray) -> dict[str, list[float]]:
        try:
            *inputs, names = await asyncio.to_thread(
                parse, body, list(rewards), max_images, max_pixels
            )
        except ValueError as error:
            raise HTTPException(422, _sendable(str(error))) from error
        del body  # not kept while waiting
        deadline, scores = time.monotonic() + timeout, {}
        for name in names:
            job = queues[name].submit(*inputs)
            try:
                left = deadline - time.monotonic()
                scores[name] = await asyncio.wait_for(asyncio.wrap_future(job), left)
            except asyncio.TimeoutError:
                waiting = job.cancel()
                message = f"reward {name!r} was {'busy' if waiting else 'too slow'}: {timeout:g} s"
                raise HTTPException(503 if waiting else 504, message) from None
            if isinstance(scores[name], str):
                raise HTTPException(500, _sendable(scores[name]))
        return scores

    async def answer(request: Request) -> dict[str, list[float]]:
        work = asyncio.ensure_future(scored(await receive_in_time(request)))
        leaving = asyncio.ensure_future(request.receive())  # after the body comes nothing else
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(499, "the client left")
            return work.result()
        finally:
            work.cancel()
            leaving.cancel()
            del work  # its error holds this frame: a cycle, in which the images would stay

    @api.get("/health")
    async def health(request: Request) -> Any:
        authorise(request)
        return {
            "version": PROTOCOL,
            "max_images": max_images,
            "rewards": {name: {"differentiable": r.differentiable} for name, r in rewards.items()},
            "state": "stopping" if api.state.stopping else "ready",
            "in_flight": len(api.state.requests),
            "waiting": {name: queue.waiting() for name, queue in queues.items()},
        }

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorise(request)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @api.post("/score")
    async def score(request: Request) -> Any:
        status = 500
        api.state.requests.add(task := asyncio.current_task())
        try:
            authorise(request)
            if api.state.stopping:
                raise stops()
            scores = await answer(request)
            status = 200
            return {"scores": scores}
        except HTTPException as error:
            status = error.status_code
            raise
        except asyncio.CancelledError:
            status = 503
            raise stops() from None
        finally:
            api.state.requests.discard(task)
            replies.labels(status).inc()
            memory.release_when_idle(api.state.requests)

    return api


class Queue:
    """The scorings of one reward: by one thread, one at a time, in the order of arrival."""

    def __init__(self, name: str, reward: Reward, device: str):
        self.name, self.reward, self.device = name, reward, device
        self.images, self.seconds = 0, 0.0  # scored so far, and spent on it
        self._jobs: set[Future] = set()
        self._worker = Worker()

    def submit(self, *inputs: Any) -> Future:
        """The scores, or why there are none, of images (n, 3, H, W) uint8, prompts and metadata."""
        box = [inputs]
        job = self._worker.submit(self._score, box)
        self._jobs.add(job)

        def forget(job: Future) -> None:
            box.clear()  # a cancelled job stays behind a slow one, but not its images
            self._jobs.discard(job)

        job.add_done_callback(forget)
        return job

    def waiting(self) -> int:
        return sum(not job.running() for job in tuple(self._jobs))

    def _score(self, box: list[tuple]) -> list[float] | str:
        pixels, prompts, metadata = box.pop()
        start = time.monotonic()
        try:
            with torch.no_grad():
                # CUDA's division by a scalar is not exact
                images = (pixels.float() / 255).to(self.device)
                scores = evaluate(self.reward, images, prompts, metadata, self.name).tolist()
            self.images += len(scores)
            return scores
        except RewardError as error:
            return str(error)  # the error itself would hold the images
        except BaseException as error:  # such as SystemExit, which would end the server
            return f"reward {self.name!r} raised {type(error).__name__}: {error}"
        finally:
            self.seconds += time.monotonic() - start


def _sendable(text: str) -> str:
    """The first thousand characters of a message, without what UTF-8 cannot hold."""
    return text[:1000].encode("utf-8", "backslashreplace").decode()


class Memory:
    """Gives freed memory back to the system; glibc keeps some for every thread."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(library, "malloc_trim", None)  # other C libraries have none

    def release_when_idle(self, requests: set) -> None:
        """After ``IDLE`` seconds in which this was not called again, if there are no requests."""
        if self._timer:
            self._timer.cancel()
        if trim := self._trim:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(IDLE, lambda: requests or trim(0))


def _metrics(queues: dict[str, Queue], requests: set) -> tuple[Any, Any]:
    """The registry of prometheus_client, and the counter of replies in it, by status."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    class Queues:
        def collect(self):
            for kind, name, told, value in (
                (CounterMetricFamily, "images", "Images scored", lambda q: q.images),
                (CounterMetricFamily, "seconds", "Seconds spent scoring", lambda q: q.seconds),
                (GaugeMetricFamily, "waiting", "Scorings not begun", lambda q: q.waiting()),
            ):
                family = kind(f"rewards_{name}", told, labels=["reward"])
                for label, queue in queues.items():
                    family.add_metric([label], value(queue))
                yield family

    registry = CollectorRegistry()
    registry.register(Queues())  # pyright: ignore[reportArgumentType]
    ProcessCollector(registry=registry)  # memory, CPU and open files
    gauge = Gauge("rewards_in_flight", "Requests to /score without a reply", registry=registry)
    gauge.set_function(lambda: len(requests))
    replies = Counter("rewards_replies", "Replies to /score", ["status"], registry=registry)
    return registry, replies
