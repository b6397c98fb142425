"""The client of reward servers that are away: patience, several servers, threads."""

import itertools
import logging
import random
import threading
import time

import pytest
import torch
from helpers_http import served, stub, until

from rewards import http
from rewards.http import Http, in_threads
from rewards.remote import Remote

httpx = pytest.importorskip("httpx")
HEALTH = {"version": 1, "max_images": 16, "rewards": {"r": {"differentiable": False}}}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.2)


def app(*rewards):
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from rewards.server import app

    return app(dict.fromkeys(rewards, 1.0))


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def pictures(n):
    """n of different brightness."""
    return (torch.arange(n) / 255)[:, None, None, None].expand(-1, 3, 8, 8)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_until_it_answers(status, caplog):
    asked = itertools.count()

    def answer(path, payload, headers):
        if path == "/health":
            return 200, HEALTH
        if next(asked) < 4:
            return status, {"detail": "come back"}
        return 200, {"scores": {"r": [1.0] * len(payload["images"])}}

    state = random.getstate()
    with stub(answer) as address:
        remote = Remote(address, "r", patience=20.0)
        assert remote(torch.rand(3, 3, 8, 8), ["a"] * 3).tolist() == [1.0] * 3
    assert next(asked) == 5
    assert random.getstate() == state  # a retry moves no generator of the run
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1  # then every half minute
    assert f"{address}/score: status {status}: " in said[0]
    assert said[0].endswith('come back"}; trying again, 0 of 20 s have passed')


def test_patience_ends(monkeypatch, caplog):
    def jump():
        return next(clock)  # seconds that pass say nothing; the system's clock may be set

    clock = itertools.count(0.0, 1e6)
    monkeypatch.setattr(time, "time", jump)
    monkeypatch.setattr(http, "LOG_EVERY", 0.25)
    start = time.monotonic()
    with stub(lambda *_: (503, {"detail": "come back"})) as address:
        client = Http(address, None, timeout=5.0, patience=1.0)
        message = rf"{address}/score: status 503: .*come back.*attempts: (\d+), seconds: 1"
        with pytest.raises(RuntimeError, match=message):
            client.ask("/score", {})
        assert 0.9 < time.monotonic() - start < 5
        assert 3 <= len(caplog.records) <= 5
        client.patience = 0.0
        with pytest.raises(RuntimeError, match="attempts: 1, seconds: "):
            client.ask("/score", {})


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_what_will_not_pass_is_not_tried_again(status):
    asked = []
    with stub(lambda *a: asked.append(a) or (status, {})) as address:
        with pytest.raises(RuntimeError, match=rf"status {status}: .*attempts: 1, seconds: 0"):
            Http([address] * 2, None, timeout=5.0, patience=60.0).ask("/score", {})
        assert len(asked) == 1


def test_requests_that_fail_together_are_one_failure(monkeypatch):
    """Else a moment's failure of eight threads would be waited for as for eight in a row."""
    monkeypatch.setattr(http, "LONGEST_WAIT", 60.0)
    client, first = (
        Http("http://127.0.0.1:9", None, timeout=5.0, patience=0.0),
        threading.Barrier(8),
    )

    def once(*_):
        first.wait(10)
        raise http.Unavailable("away")

    monkeypatch.setattr(client, "_once", once)

    def ask(_):
        with pytest.raises(RuntimeError, match="away"):
            client.ask("/score")

    in_threads(ask, range(8), 8)
    assert client.addresses[0].failures < 8


def test_a_server_that_stops_and_comes_back():
    with served(app(brightness)) as (address, _):
        remote = Remote(address, "brightness", patience=30.0)
        assert remote(pictures(2), ["a"] * 2).tolist() == brightness(pictures(2), []).tolist()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(remote(pictures(3), ["a"] * 3)))
    waiting.start()
    time.sleep(0.3)
    assert not answers
    with served(app(brightness), port=int(address.rsplit(":", 1)[1])):
        waiting.join(20)
    assert torch.equal(answers[0], brightness(pictures(3), []))
    remote.http.patience = 0.3
    with pytest.raises(RuntimeError, match=r"127.0.0.1.*/score: \w+Error.*attempts: [2-9]"):
        remote(pictures(1), ["a"])


def test_several_servers_share_the_images():
    both, seen = threading.Barrier(2), [[], []]

    def one(server):
        def shared(images, prompts):
            both.wait(10)  # goes on when both servers score
            seen[server] += prompts
            return images.mean((1, 2, 3))

        return shared

    with served(app(one(0))) as (first, _), served(app(one(1))) as (second, _):
        remote = Remote([first, second + "/"], "shared", batch=2)
        prompts = [str(i) for i in range(8)]
        assert torch.equal(remote(pictures(8), prompts), brightness(pictures(8), prompts))
    assert len(seen[0]) == len(seen[1]) == 4
    assert sorted(seen[0] + seen[1]) == prompts


def test_a_server_of_several_that_is_away(monkeypatch, caplog):
    monkeypatch.setattr(http, "FIRST_WAIT", 5.0)
    monkeypatch.setattr(http, "LONGEST_WAIT", 5.0)
    with served(app(brightness)) as (first, _):
        with served(app(brightness)) as (second, _):
            remote = Remote([first, second], "brightness", batch=1, patience=0.0)
            assert torch.equal(remote(pictures(8), ["a"] * 8), brightness(pictures(8), []))
        start = time.monotonic()
        for _ in range(3):
            assert torch.equal(remote(pictures(8), ["a"] * 8), brightness(pictures(8), []))
        assert time.monotonic() - start < 2  # none of it is waiting for the other to come back
        (record,) = caplog.records
        assert record.message.startswith(f"{second}/score: ConnectError")
        assert "others are asked meanwhile" in record.message
        assert remote.http.addresses[1].failures == 1  # left alone, not asked with every chunk
        assert [address.busy for address in remote.http.addresses] == [0, 0]
    with pytest.raises(RuntimeError, match=r"/score: ConnectError.*attempts: \d"):
        remote(pictures(1), ["a"])


def test_every_address_is_asked_before_it_ends(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)  # so that none rests
    with stub(lambda *_: (200, "here")) as address:
        client = Http(["http://127.0.0.1:9", address], None, timeout=5.0, patience=0.0)
        assert client.ask("/score", {}) == "here"


def test_a_hanging_thread_holds_back_no_error():
    hang, begun, daemons = threading.Event(), [], []

    def call(item):
        begun.append(item)
        daemons.append(threading.current_thread().daemon)
        if item == 0:
            hang.wait(30)
        elif item == 1:
            until(lambda: len(begun) > 1)
            raise OSError("no answer")

    start = time.monotonic()
    with pytest.raises(OSError, match="no answer"):
        in_threads(call, range(50), 2)
    assert time.monotonic() - start < 10
    assert daemons == [True, True]  # they end with the process
    hang.set()
    time.sleep(0.1)
    assert begun in ([0, 1], [1, 0])
    assert in_threads(lambda i: time.sleep(random.random() / 50) or i, range(40), 8) == [*range(40)]
    assert in_threads(str, [], 3) == []
