"""A real HTTP server of a folder, on loopback, that fails in the ways that servers fail."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.helpers.waiting import PATIENCE


@dataclass
class Faulty:
    """How requests for one file go wrong: the first ``times`` of them, or all with -1."""

    how: str
    times: int = -1


@dataclass
class ShardServer:
    """What was asked for, as (method, file, Range header), and what is to go wrong."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)  # files of which the last byte was sent
    faults: dict[str, Faulty] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    slow: float = 0.0  # seconds before every answer
    hold: threading.Event | None = None  # before every answer, what is waited for

    def gets(self) -> dict[str, int]:
        """GET requests by file."""
        found: dict[str, int] = {}
        for method, name, _ in self.requests:
            if method == "GET":
                found[name] = found.get(name, 0) + 1
        return found

    def fault(self, name: str) -> str:
        with self.lock:
            faulty = self.faults.get(name)
            if faulty is None or faulty.times == 0:
                return ""
            faulty.times -= 1
            return faulty.how


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    """Serve a folder below /data/."""
    state = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            with state.lock:
                state.requests.append(("POST", self.path, None))
            self.close_connection = True
            self.refuse(404)

        def answer(self, body: bool) -> None:
            name = urlsplit(self.path).path.removeprefix("/data/")
            with state.lock:
                state.requests.append((self.command, name, self.headers.get("Range")))
            time.sleep(state.slow)
            if state.hold is not None:
                state.hold.wait(PATIENCE)
            how = state.fault(name)
            path = state.folder / name
            if how.isdecimal():
                self.refuse(int(how))
            elif how == "drop":
                self.close_connection = True
            elif not path.is_file():
                self.refuse(404)
            else:
                self.deliver(name, path.read_bytes(), how, body)

        def refuse(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def deliver(self, name: str, content: bytes, how: str, body: bool) -> None:
            if how == "wrong":
                content = content[:1000] + b"?" + content[1001:]
            if how == "long":
                content += b"more"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) if body or how != "unknown" else 0))
            self.end_headers()
            if not body:
                return
            if how in ("cut", "stall"):
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if how == "stall":
                    state.stop.wait(60)
                self.close_connection = True
                return
            self.wfile.write(content)
            with state.lock:
                state.sent.append(name)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that goes away in the middle is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/data"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stop.set()
        server.shutdown()
        server.server_close()
