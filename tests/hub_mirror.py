"""A loopback model hub for tests: local folders served the way huggingface_hub asks for repositories."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_FILE_URL = re.compile(r"/(?P<kind>datasets/)?(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API_URL = re.compile(
    r"/api/(?P<kind>models/|datasets/)(?P<name>.+?)"
    r"(?:/(?P<action>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


class _NotFoundError(Exception):
    """A 404 answer: the hub's error code, a message and, where the repository exists, its commit."""


@dataclass(frozen=True)
class _Repository:
    """One served folder, as it was when the mirror started."""

    name: str
    root: Path
    entries: dict[str, dict[str, Any]]  # path -> entry of the hub's tree listing, folders included
    commit: str

    @classmethod
    def read(cls, name: str, root: Path) -> _Repository:
        """List a folder and hash its files; the commit id depends on the paths and contents only."""
        if not root.is_dir():
            raise NotADirectoryError(f"the mirror cannot serve {name}: {root} is not a folder")
        entries: dict[str, dict[str, Any]] = {}
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            path = file.relative_to(root)
            for folder in map(Path.as_posix, list(path.parents)[:-1]):
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            oid = hashlib.sha1(file.read_bytes()).hexdigest()
            entries[path.as_posix()] = {
                "type": "file",
                "oid": oid,
                "size": file.stat().st_size,
                "path": path.as_posix(),
            }
        return cls(name, root, entries, hashlib.sha1(json.dumps(entries, sort_keys=True).encode()).hexdigest())

    def entry(self, path: str, kind: str) -> dict[str, Any]:
        """The entry of a path, which has to be a file or a directory as `kind` says."""
        entry = self.entries.get(path)
        if entry is None or entry["type"] != kind:
            raise _NotFoundError("EntryNotFound", f"{path} does not exist in {self.name}", self.commit)
        return entry

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The entries below a folder ("" is the root)."""
        prefix = f"{self.entry(folder, 'directory')['path']}/" if folder else ""
        below = [entry for path, entry in self.entries.items() if path.startswith(prefix)]
        return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]

    def info(self, sizes: bool) -> dict[str, Any]:
        """What `HfApi.model_info` and `HfApi.dataset_info` read; file sizes only on request, as on the hub."""
        siblings = [
            {"rfilename": path, **({"size": entry["size"], "blobId": entry["oid"]} if sizes else {})}
            for path, entry in self.entries.items()
            if entry["type"] == "file"
        ]
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        identity = {"id": self.name, "sha": self.commit, "lastModified": "2024-01-01T00:00:00.000Z"}
        return {**identity, **flags, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    """Answers the part of the hub's HTTP interface that downloads use."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1  # headers and small bodies leave in one packet
    repositories: Mapping[tuple[str, str], _Repository]
    log: list[str] | None

    def do_GET(self) -> None:
        """Answer GET and HEAD."""
        url = urlsplit(self.path)
        try:
            if match := _FILE_URL.fullmatch(url.path):
                self._send_file(self._repository(match), unquote(match["path"]))
            elif match := _API_URL.fullmatch(url.path):
                repository, query = self._repository(match), parse_qs(url.query)
                if match["action"] == "tree":
                    answer: Any = repository.tree(unquote(match["path"] or ""), query.get("recursive") == ["true"])
                else:
                    answer = repository.info(sizes="blobs" in query)
                self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
            else:
                raise _NotFoundError("NotFound", f"the mirror does not know {url.path}")
        except _NotFoundError as error:
            headers = dict(zip(("X-Error-Code", "X-Error-Message", "X-Repo-Commit"), error.args, strict=False))
            self._send(404, headers, json.dumps({"error": error.args[1]}).encode())

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the log lines for the test instead of printing them."""
        if self.log is not None:
            self.log.append(format % args)

    def _repository(self, match: re.Match[str]) -> _Repository:
        kind, name, revision = match["kind"] or "models/", unquote(match["name"]), unquote(match["revision"] or "main")
        repository = self.repositories.get((kind, name))
        if repository is None:
            raise _NotFoundError("RepoNotFound", f"there is no {name} under {kind}")
        if revision not in ("main", repository.commit):
            raise _NotFoundError("RevisionNotFound", f"{name} has no revision {revision}")
        return repository

    def _send_file(self, repository: _Repository, path: str) -> None:
        entry = repository.entry(path, "file")
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        status, content = 200, (repository.root / path).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and int(asked[1]) < len(content):
            start, stop = int(asked[1]), min(len(content), int(asked[2] or len(content)) + 1)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self._send(status, headers, content)

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub_mirror(
    repositories: Mapping[str, Path], datasets: Mapping[str, Path] = {}, log: list[str] | None = None
) -> Iterator[str]:
    """Serve local folders as hub repositories on loopback; yields the endpoint URL.

    The folders are listed once, at the start. Each request adds a line to `log`, such as
    `"GET /org/name/resolve/main/config.json HTTP/1.1" 200 -`.
    """
    served = {("models/", name): _Repository.read(name, root) for name, root in repositories.items()}
    served |= {("datasets/", name): _Repository.read(name, root) for name, root in datasets.items()}
    handler = type("_Handler", (_Handler,), {"repositories": served, "log": log})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def mirror_environment(endpoint: str, cache: Path) -> dict[str, str]:
    """The environment of a subprocess whose hub is the mirror and whose hub caches all lie under `cache`."""
    # Variables that would win over ours: offline switches, cache folders, tokens.
    dropped = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    for key in ("NO_PROXY", "no_proxy"):
        environment[key] = ",".join(filter(None, [environment.get(key), "127.0.0.1"]))
    return environment | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # for a .bin checkpoint transformers would call a public site
    }
