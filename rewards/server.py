"""A server of rewards, for models that need another machine, process or environment.

GET /health  -> {"version": 1, "max_images": 64, "rewards": {name: {"differentiable": bool}}}
POST /score  {"images": [base64 of an 8-bit RGB PNG, ...], "prompts": [text, ...],
              "metadata": [{...}, ...] or null, "names": [name, ...] or null for all rewards}
             -> {"scores": {name: [number, ...]}}

Both need ``Authorization: Bearer TOKEN`` if the server has a token. An error is {"detail": why}:
401 token, 408 body too slow, 413 body too large, 422 malformed (which image, and why), 500 a reward
failed, 503 not started in time (safe to retry), 504 started but too slow. Bodies are JSON and PNG;
nothing is ever unpickled. There is no TLS and no limit on connections: on an open network put a
proxy in front.
"""

# No `from __future__ import annotations`: FastAPI evaluates its handlers' annotations, whose names
# are local to `app`, so that only serving imports fastapi.
import asyncio
import base64
import hmac
import io
import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import Spec, build
from .base import Reward, RewardError, evaluate
from .http import PROTOCOL

PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


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

    ``max_bytes`` bounds a request's body, and ``max_pixels`` the pixels of all its images (64 of
    1024x1024); both are checked before decoding. Scoring takes another 15 bytes per pixel. A
    client has ``timeout`` seconds to send its request; its scoring, with the waiting before it, has
    as many. Each reward has one thread and scores one request at a time, in the order of arrival.
    A scoring that exceeds ``timeout`` cannot be interrupted; requests behind it get 503.
    """
    from fastapi import FastAPI, HTTPException, Request
    from starlette.requests import ClientDisconnect

    if token == "":
        raise ValueError("the token is empty; give one, or None to let everybody in")
    rewards = build(spec).to(device).parts
    for label, reward in rewards.items():
        if reward.per_group or reward.learns:
            why = "learns while training" if reward.learns else "compares the images of a group"
            raise ValueError(f"rewards.{label} {why}, which requests would split: not servable")
    queues = {label: ThreadPoolExecutor(1) for label in rewards}
    api = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None)

    def authorise(request: Request) -> None:
        given, wanted = request.headers.get("authorization", ""), f"Bearer {token}"
        if token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise HTTPException(401, "wrong or missing token", {"WWW-Authenticate": "Bearer"})

    async def receive(request: Request) -> bytearray:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise HTTPException(413, f"the body is over {max_bytes} bytes; send fewer images")
        return body

    @api.get("/health")
    async def health(request: Request) -> Any:
        authorise(request)
        traits = {name: {"differentiable": r.differentiable} for name, r in rewards.items()}
        return {"version": PROTOCOL, "max_images": max_images, "rewards": traits}

    @api.post("/score")
    async def score(request: Request) -> Any:
        authorise(request)
        try:
            body = await asyncio.wait_for(receive(request), timeout)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {timeout:g} s"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left") from None
        try:
            images, prompts, metadata, names = await asyncio.to_thread(
                parse, body, list(rewards), max_images, max_pixels
            )
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        del body  # not kept while waiting
        deadline, scores = time.monotonic() + timeout, {}
        for name in names:
            inputs = images, prompts, metadata, device
            job = queues[name].submit(_score, name, rewards[name], *inputs)
            try:
                left = deadline - time.monotonic()
                scores[name] = await asyncio.wait_for(asyncio.wrap_future(job), left)
            except RewardError as error:
                raise HTTPException(500, str(error)) from error
            except asyncio.TimeoutError:
                waiting = job.cancel()
                message = f"reward {name!r} was {'busy' if waiting else 'too slow'}: {timeout:g} s"
                raise HTTPException(503 if waiting else 504, message) from None
        return {"scores": scores}

    return api


def _score(
    name: str,
    reward: Reward,
    pixels: Tensor,
    prompts: list[str],
    metadata: list[dict] | None,
    device: str,
) -> list[float]:
    with torch.no_grad():
        images = (pixels.float() / 255).to(device)  # CUDA's division by a scalar is not exact
        return evaluate(reward, images, prompts, metadata, name).tolist()


def parse(
    body: bytes | bytearray, known: list[str], max_images: int, max_pixels: int
) -> tuple[Tensor, list[str], list[dict] | None, list[str]]:
    """Images (n, 3, H, W) uint8, prompts, metadata and reward names of a request to /score.

    Raises ValueError that names whatever is malformed or too large.
    """
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("the body is not a JSON object")
    images, prompts, metadata, names = (
        data.pop(key, None) for key in ("images", "prompts", "metadata", "names")
    )
    if data:
        raise ValueError(
            f"unknown {', '.join(map(repr, data))}; known: images, prompts, metadata, names"
        )
    names = known if names is None else names
    for label, items, kind in (
        ("images", images, str),
        ("prompts", prompts, str),
        ("metadata", [] if metadata is None else metadata, dict),
        ("names", names, str),
    ):
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            noun = "texts" if kind is str else "objects"
            raise ValueError(f"{label} is not a list of {noun}")
    if not 1 <= len(images) <= max_images:
        raise ValueError(f"{len(images)} images; a request holds from 1 to {max_images}")
    for label, items in (("prompts", prompts), ("metadata", metadata)):
        if items is not None and len(items) != len(images):
            raise ValueError(f"{len(items)} {label} for {len(images)} images; give one per image")
    for name in names:
        if name not in known:
            raise ValueError(f"no reward {name!r}; there are: {', '.join(known)}")
    return decode(images, max_pixels), prompts, metadata, names


def _no_constant(text: str):
    raise ValueError(f"{text} is not a JSON number")


def decode(images: list[str], max_pixels: int) -> Tensor:
    """Base64 PNGs of one size as (n, 3, H, W) uint8; reads all headers before any pixels.

    Raises ValueError, naming the image, if it is not base64 of an 8-bit RGB PNG, or if the images
    up to it have more than ``max_pixels``.
    """
    files, sizes = [], []
    for index, text in enumerate(images):
        try:
            files.append(base64.b64decode(text, validate=True))
            sizes.append(_png_size(files[-1]))
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from error
        if sizes[-1] != sizes[0]:
            raise ValueError(f"image {index} is {sizes[-1]} pixels, image 0 {sizes[0]}")
        if (pixels := (index + 1) * sizes[-1][0] * sizes[-1][1]) > max_pixels:
            raise ValueError(f"image {index}: {pixels} pixels with it, the limit is {max_pixels}")
    arrays = []
    for index, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
                # A second header chunk would override the one that was checked.
                if image.mode != "RGB" or image.size != sizes[0]:
                    raise ValueError(f"decodes as {image.mode}, {image.size} pixels")
                arrays.append(np.array(image))
        except Exception as error:  # PIL raises half a dozen kinds for a damaged file
            raise ValueError(f"image {index}: not a PNG that decodes ({error})") from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _png_size(file: bytes) -> tuple[int, int]:
    if not file.startswith(PNG_START) or not file.endswith(PNG_END):
        raise ValueError("not a whole PNG file")
    width, height, depth, color = struct.unpack_from(">IIBB", file, len(PNG_START))
    if (depth, color) != (8, 2):
        raise ValueError(f"not an 8-bit RGB PNG (bit depth {depth}, colour type {color})")
    if not width or not height:
        raise ValueError(f"is {width}x{height}")
    return width, height
