"""Servers of a teacher: ours in a thread or a process, and one that answers as it is told."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from waiting import wait_until

from potstill.wire import Unavailable, request


@contextmanager
def in_a_thread(app, port: int = 0):
    """The URL of an application while it is served."""
    import uvicorn

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def as_a_process(model: str, port: int, *more: str) -> subprocess.Popen:
    """`potstill serve`, once it answers."""
    command = [sys.executable, "-m", "potstill", "serve", model, "--port", str(port), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: answers(f"http://127.0.0.1:{port}"), process)
    return process


def answers(url: str) -> bool:
    try:
        return request(url, "/health", seconds=2).status == 200
    except Unavailable:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def that_answers(states: Callable[[dict[str, Any]], tuple[int, dict[str, str], bytes]]):
    """The URL of a server whose `/pooling` answers with a status, headers and a body, of which a
    header `cut` has only so many bytes sent."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given):
            pass

        def do_GET(self):
            self._send(200, {}, json.dumps({"data": [{"id": "fake"}]}).encode())

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*states(asked))

        def _send(self, status, headers, body):
            headers = dict(headers)
            num_sent = int(headers.pop("cut", len(body)))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:num_sent])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
