"""A small server on loopback that speaks the Hugging Face hub's protocol, to upload to and to download from."""

import hashlib
import json
import re
import socket
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

TOKEN, READER = "hf_writes", "hf_reads"  # the second may not write


@dataclass
class Repository:
    private: bool
    branches: dict = field(default_factory=lambda: {"main": {}})  # {file: content} by branch
    commits: list = field(default_factory=list)  # (branch, message)

    def sha(self, branch):
        """The name of a branch's state."""
        parts = [name.encode() + hashlib.sha1(content).digest() for name, content in sorted(self.branches[branch].items())]
        return hashlib.sha1(b"".join(parts)).hexdigest()

    def files(self, revision):
        """The files of a branch, or of the state of one."""
        return self.branches.get(revision) or next((self.branches[b] for b in self.branches if self.sha(b) == revision), {})


class Hub(ThreadingHTTPServer):
    """`repositories` by name, data sets as "datasets/NAME"; `answers` has (status, headers) for paths that begin so.

    GET ends after `cut` bytes; `dropped` uploads end half-way; before a file
    `wait` seconds go by.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.answers, self.cut, self.seen, self.blobs = {}, {}, 0, [], {}
        self.dropped, self.wait = 0, 0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Connections that are cut on purpose are no errors."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status=200, value=None, headers=(), content=None):
        content = json.dumps({} if value is None else value).encode() if content is None else content
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refused(self, path):
        """Whether an answer was asked for of this path, or a token is missing; then it is given."""
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        for start, (status, headers) in self.server.answers.items():
            if path.startswith(start):
                self.reply(status, {"error": f"status {status}"}, headers)
                return True
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        writes = self.command in ("POST", "PUT") and not path.startswith("/upload/")
        if path.startswith("/api/whoami") and token not in (TOKEN, READER) or writes and token not in (TOKEN, READER):
            self.reply(401, {"error": "Invalid credentials"})
            return True
        if writes and token == READER:
            self.reply(403, {"error": "You have read access only"})
            return True
        return False

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if self.refused(path):
            return
        if path.startswith("/api/whoami"):
            return self.reply(value={"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if about := re.fullmatch(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?", path):
            kind, name, what, revision, folder = about.groups()
            if not (repository := self.server.repositories.get((kind or "") + name)):
                return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            files = repository.files(revision or "main")
            if what == "tree":
                return self.list_folder(files, folder)
            known = {"id": name, "modelId": name, "sha": repository.sha("main"), "private": repository.private, "tags": []}
            return self.reply(value=known | {"siblings": [{"rfilename": file} for file in files]})
        if "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            repository = self.server.repositories.get(name)
            content = repository and repository.files(revision).get(file)
            if content is None:
                code = "EntryNotFound" if repository else "RepoNotFound"
                return self.reply(404, {"error": "not found"}, {"X-Error-Code": code})
            return self.send_file(content, repository.sha(revision) if revision in repository.branches else revision)
        self.reply(200)  # the address itself

    def list_folder(self, files, folder):
        """What lies in a folder of a repository, or with `recursive` below it."""
        start, deep = f"{folder}/" if folder else "", "recursive=true" in self.path.lower()
        found = {}
        for file, content in files.items():
            head, more, _ = file.removeprefix(start).partition("/")
            if file.startswith(start) and more and not deep:
                found[start + head] = {"type": "directory", "path": start + head, "oid": "0" * 40, "size": 0}
            elif file.startswith(start):
                found[file] = {"type": "file", "path": file, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        if not found:
            return self.reply(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        return self.reply(value=[*found.values()])

    def send_file(self, content, commit):
        """A file or, as asked for, its rest; cut off after `cut` bytes."""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        part = content[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            Event().wait(self.server.wait)  # not time.sleep, which tests take from the client
        if self.command == "GET" and self.server.cut and len(part) > self.server.cut:
            self.send_response(206 if start else 200)
            for key, text in {"Content-Length": str(len(part)), **headers}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(part[: self.server.cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        return self.reply(206 if start else 200, content=part, headers={"Content-Type": "application/octet-stream", **headers})

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.read()
        if self.refused(path):
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.server.repositories:
                return self.reply(409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"})
            self.server.repositories[name] = Repository(bool(asked.get("private") or asked.get("visibility") == "private"))
            return self.reply(value={"url": f"{self.server.address}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return self.reply(value={"warnings": [], "errors": []})
        if path.endswith("/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/upload/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self.reply(value={"transfer": "basic", "objects": found})
        name, _, rest = path.removeprefix("/api/models/").rpartition("/")
        name, _, what = name.rpartition("/")
        repository = self.server.repositories[name]
        if what == "branch":
            repository.branches.setdefault(rest, dict(repository.branches["main"]))
            return self.reply()
        if what == "preupload":
            kinds = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": one["path"],
                    "uploadMode": kinds[one["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return self.reply(value={"files": files})
        assert what == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.branches[rest][value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.branches[rest][value["path"]] = self.server.blobs[value["oid"]]
        repository.commits.append((rest, lines[0]["value"]["summary"]))
        return self.reply(value={"commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def do_PUT(self):
        if self.server.dropped:
            self.server.dropped -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.read()
        if not self.refused(urlsplit(self.path).path):
            self.server.blobs[hashlib.sha256(body).hexdigest()] = body
            self.reply()


@contextmanager
def serving():
    """The server, while it runs."""
    hub = Hub()
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
