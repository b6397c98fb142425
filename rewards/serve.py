"""The command line of the reward server. Nothing is imported before its arguments are right."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from . import check, from_arguments

TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"


def serve(arguments: Sequence[str] | None = None) -> int:
    """Serves until interrupted; returns the exit status. Raises ValueError for a setting that is
    wrong."""
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
    args = parser.parse_args(arguments)
    if not args.token and args.host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"--host {args.host} is open to others: set --token or ${TOKEN_VARIABLE}")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port {args.port} is no port; use one from 1 to 65535, or 0 for any")
    spec = from_arguments(args.reward)
    check(spec)
    try:
        import fastapi  # noqa: F401  (app needs it)
        import uvicorn
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; serving needs: pip install fastapi uvicorn") from error
    from .device import choose_device, default_device
    from .server import app

    choose_device(args.device)
    uvicorn.run(
        app(spec, args.token, default_device(), timeout=args.timeout),
        host=args.host, port=args.port, access_log=False,
    )  # fmt: skip
    return 0
