"""An HTTP endpoint that gives prepared replies, with the standard library only."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

Answer = Any
"""JSON to send; or (status, JSON or text); or a function of the handler and the request."""


class Listener(ThreadingTCPServer):
    """Not HTTPServer, which asks the name service for this machine's name, and may wait for it."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64


class FakeServer:
    """Gives the answers of a script in order, the last one for ever, and keeps the requests."""

    def __init__(self, *script: Answer, port: int = 0) -> None:
        self.script = list(script)
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.running = self.most = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                size = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(size) or b"null")
                request = {
                    "path": self.path,
                    "headers": {k.lower(): v for k, v in self.headers.items()},
                    "body": body,
                }
                with fake.lock:
                    fake.requests.append(request)
                    fake.running += 1
                    fake.most = max(fake.most, fake.running)
                    answer = fake.script[0] if len(fake.script) == 1 else fake.script.pop(0)
                try:
                    fake.give(self, answer, request)
                finally:
                    with fake.lock:
                        fake.running -= 1

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = Listener(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def give(self, handler: BaseHTTPRequestHandler, answer: Answer, request: dict) -> None:
        if callable(answer):
            answer = answer(handler, request)
            if answer is None:
                return
        status, value = answer if isinstance(answer, tuple) else (200, answer)
        text = value if isinstance(value, str) else json.dumps(value)
        send(handler, text, status)

    def __enter__(self) -> FakeServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def send(handler: BaseHTTPRequestHandler, text: str, status: int = 200, **headers: str) -> None:
    data = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def truncated(text: str) -> Callable[[BaseHTTPRequestHandler, dict], None]:
    """Announces more than it sends, then hangs up."""

    def answer(handler: BaseHTTPRequestHandler, _: dict) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(text) + 100))
        handler.end_headers()
        handler.wfile.write(text.encode())
        handler.close_connection = True

    return answer


def slow(seconds: float, value: Any) -> Callable[[BaseHTTPRequestHandler, dict], Any]:
    """Answers late."""

    def answer(_: BaseHTTPRequestHandler, __: dict) -> Any:
        time.sleep(seconds)
        return value

    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
