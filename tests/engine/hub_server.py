"""A small Hub on loopback: repositories, branches, LFS objects and commits in memory, in the Hub's own protocol.

It answers what huggingface_hub asks when a folder is uploaded (create, info, branch, tree, validate-yaml, preupload,
LFS batch, PUT, verify, commit), refuses tokens that may only read, and can be told to answer with errors or to hang.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITER, READER = "hf_writerTokenNotToBeSeen", "hf_readerTokenNotToBeSeen"


class Hub(ThreadingHTTPServer):
    """The server's state, and what was asked of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        """ORG/NAME -> private, branches (name -> path -> content or oid)."""
        self.objects: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.faults: dict[str, list[int]] = {}
        """Regular expression of `METHOD path` -> status codes to answer the next requests with."""
        self.requests: list[str] = []
        self.stored: list[str] = []
        """Object ids in the order in which whole files arrived."""
        self.commits: list[tuple[str, str, list[str]]] = []
        self.hang_after: int | None = None
        """Objects after which a PUT is read but never answered."""
        self.hanging = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Path -> content of a branch."""
        return {
            path: self.objects[entry["oid"]] if "oid" in entry else entry["content"]
            for path, entry in self.repos[repo]["branches"][branch].items()
        }


def git_hash(content: bytes) -> str:
    """The object id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
        body = self.read()
        for pattern, codes in hub.faults.items():
            if codes and re.search(pattern, f"{self.command} {path}"):
                self.answer(codes.pop(0), {"error": "an injected fault"}, Retry_After="0")
                return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not path.startswith("/lfs/") and token not in (WRITER, READER):
            self.answer(401, {"error": "Invalid username or password."})
            return
        for pattern, method, needs_write, action in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                if needs_write and token == READER:
                    self.answer(403, {"error": "You have read access but not the required permissions"})
                    return
                action(self, body, *found.groups())
                return
        self.answer(404, {"error": "Not found"})

    do_GET = do_POST = do_PUT = do_HEAD = route

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"})
            return
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repos[name] = {"private": private, "branches": {"main": {}}}
        self.answer(200, {"url": f"{self.server.endpoint}/{name}"})

    def branch_of(self, repo: str, revision: str = "main") -> dict[str, Any] | None:
        branch = self.server.repos.get(repo, {}).get("branches", {}).get(revision)
        if branch is None:
            kind = "Revision" if repo in self.server.repos else "Repo"
            self.answer(404, {"error": f"{kind} not found"}, X_Error_Code=f"{kind}NotFound")
        return branch

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        if self.branch_of(repo, revision or "main") is not None:
            private = self.server.repos[repo]["private"]
            self.answer(200, {"id": repo, "private": private, "sha": "0" * 40, "tags": [], "siblings": []})

    def branch(self, _: bytes, repo: str, name: str) -> None:
        branches = self.server.repos[repo]["branches"]
        if name in branches:
            self.answer(409, {"error": "Reference already exists"})
            return
        branches[name] = dict(branches["main"])
        self.answer(200)

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        if (branch := self.branch_of(repo, revision)) is not None:
            self.answer(200, [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in branch])

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (branch := self.branch_of(repo, revision)) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith((".safetensors", ".model", ".png"))
            entry = branch.get(file["path"])
            oid = None if entry is None else entry.get("oid") or git_hash(entry["content"])
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, body: bytes, _repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            where = f"{self.server.endpoint}/lfs"
            actions = {"upload": {"href": f"{where}/{entry['oid']}"}, "verify": {"href": f"{where}/verify"}}
            known = entry["oid"] in self.server.objects
            objects.append(entry if known else {**entry, "actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        hub = self.server
        with hub.lock:
            if hub.hang_after is not None and len(hub.stored) >= hub.hang_after:
                hub.hanging.set()
                self.close_connection = True
                threading.Event().wait(0.2)
                return
            if hashlib.sha256(body).hexdigest() != oid:
                self.answer(400, {"error": "checksum"})
                return
            hub.objects[oid] = body
            hub.stored.append(oid)
        self.answer(200)

    def verify(self, body: bytes) -> None:
        self.answer(200 if json.loads(body)["oid"] in self.server.objects else 404)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (branch := self.branch_of(repo, revision)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = {"content": base64.b64decode(value["content"])}
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.server.objects
                branch[value["path"]] = {"oid": value["oid"]}
            elif line["key"] == "deletedFile":
                del branch[value["path"]]
        changed = [line["value"]["path"] for line in lines if line["key"] != "header"]
        self.server.commits.append((repo, revision, sorted(changed)))
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def valid(self, body: bytes) -> None:
        self.answer(200 if json.loads(body)["content"].startswith("---\n") else 400, {"errors": [], "warnings": []})


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    (r"/api/repos/create", "POST", True, Handler.create),
    (rf"/api/models/{REPO}", "GET", False, Handler.info),
    (rf"/api/models/{REPO}/revision/([^/]+)", "GET", False, Handler.info),
    (rf"/api/models/{REPO}/branch/([^/]+)", "POST", True, Handler.branch),
    (rf"/api/models/{REPO}/tree/([^/]+)", "GET", False, Handler.tree),
    (rf"/api/models/{REPO}/preupload/([^/]+)", "POST", True, Handler.preupload),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "POST", True, Handler.batch),
    (r"/lfs/verify", "POST", False, Handler.verify),
    (r"/lfs/([0-9a-f]{64})", "PUT", False, Handler.put),
    (rf"/api/models/{REPO}/commit/([^/]+)", "POST", True, Handler.commit),
    (r"/api/validate-yaml", "POST", False, Handler.valid),
]
