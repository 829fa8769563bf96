"""A web server on this machine, of files that can be missing, forbidden, moved, slow, cut or changed."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """`files` by their paths. `faults`: for a path a status, "silent", "cut" or "/where it was moved", and how often.

    -1 is always. `asked` is what was asked for: (method, path, whether for all of it).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, {}, []
        self.logins = []  # with which it was asked
        self.delay = 0.0  # seconds before it answers
        self.now = self.busy = 0  # what is asked for at this moment, and the most so far

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):
        """Clients that have gone."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.now += 1
        self.server.busy = max(self.server.busy, self.server.now)
        time.sleep(self.server.delay)
        try:
            self.give(self.server, unquote(self.path))
        finally:
            self.server.now -= 1

    def give(self, server, path):
        server.logins.append(self.headers.get("Authorization"))
        server.asked.append((self.command, path, "Range" not in self.headers))
        fault, often = server.faults.get(path, (0, 0))
        if often:
            server.faults[path] = fault, often - 1
            if fault == "silent":
                time.sleep(3)
            if isinstance(fault, int):
                return self.answer(fault, b"")
            if str(fault).startswith("/"):
                return self.answer(302, b"", {"Location": fault})
        content = server.files.get(path)
        if content is None:
            return self.answer(404, b"")
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        etag = {"ETag": f'"{hash(content) & 0xFFFFFF:x}"'}
        self.answer(206 if "Range" in self.headers else 200, part, etag, cut=fault == "cut" and often != 0)

    def answer(self, status, content, headers=None, cut=False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


@contextmanager
def serving():
    """A running FileServer."""
    server = FileServer()
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
