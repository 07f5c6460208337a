"""A hub of one model on this machine, as far as `huggingface_hub` asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["COMMIT", "FakeHub", "fake_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/some-model"
LARGE = ".safetensors"


class FakeHub:
    """What it serves, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.fetched: list[str] = []
        self.damaged: set[str] = set()  # served with other bytes than it says
        self.broken_off: dict[str, int] = {}  # served up to so many bytes, once
        self.url = ""

    def listing(self) -> dict[str, Any]:
        """Of the repository at its commit."""
        siblings = []
        for name, content in self.files.items():
            sibling: dict[str, Any] = {
                "rfilename": name,
                "size": len(content),
                "blobId": git_hash(content),
            }
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "private": False}

    def etag(self, name: str) -> str:
        """Of a file: what the hub names its content by."""
        content = self.files[name]
        large = name.endswith(LARGE)
        return hashlib.sha256(content).hexdigest() if large else git_hash(content)


def git_hash(content: bytes) -> str:
    """As `git hash-object`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Serve the files of `folder`."""
    hub = FakeHub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, *, with_content: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{REPO}"):
                self._send(200, json.dumps(hub.listing()).encode(), {}, with_content)
            elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
                self._file(path.rpartition("/")[2], with_content)
            else:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_content)

        def _file(self, name: str, with_content: bool) -> None:
            content = hub.files[name]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etag(name)}"'}
            if with_content:
                hub.fetched.append(name)
                if name in hub.damaged:
                    content = bytes(len(content))
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            status = 206 if begin else 200
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            limit = hub.broken_off.pop(name, -1) if with_content else -1
            self._send(status, content[begin:], headers, with_content, limit)

        def _send(
            self,
            status: int,
            content: bytes,
            headers: dict[str, str],
            with_content: bool,
            limit: int = -1,
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_content:
                self.wfile.write(content if limit < 0 else content[:limit])
            if limit >= 0:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
