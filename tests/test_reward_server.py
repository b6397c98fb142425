"""The reward server under attack and under load, and its client."""

import base64
import contextlib
import gc
import io
import json
import math
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from helpers_http import served, slow, stub
from PIL import Image

from rewards import build, evaluate, http, remote
from rewards.remote import Remote
from rewards.serve import serve
from rewards.server import app

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

AUTH = {"Authorization": "Bearer secret"}
CLIENT = httpx.Client(timeout=20)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.02)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def named(images, prompts, metadata=None):
    """The id in the first pixel, if prompt and metadata have the same one."""
    ids = (images[:, :2, 0, 0] * 255).round() @ torch.tensor([1.0, 256.0])
    told = [int(p) if m["id"] == int(p) else -1 for p, m in zip(prompts, metadata, strict=True)]
    assert ids.tolist() == told
    return ids


def broken(images, prompts):
    raise OSError("the weights are gone")


def picture(number, side=8):
    image = torch.full((3, side, side), 0.5)
    image[:2, 0, 0] = torch.tensor([number % 256, number // 256]) / 255
    return image


def png(width=8, height=8, mode="RGB", kind="PNG"):
    with io.BytesIO() as buffer:
        Image.new(mode, (width, height)).save(buffer, kind)
        return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def text64(data):
    return base64.b64encode(data).decode()


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "secret")


@pytest.fixture(scope="module")
def server():
    limits = {"max_images": 4, "max_bytes": 40_000, "max_pixels": 5_000, "timeout": 2.0}
    spec = {brightness: 1.0, "jpeg": 1.0, named: 1.0, broken: 1.0}
    with served(app(spec, token="secret", **limits)) as (address, _):
        yield address


def post(address, payload):
    content = payload if isinstance(payload, (bytes, str)) else json.dumps(payload)
    return CLIENT.post(f"{address}/score", content=content, headers=AUTH)


def good(n=1, **changes):
    return {"images": [text64(png())] * n, "prompts": ["x"] * n, "names": ["brightness"], **changes}


def test_remote_equals_local_on_8_bit_images(server):
    images = torch.rand(7, 3, 24, 16)
    eight_bit = (images * 255).round() / 255
    local = build({"jpeg": 1.0, brightness: 2.0})
    options = {
        "type": "rewards.remote:Remote",
        "url": server,
        "batch": 3,
        "token_env": "REWARD_KEY",
    }
    away = build(
        {
            "size": {**options, "name": "jpeg"},
            "light": {**options, "name": "brightness", "weight": 2.0},
        }
    )
    expected = local(eight_bit, [""] * 7)
    assert torch.equal(away(images, [""] * 7), expected)
    assert torch.equal(away(eight_bit, [""] * 7, [{}] * 7), expected)
    assert not away.differentiable
    with pytest.raises(ValueError, match=r"rewards\.size is not differentiable.*server"):
        away.require_differentiable()


def test_health_and_score_protocol(server):
    health = httpx.get(f"{server}/health", headers=AUTH).json()
    assert (health["version"], health["max_images"]) == (1, 4)
    assert health["rewards"]["jpeg"] == {"differentiable": False}
    one, every = good(2), good(2, names=None)
    assert post(server, one).json() == {"scores": {"brightness": [0.0, 0.0]}}
    every["metadata"] = [{"id": 0}] * 2
    every["prompts"] = ["0", "0"]
    reply = post(server, every)
    assert reply.status_code == 500  # with all rewards asked, the broken one stops the request
    assert "reward 'broken' raised OSError: the weights are gone" in reply.json()["detail"]
    assert httpx.get(f"{server}/docs", headers=AUTH).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/metrics", "/score"])
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer Secret", "secret", "Bearer sécret"])
def test_wrong_or_missing_token(server, path, given):
    headers = {} if given is None else {"Authorization": given.encode()}
    reply = httpx.request("POST" if path == "/score" else "GET", server + path, headers=headers)
    assert reply.status_code == 401
    assert reply.json() == {"detail": "wrong or missing token"}


BOMB = (
    b"\x89PNG\r\n\x1a\n" + header(50_000, 50_000) + chunk(b"IDAT", zlib.compress(b"")) + png()[-12:]
)
HIDDEN_BOMB = png()[:33] + header(50_000, 50_000) + png()[33:]
ODD = {
    "truncated": (png()[:50], "image 1: not a whole PNG file"),
    "only a header": (png()[:33], "image 1: not a whole PNG file"),
    "cut inside": (png()[:40] + png()[-12:], "image 1: not a PNG that decodes"),
    "JPEG": (png(kind="JPEG"), "image 1: not a whole PNG file"),
    "empty": (b"", "image 1: not a whole PNG file"),
    "alpha": (png(mode="RGBA"), r"image 1: not an 8-bit RGB PNG \(bit depth 8, colour type 6\)"),
    "16 bit": (png(mode="I;16"), "image 1: not an 8-bit RGB PNG"),
    "no pixels": (png()[:8] + header(0, 8) + png()[33:], "image 1: is 0x8"),
    "other size": (png(8, 9), r"image 1 is \(8, 9\) pixels, image 0 \(8, 8\)"),
    "hidden bomb": (HIDDEN_BOMB, r"image 1: not a PNG that decodes .*50000"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_images_are_refused(server, case):
    data, message = ODD[case]
    reply = post(server, good(2, images=[text64(png()), text64(data)]))
    assert reply.status_code == 422
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply.json()["detail"])


REQUESTS = {
    "not JSON": (b"\x80\x04N.", "the body is not JSON"),
    "nested": (b"[" * 5_000, "the body is not JSON"),
    "of many parts": (b"[" * 20_000, "brackets and commas; a request holds up to"),
    "a list": (b"[]", "not a JSON object"),
    "garbage base64": (good(images=["%%%%"]), "image 0: "),
    "a number": (good(images=[3]), "images is not a list of texts"),
    "NaN": (json.dumps(good(metadata=[{"a": math.nan}])), "NaN is not a JSON number"),
    "metadata": (good(metadata=[3]), "metadata is not a list of objects"),
    "prompts": (good(prompts=["a", "b"]), "2 prompts for 1 images"),
    "names": (good(names=["jpeg"] * 5), "5 names; a request holds from 1 to 4, or null"),
    "no names": (good(names=[]), "0 names; a request holds from 1 to 4, or null"),
    "a name twice": (good(names=["jpeg", "jpeg"]), "names has 'jpeg' 2 times; give it once"),
    "unknown reward": (good(names=["other"]), "no reward 'other'; there are: brightness"),
    "unknown key": (good(model="\ud800"), "unknown 'model'"),
    "none": (good(0), "0 images; a request holds from 1 to 4"),
    "too many": (good(5), "5 images; a request holds from 1 to 4"),
    "a bomb": (good(images=[text64(BOMB)]), "image 0: 2500000000 pixels with it, the limit"),
    "pixels in all": (good(2, images=[text64(png(60, 60))] * 2), "image 1: 7200 pixels with it"),
    "pixels by names": (
        good(images=[text64(png(60, 60))], names=["jpeg", "brightness"]),
        "image 0: 7200 pixels with it, the limit is 5000; each counts for 2 rewards",
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_odd_requests_are_refused(server, case):
    payload, message = REQUESTS[case]
    reply = post(server, payload)
    assert reply.status_code == 422
    assert message in reply.json()["detail"]
    assert post(server, good()).status_code == 200  # still serving


def test_oversized_body_is_refused_without_being_kept(server):
    def endless():
        for _ in range(300):
            yield b" " * 100_000

    before = psutil.Process().memory_info().rss
    for body in (b" " * 40_001, endless()):
        reply = httpx.post(f"{server}/score", content=body, headers=AUTH, timeout=20)
        assert reply.status_code == 413
        assert "the body is over 40000 bytes" in reply.json()["detail"]
    assert psutil.Process().memory_info().rss - before < 2e7


def test_slow_client_is_dropped_and_blocks_nobody(server):
    host, port = server.removeprefix("http://").split(":")
    head = f"POST /score HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
    with contextlib.ExitStack() as stack:
        slow_ones = [stack.enter_context(socket.create_connection((host, port))) for _ in range(8)]
        for connection in slow_ones:
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        for _ in range(5):
            for connection in slow_ones:
                connection.sendall(b" ")
            assert post(server, good()).status_code == 200
        for connection in slow_ones:
            connection.settimeout(30)
            reply = connection.makefile("rb").read()  # to the end: the server hangs up
            assert reply.startswith(b"HTTP/1.1 408")
            assert b"did not arrive within 2 s" in reply


def test_a_thousand_requests_from_sixteen_threads(server):
    remote = Remote(server, "named", token_env="REWARD_KEY", batch=2)
    process = psutil.Process()

    def ask(start):
        ids = list(range(start, start + 1 + start % 3))  # up to two requests a call
        images = torch.stack([picture(i) for i in ids])
        values = remote(images, [str(i) for i in ids], [{"id": i} for i in ids])
        return values.tolist() == ids

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(150)))
        gc.collect()
        before, start = process.memory_info().rss, time.monotonic()
        assert all(pool.map(ask, range(150, 750)))
        seconds = time.monotonic() - start
    gc.collect()
    growth = (process.memory_info().rss - before) / 1e6
    print(f"{800 / seconds:.0f} requests/s, {growth:+.1f} MB")
    assert growth < 20


def test_reward_failure_names_the_reward(server):
    remote = Remote(server, "broken", token_env="REWARD_KEY", batch=4)
    with pytest.raises(
        RuntimeError, match=r"status 500.*reward 'broken' raised OSError.*attempts: 1, sec"
    ):
        evaluate(remote, torch.rand(2, 3, 8, 8), ["a", "b"])
    named_remote = Remote(server, "named", token_env="REWARD_KEY", batch=4)
    with pytest.raises(RuntimeError, match="JSON"):  # NaN in the metadata never leaves
        evaluate(named_remote, torch.rand(1, 3, 8, 8), ["a"], [{"x": math.nan}])


def test_scoring_has_a_time_limit():
    def ask(seconds):
        return post(address, good(prompts=[str(seconds)], names=["slow"]))

    with served(app({slow: 1.0}, timeout=0.4)) as (address, _), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, 0.8)
        time.sleep(0.1)
        second = pool.submit(ask, 0.0)  # waits behind the first, and never begins
        assert first.result().status_code == 504
        assert "'slow' was too slow: 0.4 s" in first.result().text
        assert second.result().status_code == 503
        time.sleep(0.5)
        assert ask(0.0).status_code == 200


def test_constructor_refuses_what_cannot_work(server, monkeypatch):
    with pytest.raises(ValueError, match=r"/health: status 401: .*wrong or missing token"):
        Remote(server, "jpeg")
    with pytest.raises(ValueError, match=r"name='clip' is not a reward.*It has: brightness, jpeg"):
        Remote(server, "clip", token_env="REWARD_KEY")
    with pytest.raises(ValueError, match=r"batch=5 is more than .* takes: 4"):
        Remote(server, "jpeg", token_env="REWARD_KEY", batch=5)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(remote, "START_PATIENCE", 0.2)
    for url in ("http://127.0.0.1:9", [server, "http://127.0.0.1:9"]):  # in seconds, not minutes
        with pytest.raises(ValueError, match=r"127.0.0.1:9/health: ConnectError.*seconds: 0"):
            Remote(url, "brightness", token_env="REWARD_KEY", batch=4)
    with (
        stub(lambda *_: (200, [])) as other,
        pytest.raises(ValueError, match="not a reward server"),
    ):
        Remote(other, "jpeg")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for options, message in (
        ({"url": "localhost:8000"}, "not an address"),
        ({"url": "http://a:b:c"}, "not an address"),
        ({"url": "http://me:pw@host"}, "holds a password"),
        ({"timeout": 0}, "timeout=0"),
        ({"patience": -1}, "patience=-1"),
        ({"patience": math.inf}, "patience=inf"),
        ({"url": []}, r"url=\[\] is not an address"),
        ({"url": ["http://localhost:1", "localhost"]}, "url='localhost' is not an address"),
        ({"batch": 0}, "batch=0"),
        ({"token_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"token_env": "s3cret!"}, "name of an environment variable is none"),
    ):
        with pytest.raises(ValueError, match=message):
            Remote.check_options(**{"url": "http://localhost:1", **options})


@pytest.mark.parametrize("values", [[1.0, 2.0], [], ["x"], None, [math.nan]])
def test_wrong_reply_is_an_error(values):
    def answer(path, payload, headers):
        health = {"version": 1, "max_images": 16, "rewards": {"r": {}}}
        return 200, health if path == "/health" else {"scores": {"r": values}}

    with stub(answer) as address, pytest.raises(RuntimeError, match="unexpected reply"):
        Remote(address, "r")(torch.rand(1, 3, 8, 8), ["a"])


def test_command_line(monkeypatch):
    calls = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: calls.append(sockets[0].getsockname())
    )
    monkeypatch.delenv("REWARD_SERVER_TOKEN", raising=False)
    half = 'half={"type": "jpeg", "quality": 50}'
    assert serve(["--port", "0", "--reward", "jpeg", "--reward", half]) == 0
    assert calls[0][0] == "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=rf"--port {port}: Address already in use; choose"):
            serve(["--reward", "jpeg", "--port", port])
    for option, value, message in (
        ("--port", "70000", "is no port"),
        ("--timeout", "0", "no time to wait"),
        ("--timeout", "nan", "no time to wait"),
        ("--grace", "-1", "no time to wait"),
        ("--connections", "0", "serves nobody"),
        ("--device", "cuda:99", "--device cuda:99 cannot be used"),
        ("--device", "gpu", "--device gpu cannot be used"),
    ):
        with pytest.raises(ValueError, match=message):
            serve(["--port", "0", "--reward", "jpeg", option, value])
    with pytest.raises(ValueError, match=r"--host no\.such\.host\.invalid"):
        serve(["--reward", "jpeg", "--host", "no.such.host.invalid", "--token", "x"])
    with pytest.raises(ValueError, match="open to others"):
        serve(["--reward", "jpeg", "--host", "0.0.0.0"])
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "secret")
    assert serve(["--reward", "jpeg", "--host", "0.0.0.0", "--port", "0"]) == 0
    assert calls[1][0] == "0.0.0.0"
    for text, message in (
        ("jpeg={", "not JSON"),
        ("jpeg=3", "wants its options"),
        ("jpg", "did you mean 'jpeg'"),
    ):
        with pytest.raises(ValueError, match=message):
            serve(["--reward", text])
    with pytest.raises(ValueError, match="given twice"):
        serve(["--reward", "jpeg", "--reward", "jpeg"])

    def rival(images, prompts):
        return brightness(images, prompts)

    rival.per_group = True
    with pytest.raises(ValueError, match=r"rewards\.rival compares the images.*not servable"):
        app({rival: 1.0})
    with pytest.raises(ValueError, match="token is empty"):
        app({brightness: 1.0}, token="")
