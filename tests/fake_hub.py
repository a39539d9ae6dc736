"""A Hugging Face hub on this machine, for what `push_to_hub` and `from_pretrained` ask of the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Holds the files of every repository in memory: ``files[repo][path]``."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}  # large files by their SHA-256, until a commit names them
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: object = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content-Length", str(len(body))))
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what: str) -> None:
        self._answer({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound")

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization") or "me", request["name"])))
            known = name in self.server.files
            self.server.files.setdefault(name, {})
            self._answer(
                {"url": f"{self.server.url}/{name}", "id": name, "name": name}, 409 if known else 200
            )
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files, "commitOid": COMMIT})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": entry["oid"],
                    "size": entry["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/upload/{entry['oid']}", "header": {}}},
                }
                for entry in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[repo][value["path"]] = self.server.uploads[value["oid"]]
            self._answer(
                {
                    "commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        else:
            self._answer({})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.uploads[hashlib.sha256(body).hexdigest()] = body
        self._answer()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if repo not in self.server.files:
                return self._missing("Repo")
            siblings = [{"rfilename": name} for name in self.server.files[repo]]
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in self.server.files[repo].items()
                ]
                return self._answer(entries)
            return self._answer({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        files = self.server.files.get(repo)
        if files is None:
            return self._missing("Repo")
        data = files.get(rest.partition("/")[2])
        if data is None:
            return self._missing("Entry")
        self._answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()
