"""The command line of the reward server. It checks its arguments before slow imports."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import check, from_arguments

TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"


def serve(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM, then finishes what it has; returns the exit status.

    Raises ValueError for a wrong setting.
    """
    parser = argparse.ArgumentParser(
        prog="diffalign serve-rewards", description="Serve rewards over HTTP."
    )
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[=JSON]",
        help='e.g. jpeg, clip=\'{"model": "openai/clip-vit-base-patch32"}\' or module:function; '
        "repeat for more",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every network interface")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--token", default=os.environ.get(TOKEN_VARIABLE),
        help=f"default: ${TOKEN_VARIABLE}, which no list of processes shows",
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the first there is")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to receive, to score")
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds to finish requests when told to stop"
    )
    parser.add_argument(
        "--connections", type=int, default=64, help="at a time; a request beyond them gets 503"
    )
    args = parser.parse_args(arguments)
    args.token = (args.token or "").strip() or None  # as clients send it
    if args.token and not args.token.isascii():
        raise ValueError(f"--token or ${TOKEN_VARIABLE} holds what a header cannot; use ASCII")
    if not args.token and args.host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"--host {args.host} is open to others: set --token or ${TOKEN_VARIABLE}")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port {args.port} is no port; use one from 1 to 65535, or 0 for any")
    if not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout {args.timeout:g} is no time to wait; use seconds above 0")
    if not 0 <= args.grace < math.inf:
        raise ValueError(f"--grace {args.grace:g} is no time to wait; use seconds, 0 or more")
    if args.connections < 1:
        raise ValueError(f"--connections {args.connections} serves nobody; use 1 or more")
    spec = from_arguments(args.reward)
    check(spec)
    try:
        import fastapi  # noqa: F401  (app needs it)
        import prometheus_client  # noqa: F401

        from .connections import Server
    except ModuleNotFoundError as error:
        needed = "pip install fastapi uvicorn prometheus-client"
        raise ValueError(f"{error}; serving needs: {needed}") from error
    with _bound(args.host, args.port) as listener:  # before the rewards are loaded
        from .device import choose_device, default_device
        from .server import app

        choose_device(args.device)
        api = app(spec, args.token, default_device(), timeout=args.timeout)
        server = Server(api, args.host, args.port, most=args.connections, grace=args.grace)
        print(f"serving {', '.join(spec)} at {args.host}:{listener.getsockname()[1]}", flush=True)
        with _stopped_by_signals():
            server.run(sockets=[listener])
    return 0


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ignore the signals that uvicorn sends to the process again when it has stopped for them."""
    before = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, lambda *_: None)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ValueError if it cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: {why}; choose another") from error
    return listener
