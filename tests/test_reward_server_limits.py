"""What the reward server drops, closes, gives back and counts, and how it stops."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from helpers_http import served, slow, until

from rewards import server
from rewards.http import png_base64
from rewards.server import app

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")


class Gated:
    """A reward that waits for its gate, and keeps the prompts that it has begun."""

    def __init__(self):
        self.begun, self.gate = [], threading.Event()

        def gated(images, prompts):
            self.begun.extend(prompts)
            self.gate.wait(20)
            return images.mean((1, 2, 3))

        self.reward = gated


def body(prompt, n=1, height=8, width=8):
    images = png_base64(torch.zeros(n, 3, height, width))
    return json.dumps({"images": images, "prompts": [prompt] * n})


def post(address, *content, **options):
    return httpx.post(f"{address}/score", content=body(*content), timeout=30, **options)


def health(address):
    return httpx.get(f"{address}/health", timeout=30).json()


def connected(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def raw(address, content):
    """A connection on which the whole request was sent."""
    connection = connected(address)
    head = f"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall((head + content).encode())
    return connection


def measured(address):
    lines = httpx.get(f"{address}/metrics", timeout=30).text.splitlines()
    return {k: float(v) for k, v in (s.rsplit(" ", 1) for s in lines if not s.startswith("#"))}


def test_waiting_work_whose_client_left_is_dropped():
    gated = Gated()
    with served(app({gated.reward: 1.0})) as (address, _), ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, address, "first")
        until(lambda: gated.begun)
        leaving = raw(address, body("gone"))
        until(lambda: health(address)["waiting"] == {"gated": 1})
        last = pool.submit(post, address, "last")
        until(lambda: health(address)["waiting"] == {"gated": 2})
        leaving.close()
        until(lambda: health(address)["waiting"] == {"gated": 1})
        assert health(address)["in_flight"] == 2
        gated.gate.set()
        assert (first.result().status_code, last.result().status_code) == (200, 200)
        assert gated.begun == ["first", "last"]
        assert measured(address)['rewards_replies_total{status="499"}'] == 1


def test_a_client_that_leaves_while_its_request_is_read_is_not_scored(monkeypatch):
    gated, reading, read = Gated(), threading.Event(), server.parse

    def parse(*inputs):
        reading.set()
        gated.gate.wait(20)
        return read(*inputs)

    monkeypatch.setattr(server, "parse", parse)
    with served(app({gated.reward: 1.0})) as (address, _):
        leaving = raw(address, body("gone"))
        assert reading.wait(20)
        leaving.close()
        until(lambda: health(address)["in_flight"] == 0)
        gated.gate.set()
        assert post(address, "last").status_code == 200
        assert gated.begun == ["last"]


def closed_after(connection, trickle=b"", seconds=10):
    """What came before the server hung up; a byte is sent every tenth second if there are any."""
    connection.settimeout(0.1)
    end, came = time.monotonic() + seconds, b""
    while time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            if not (data := connection.recv(4096)):
                return came
            came += data
            continue
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(trickle)
    raise AssertionError(f"still open after {seconds} s, with {came!r}")


def test_connections_without_a_request_are_closed():
    request = b"GET /health HTTP/1.1\r\nHost: here\r\n"
    with served(app({slow: 1.0}, token="secret"), headers=0.3) as (address, _):
        with connected(address) as idle:
            assert closed_after(idle) == b""
        with connected(address) as half:
            half.sendall(request)
            assert closed_after(half) == b""
        with connected(address) as dripping:
            dripping.sendall(request + b"X: ")
            assert closed_after(dripping, b"x") == b""
        with connected(address) as again:  # a second request, on a connection in use
            again.sendall(request + b"\r\n" + request)
            assert closed_after(again, b"X").startswith(b"HTTP/1.1 401")
        with connected(address) as refused:  # before its body
            refused.sendall(b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: 900\r\n\r\n")
            assert closed_after(refused, b" ").startswith(b"HTTP/1.1 401")
        headers = {"Authorization": "Bearer secret"}
        assert post(address, "0.8", headers=headers).status_code == 200  # an answer may take longer


def test_connections_are_limited():
    with served(app({slow: 1.0}), most=2) as (address, _):
        with connected(address), connected(address):
            reply = post(address, "0")
            assert reply.status_code == 503  # which our client tries again
            assert reply.headers["connection"] == "close"
        until(lambda: httpx.get(f"{address}/health").status_code == 200)
        with connected(address):
            assert post(address, "0").status_code == 200


def test_metrics_and_health():
    gated = Gated()
    with served(app({gated.reward: 1.0})) as (address, _), ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(post, address, "a", n) for n in (2, 3)]
        until(lambda: health(address)["waiting"] == {"gated": 1})
        assert (health(address)["state"], health(address)["in_flight"]) == ("ready", 2)
        now = measured(address)
        assert now["rewards_in_flight"] == 2
        assert now['rewards_waiting{reward="gated"}'] == 1
        assert now['rewards_images_total{reward="gated"}'] == 0
        gated.gate.set()
        assert [reply.result().status_code for reply in replies] == [200, 200]
        assert httpx.post(f"{address}/score", content=b"no").status_code == 422
        now = measured(address)
        assert now["rewards_in_flight"] == now['rewards_waiting{reward="gated"}'] == 0
        assert now['rewards_images_total{reward="gated"}'] == 5
        assert 0 < now['rewards_seconds_total{reward="gated"}'] < 60
        assert now['rewards_replies_total{status="200"}'] == 2
        assert now['rewards_replies_total{status="422"}'] == 1


def test_no_reply_keeps_images():
    """Neither errors, whose tracebacks hold what was called, nor cancelled work behind a slow one.
    The collector is off: it may not look at old objects for hours."""

    def kept():
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return [o.dtype for o in found if o.shape[1:] == (3, 73, 61)]

    def broken(images, prompts):
        raise OSError("the weights are gone")

    gated = Gated()
    gc.collect()
    gc.disable()
    try:
        for reward, status in ((gated.reward, 504), (broken, 500)):
            with served(app({reward: 1.0}, timeout=0.5)) as (address, _):
                with ThreadPoolExecutor(3) as pool:
                    first = pool.submit(post, address, "a", 1, 73, 61)
                    until(lambda: gated.begun)
                    others = [pool.submit(post, address, "b", 1, 73, 61) for _ in range(2)]
                    assert first.result().status_code == status
                    expected = 500 if status == 500 else 503
                    assert {other.result().status_code for other in others} == {expected}
                if status == 504:
                    assert kept().count(torch.uint8) == 1  # what is being scored
                    gated.gate.set()
                until(lambda: not kept())
    finally:
        gc.enable()


@contextlib.contextmanager
def process(*options):
    """(address, process) of a server as one starts it, of a reward that takes its time."""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", "from rewards.serve import serve; raise SystemExit(serve())"]
    command += ["--reward", "helpers_http:slow", "--port", "0", "--device", "cpu", *options]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        try:
            assert child.stdout
            yield "http://" + child.stdout.readline().split(" at ")[1].strip(), child
        finally:
            child.kill()


def test_memory_goes_back_and_a_signal_ends_it_when_it_is_done():
    def used():
        return psutil.Process(child.pid).memory_info().rss / 1e6

    with process() as (address, child), ThreadPoolExecutor(4) as pool:
        noise = png_base64(torch.rand(3, 3, 1024, 1024))
        large = json.dumps({"images": noise, "prompts": ["0"] * 3})  # 110 MB when it is scored
        before = used()
        ask = partial(httpx.post, f"{address}/score", content=large, timeout=60)
        replies = list(pool.map(lambda _: ask(), range(30)))
        assert {reply.status_code for reply in replies} == {200}
        print(f"{before:.0f} MB, then {used():.0f} MB")
        until(lambda: used() < before + 80)  # it stays at 300 more without Memory

        with connected(address) as idle:
            last = pool.submit(post, address, "1.5")
            until(lambda: health(address)["in_flight"] == 1)
            child.send_signal(signal.SIGTERM)
            until(lambda: health(address)["state"] == "stopping")
            reply = post(address, "0")
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert "the server stops" in reply.text
            assert last.result().status_code == 200
            assert child.wait(20) == 0
            assert idle.recv(100) == b""


def test_a_hanging_reward_does_not_keep_the_server():
    with process("--grace", "0.5") as (address, child), ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(post, address, "100")
        until(lambda: health(address)["in_flight"] == 1)
        time.sleep(0.2)
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        reply = hanging.result()
        assert (reply.status_code, "the server stops" in reply.text) == (503, True)
        assert child.wait(30) == 0
        assert 0.4 < time.monotonic() - start < 12  # threads.GRACE is 5 s
