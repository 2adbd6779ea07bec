"""A loopback model hub for tests of uploads: it takes repositories and files the way huggingface_hub sends them."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Received:
    """What the hub was sent.

    Attributes:
        endpoint: Its address.
        created: Bodies of the requests for repositories.
        files: Contents by repository and path.
        large: Those that came apart from the commit, as Git LFS files.
        tokens: What the requests were authorised by.
        messages: Summaries of the commits.
    """

    endpoint: str = ""
    created: list[dict] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: Received

    def do_POST(self) -> None:
        """Repositories, and the three steps of a commit."""
        body, got = self._body(), self.received
        got.tokens.add(self.headers.get("Authorization"))
        if "forbidden" in self.path or b"forbidden" in body:
            self._send(403, {"error": "you may not write here"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            got.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self._send(200, {"url": f"{got.endpoint}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._send(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**thing, "actions": {"upload": {"href": f"{got.endpoint}/blob/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
            url = f"{got.endpoint}/{match[1]}/commit/{COMMIT}"
            self._send(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._send(404, {"error": f"the mirror does not know {self.path}"})

    def do_PUT(self) -> None:
        """The content of a large file."""
        self.received.blobs[self.path.removeprefix("/blob/")] = self._body()
        self._send(200, {})

    def _commit(self, repository: str, lines: list[dict]) -> None:
        files = self.received.files.setdefault(repository, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.received.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.received.blobs[value["oid"]]
                self.received.large.add(value["path"])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def hub_upload() -> Iterator[Received]:
    """Serve on loopback; what was received is complete when the block ends."""
    received = Received()
    handler = type("_Handler", (_Handler,), {"received": received})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        received.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
