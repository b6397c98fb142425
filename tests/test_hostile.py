"""What an attack on the server and on checkpoints found."""

import asyncio
import errno
import hashlib
import time
from unittest.mock import Mock

import httpx
import pytest
import torch
import uvicorn
from conftest import load
from safetensors import SafetensorError
from uvicorn.protocols.http.flow_control import FlowControl

from diffalign.record import checkpoint
from rewards.base import FunctionReward
from rewards.connections import PromptHeaders
from rewards.http import Http
from rewards.parsing import parse
from rewards.server import Queue, _sendable


def state(epoch):
    return {"epoch": epoch, "adapter": {"a": torch.full((2,), float(epoch))}}


def test_a_reward_that_exits_does_not_end_the_server():
    def leaves(images, prompts):
        raise SystemExit(3)

    queue = Queue("leaves", FunctionReward(leaves), "cpu")
    said = queue.submit(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["a"], None).result(10)
    assert said == "reward 'leaves' raised SystemExit: 3"


def test_messages_are_short_and_can_be_sent():
    assert len(_sendable("x" * 10**7)) == 1000
    assert _sendable("a\ud800").encode() == b"a\\ud800"


@pytest.mark.parametrize("unit", ["[]", "{}", "1"])
def test_bodies_of_many_parts_are_refused_before_they_are_read(unit):
    body = ('{"images":[' + ",".join([unit] * 300_000) + "]}").encode()
    with pytest.raises(ValueError, match="brackets and commas; a request holds up to 74000"):
        parse(body, ["jpeg"], 64, 10**6)


def test_a_reply_that_cannot_be_unpacked_names_the_address():
    def reply(request):
        return httpx.Response(200, headers={"content-encoding": "gzip"}, content=b"no gzip")

    http = Http("http://judge.test", None, 1.0, 0.0)
    http.client = httpx.Client(transport=httpx.MockTransport(reply))
    with pytest.raises(RuntimeError, match=r"http://judge\.test.*DecodingError"):
        http.ask("/score", {})


def test_a_reply_that_drips_is_given_up_in_time():
    class Drip(httpx.SyncByteStream):
        def __iter__(self):
            for _ in range(50):
                time.sleep(0.05)
                yield b" "

    http = Http("http://judge.test", None, 0.3, 0.0)
    http.client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(200, stream=Drip()))
    )
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"judge\.test.*took longer than 0\.3 s"):
        http.ask("/score", {})
    assert time.monotonic() - start < 2


def test_a_client_that_reads_nothing_is_disconnected():
    done = []

    class Transport:
        def abort(self):
            done.append(True)

    async def unread(resumes):
        config = uvicorn.Config(lambda *_: None)
        config.load()
        protocol = PromptHeaders(config, uvicorn.server.ServerState(), {})
        protocol.seconds, protocol.transport = 0.05, Transport()
        protocol.flow = FlowControl(Mock())
        protocol.pause_writing()
        if resumes:
            protocol.resume_writing()
        await asyncio.sleep(0.15)

    asyncio.run(unread(True))
    assert not done
    asyncio.run(unread(False))
    assert done


def test_going_back_removes_links_and_what_a_run_wrote_alone(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for epoch in (1, 2, 3):
        checkpoint.save(run, state(epoch), keep=5)
    (run / "checkpoint-3").rename(elsewhere)
    (run / "checkpoint-3").symlink_to(elsewhere)
    (run / "checkpoint-2" / "mine.txt").write_text("notes")
    checkpoint.drop(run, after=1)
    assert not (run / "checkpoint-3").is_symlink()
    assert elsewhere.exists()
    assert [p.name for p in (run / "checkpoint-2").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_content_that_is_wrong_with_matching_sums_is_damage(tmp_path, name):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, state(epoch), keep=5)
    folder = tmp_path / "checkpoint-2"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines)
    assert name in sums
    (folder / name).write_bytes(b"{")
    sums[name] = hashlib.sha256(b"{").hexdigest()
    (folder / "SHA256SUMS").write_text("".join(f"{v}  {k}\n" for k, v in sums.items()))
    said = []
    assert checkpoint.load(tmp_path, said.append)["epoch"] == 1
    assert "checkpoint-2 is damaged: its content is not what a run writes" in said[0]


def test_a_disk_that_fills_while_weights_are_exported_is_the_disks_error(
    pipelines, tmp_path, monkeypatch
):
    policy = load(pipelines["sd-v"])
    policy.add_lora(2)

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(policy.pipe, "save_lora_weights", full)
    with pytest.raises(OSError, match="No space") as caught:
        policy.save(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
