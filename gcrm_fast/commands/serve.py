"""``gcrm serve``: rewards and Q-values over HTTP; inference/server.py answers, inference/batcher.py computes."""

import functools
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

from gcrm_fast.commands.options import ServeOptions
from gcrm_fast.commands.shared import load
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.rlhf.hybrid import scored
from gcrm_fast.rlhf.verifiers import Verifiers, parse_verifiers

TOKEN_VARIABLE = "GCRM_TOKEN"


def read_token(options: ServeOptions) -> str:
    """The bearer token, "" for none. Never from the command line, which other users of the machine can read."""
    if options.token_file:
        source, token = options.token_file, Path(options.token_file).read_text(encoding="utf-8", errors="replace")
    elif TOKEN_VARIABLE in os.environ:
        source, token = f"environment variable {TOKEN_VARIABLE}", os.environ[TOKEN_VARIABLE]
    else:
        return ""
    token = token.strip()
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise UserError(f"{source}: must hold one token of visible ASCII characters")
    return token


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until the model is loaded, connections are refused."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    return listener


def is_open(host: str) -> bool:
    """Whether other machines can connect."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def serve(options: ServeOptions) -> None:
    """Loads the model and serves until SIGTERM or SIGINT, then answers the pending requests and returns."""
    token, verifiers = read_token(options), Verifiers(parse_verifiers(options.verifier))
    if is_open(options.host) and not token:
        warning = f"{options.host} can be reached from other machines, and no token is required"
        remedy = f"set {TOKEN_VARIABLE} or --token-file"
        print(f"gcrm serve: warning: {warning}: {remedy}", file=sys.stderr, flush=True)
    ready = Path(options.ready_file) if options.ready_file else None
    with bind(options.host, options.port) as listener:
        # Their libraries are in an extra; check() has made sure of them.
        from gcrm_fast.inference.batcher import Batcher
        from gcrm_fast.inference.connections import Server, connection_limit, limit_logs
        from gcrm_fast.inference.server import create_app
        from gcrm_fast.inference.sessions import Sessions

        limit = connection_limit()
        limit_logs()
        if ready:
            ready.unlink(missing_ok=True)  # of a server that was killed
        scorer = load(options)
        batcher = Batcher(scorer, delay=options.delay, limit=options.queue)
        sessions = Sessions(scorer, limit=options.streams, tokens=options.stream_tokens, idle=options.stream_idle)
        app = create_app(
            batcher,
            sessions,
            name=options.model,
            token=token,
            max_body=options.max_body,
            timeout=options.timeout,
            hybrid=functools.partial(scored, verifiers=verifiers, judge=None),
        )

        def announce() -> None:
            host, port = listener.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            if ready:
                with written_aside(ready) as partial:
                    partial.write_text(f"{address}\n")
            print(f"gcrm serve: {address}, goals: {', '.join(scorer.goals) or 'none'}", flush=True)
            for note in scorer.q_notes:
                print(note, flush=True)

        server = Server(app, timeout=options.timeout, limit=limit, on_ready=announce)
        # uvicorn raises the signal again when it ends; by default that would look like a crash.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        try:
            server.run(sockets=[listener])
        finally:
            if ready:
                ready.unlink(missing_ok=True)
