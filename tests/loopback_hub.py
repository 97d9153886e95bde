"""A Hugging Face hub on 127.0.0.1 with the routes that snapshot_download uses; it counts what it is asked for."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class LoopbackHub:
    """Context manager. files: repository -> path in it -> content; datasets and models alike. `url` goes into HF_ENDPOINT."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def revision(self, repository: str) -> str:
        """The commit, 40 digits; another one when a file changes."""
        content = b"".join(name.encode() + content for name, content in sorted(self.files[repository].items()))
        return hashlib.sha1(content).hexdigest()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        self.tokens.add(request.headers.get("Authorization"))
        for repository, files in self.files.items():
            commit = self.revision(repository)
            if path.startswith(f"/api/datasets/{repository}/tree/"):
                return self._send(request, json.dumps([self._entry(name, content) for name, content in files.items()]).encode())
            if path.startswith(f"/api/datasets/{repository}"):
                siblings = [{"rfilename": name} for name in files]
                return self._send(request, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())
            start = f"/datasets/{repository}/resolve/{commit}/"
            if path.startswith(start) and path.removeprefix(start) in files:
                content = files[path.removeprefix(start)]
                etag = hashlib.sha1(content).hexdigest()
                return self._send(request, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        request.send_response(404)
        request.send_header("X-Error-Code", "RepoNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return None

    @staticmethod
    def _entry(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)
