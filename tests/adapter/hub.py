"""A stand-in for the Hub: the part of its HTTP API that a push and a download go through, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each {file: bytes}."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.repositories = token, dict[str, dict[str, bytes]]()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(token: str = "hf_standin") -> Iterator[Hub]:
    hub = Hub(token)
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, {})
            return self._answer({"url": f"{self.server.endpoint}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        parts = self.path.split("/")
        name = "/".join(parts[3:5])
        files = self.server.repositories[name]
        if parts[5] == "preupload":
            kinds = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": kinds})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer({"commitUrl": f"{self.server.endpoint}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.repositories:
                return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if parts[4:5] == ["tree"]:
                held = self.server.repositories[name].items()
                return self._answer([{"type": "file", "path": f, "size": len(d), "oid": SHA} for f, d in held])
            files = [{"rfilename": file} for file in self.server.repositories[name]]
            return self._answer(
                {"id": name, "sha": SHA, "siblings": files, "private": False, "tags": [], "downloads": 0}
            )
        files = self.server.repositories.get("/".join(parts[:2]), {})
        data = files.get("/".join(parts[4:]))
        if data is None:
            return self._answer(b"", 404, X_Error_Code="EntryNotFound")
        self._answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET
