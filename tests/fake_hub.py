"""A server in this process that speaks the part of the Hub's API that the store uses.

Repos live in memory; `failures` holds answers to give before the real one, by what is asked for.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's own


@dataclass
class FakeHub:
    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    # "commit", "reply" (after the commit) or "look" -> what to answer instead, one a request.
    failures: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def set_files(self, repo: str, files: dict[str, bytes]) -> None:
        self.repos[repo] = files
        listing = json.dumps([repo, sorted((k, git_hash(v)) for k, v in files.items())])
        self.heads[repo] = hashlib.sha1(listing.encode()).hexdigest()  # noqa: S324 - as git's

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str | None:
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, self.heads[repo]):
            return None
        files = dict(self.repos[repo])
        for line in lines[1:]:
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.set_files(repo, files)
        self.commits.append({"repo": repo, "summary": head["summary"], "files": sorted(files)})
        return self.heads[repo]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fails(self, what: str) -> bool:
        if queue := self.hub.failures.get(what):
            status, headers = queue.pop(0)
            if status == 412:  # somebody else has committed: the old parent won't do any more
                for repo, files in self.hub.repos.items():
                    self.hub.set_files(repo, {**files, "README.md": b"by hand"})
            self.answer(status, {"error": f"made to fail with {status}"}, headers)
            return True
        return False

    def missing(self, code: str) -> None:
        self.answer(404, {"error": "not found"}, {"X-Error-Code": code})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((path, self.headers.get("Authorization", "")))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            self.preupload("/".join(parts[2:4]), json.loads(body)["files"])
        elif parts[4] == "commit" and not self.fails("commit"):
            lines = [json.loads(line) for line in body.splitlines()]
            if (oid := self.hub.commit("/".join(parts[2:4]), lines)) is None:
                self.answer(412, {"error": "the branch has moved"})
            elif not self.fails("reply"):
                self.answer(200, {"commitUrl": f"{self.hub.url}/c/{oid}", "commitOid": oid})

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/datasets/{repo}"}
        if repo in self.hub.repos:
            self.answer(409, {"error": "exists", **url})
        else:
            self.hub.set_files(repo, {".gitattributes": b""})
            self.hub.visibility[repo] = asked["visibility"]
            self.answer(200, url)

    def preupload(self, repo: str, files: list[dict[str, Any]]) -> None:
        here = self.hub.repos[repo]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": git_hash(here[f["path"]]) if f["path"] in here else None,
            }
            for f in files
        ]
        self.answer(200, {"files": modes})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((path, self.headers.get("Authorization", "")))
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[1:3])
        if api and self.fails("look"):
            return
        if repo not in self.hub.repos:
            self.missing("RepoNotFound")
        elif api and len(parts) > 4 and parts[4] == "tree":
            self.answer(200, [self.entry(k, v) for k, v in self.hub.repos[repo].items()])
        elif api:
            siblings = [
                {"rfilename": name, "blobId": git_hash(content)}
                for name, content in self.hub.repos[repo].items()
            ]
            self.answer(200, {"id": repo, "sha": self.hub.heads[repo], "siblings": siblings})
        elif (name := "/".join(parts[5:])) in self.hub.repos[repo]:
            content = self.hub.repos[repo][name]
            headers = {"X-Repo-Commit": self.hub.heads[repo], "ETag": f'"{git_hash(content)}"'}
            self.answer(200, content, headers)
        else:
            self.missing("EntryNotFound")

    do_HEAD = do_GET

    @staticmethod
    def entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
