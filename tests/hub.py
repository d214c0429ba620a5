"""A Hub on the loopback: serves local model folders to `huggingface_hub`, for as long as a `with` block lasts."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"


@contextlib.contextmanager
def serve(repositories, statuses=None, log=None):
    """Yield the address. repositories: {id: folder}; statuses: {id: (HTTP status, X-Error-Code)} of those that refuse;
    log: a list that gets (method, path) of every request."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):  # /ID/resolve/REVISION/FILE
            if log is not None:
                log.append((self.command, self.path))
            name, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            if name in (statuses or {}):
                status, code = statuses[name]
                return self.answer(status, X_Error_Code=code)
            if name not in repositories:
                return self.answer(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            path = repositories[name] / file
            if not path.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = path.read_bytes()
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
