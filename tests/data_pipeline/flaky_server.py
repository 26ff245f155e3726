"""A real HTTP server on this machine that fails as it is told to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["drop", "stall", "500", "503", "none"]
STALL_SECONDS = 60.0


@dataclass
class Site:
    """What is served, and how.

    Attributes:
        files: content by name.
        faults: what happens to the next requests for content; when they are used up, all goes well.
        always: what happens to all of them.
        ranges: whether parts of a file can be asked for.
        promised: bytes that a file is said to have more than it has.
        asked: how many requests for content came.
        missed: how many requests came for files that are not there.
        outwaited: how many stalls have ended by themselves, after `STALL_SECONDS`.
    """

    files: dict[str, bytes]
    faults: list[Fault] = field(default_factory=list)
    always: Fault = "none"
    ranges: bool = True
    promised: int = 0
    asked: int = 0
    missed: int = 0
    outwaited: int = 0
    url: str = ""


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` at its `url`."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            content = site.files.get(self.path.lstrip("/"))
            if content is None:
                site.missed += 1
                self.send_error(404)
                return
            fault: Fault = "none"
            if body:
                site.asked += 1
                fault = site.faults.pop(0) if site.faults else site.always
            if fault in ("500", "503"):
                self.send_error(int(fault))
                return
            self._send(content, body, fault)

        def _send(self, content: bytes, body: bool, fault: Fault) -> None:
            size = len(content) + site.promised
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and site.ranges:
                start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
                content = content[start:stop]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
                self.send_header("Content-Length", str(len(content)))
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(size))
            if site.ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(content if fault == "none" else content[: len(content) // 2])
                self.wfile.flush()
                if fault == "stall":
                    site.outwaited += not closing.wait(STALL_SECONDS)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
