"""A Hub on the loopback: serves local folders to `huggingface_hub` and `datasets`, for as long as a `with` block lasts.

Only what the two ask for: a file, and of a dataset also its revision and its list of files.
"""

import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 39 + "1"


@contextlib.contextmanager
def serve(repositories, statuses=None, log=None, breaks=None):
    """Yield the address. repositories: {id: folder}, a dataset's id with "datasets/" before it; statuses: {id: (HTTP
    status, X-Error-Code)} of those that refuse; log: a list that gets (method, path) of every request; breaks: {id:
    bytes} of those where the connection breaks that far into every longer file."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", end=None, **headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:end])

        def do_GET(self):  # /ID/resolve/REVISION/FILE or /api/datasets/ID/(revision|tree|paths-info)/REVISION…
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            if log is not None:
                log.append((self.command, self.path))
            path = unquote(urlsplit(self.path).path).lstrip("/")
            call = next((c for c in ("resolve", "revision", "tree", "paths-info") if f"/{c}/" in path), "resolve")
            name, _, rest = path.removeprefix("api/").partition(f"/{call}/")
            revision, _, file = rest.partition("/")
            if name in (statuses or {}):
                status, code = statuses[name]
                return self.answer(status, X_Error_Code=code)
            if name not in repositories:
                return self.answer(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            root = repositories[name]
            if call != "resolve":
                files = [p for p in sorted((root / file).rglob("*")) if call == "tree"]
                files += [root / p for p in parse_qs(body).get("paths", []) if (root / p).exists()]
                listed = [
                    {
                        "path": p.relative_to(root).as_posix(),
                        "oid": COMMIT,
                        "size": p.stat().st_size,
                        "type": "file" if p.is_file() else "directory",
                    }
                    for p in files
                ]
                listed = listed if call != "revision" else {"id": name, "sha": COMMIT, "siblings": []}
                return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
            path = root / file
            if not path.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = path.read_bytes()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.answer(200, body, (breaks or {}).get(name), ETag=etag, X_Repo_Commit=COMMIT)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silence():
    """Yield (the address of a Hub that listens and never accepts, a function: how many connections wait for it)."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        server.setblocking(False)
        waiting = []

        def count():
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting.append(server.accept()[0])
            return len(waiting)

        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", count
        finally:
            for connection in waiting:
                connection.close()
