"""``gcrm serve``: rewards and Q-values over HTTP; see server.py for what it answers, batcher.py for how it computes."""

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Options
from gcrm_fast.inference.scoring import RewardModel

TOKEN_VARIABLE = "GCRM_TOKEN"
CONNECTIONS = 4096  # open at a time; more are answered 503


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Serves rewards and Q-values over HTTP: POST /get_reward as OpenRLHF asks, POST /score, GET /health."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Reward model: a folder or a hub name."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only programs on this machine can connect."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the first line tells."""
    token_file: str = ""
    """File with the token that requests must bear (Authorization: Bearer TOKEN); without it the environment variable
    GCRM_TOKEN is that token, if set."""
    tokens_per_batch: int = 16384
    """Tokens that are computed at a time, and most of one completion with its prompt."""
    delay: float = 0.003
    """Seconds that a request which finds the model idle waits for others to share its batch."""
    queue: int = 4096
    """Most completions that wait; beyond them requests are answered 429."""
    max_body: int = 16 * 2**20
    """Most bytes of a request; longer ones are answered 413."""
    timeout: float = 60.0
    """Seconds for a request's body to come (else 408), and then for its answer (else 504); and for the requests at hand
    to be answered when the server is told to end."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the trunk computes in; auto: bfloat16 on a GPU, else float32."""


def check(options: ServeOptions) -> None:
    """Raises UserError, naming the flag, for a value that makes no sense."""
    for name, least in (("tokens_per_batch", 1), ("delay", 0), ("queue", 1), ("max_body", 1), ("timeout", 0.001)):
        value = getattr(options, name)
        if not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}, and finite")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port}: must be below 65536")
    for module in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install 'gcrm-fast[serve]'")


def read_token(options: ServeOptions) -> str:
    """The bearer token, "" for none. Never from the command line, which other users of the machine can read."""
    source = options.token_file or f"environment variable {TOKEN_VARIABLE}"
    if options.token_file:
        token = Path(options.token_file).read_text(encoding="utf-8", errors="replace").strip()
    elif TOKEN_VARIABLE in os.environ:
        token = os.environ[TOKEN_VARIABLE].strip()
    else:
        return ""
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise UserError(f"{source}: must hold one token of visible ASCII characters")
    return token


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening: until the model is loaded, connections are refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    return found


def is_open(host: str) -> bool:
    """Whether other machines can connect."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def serve(options: ServeOptions) -> None:
    """Loads the model and serves until SIGTERM or SIGINT; requests at hand are then answered first."""
    check(options)
    token = read_token(options)
    if is_open(options.host) and not token:
        print(
            f"gcrm serve: warning: {options.host} can be reached from other machines, and no token is asked for: "
            f"set {TOKEN_VARIABLE} or --token-file",
            file=sys.stderr,
            flush=True,
        )
    with bind(options.host, options.port) as listener:
        import uvicorn  # an extra; check() has seen that it is there

        from gcrm_fast.inference.batcher import Batcher
        from gcrm_fast.inference.server import create_app

        model = RewardModel.from_pretrained(
            options.model, dtype=options.dtype, tokens_per_batch=options.tokens_per_batch
        )
        batcher = Batcher(model, delay=options.delay, limit=options.queue)
        app = create_app(batcher, token=token, max_body=options.max_body, timeout=options.timeout)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            ws="none",
            lifespan="on",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(options.timeout) + 1,
        )
        host, port = listener.getsockname()[:2]
        goals = ", ".join(model.goals) or "none"
        print(f"gcrm serve: http://{f'[{host}]' if ':' in host else host}:{port}, goals: {goals}", flush=True)
        # uvicorn raises the signal that ended it once more, which would make the exit look like a crash.
        program = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(program, "should_exit", True))
        program.run(sockets=[listener])
