"""A Hub on loopback: as much of the protocol as huggingface_hub needs to download."""

import contextlib
import hashlib
import json
import pathlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers model info, the file tree, and HEAD and GET (with Range) of a file."""

    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds; an idle connection ends by itself

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = urlsplit(self.path).path.strip("/")
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if refusal := self.server.refusals.get(repo):
            return self.refuse(*refusal)
        if repo not in self.server.repos:
            return self.refuse(404, "RepoNotFound")
        folder = self.server.repos[repo]
        if is_api and len(rest) > 2:  # the tree of a folder inside: there is none
            return self.refuse(404, "EntryNotFound")
        if is_api:
            return self.send_json(describe(repo, folder, rest))
        # /owner/name/resolve/revision/file
        if len(rest) < 3 or rest[0] != "resolve":
            return self.refuse(404, "EntryNotFound")
        if rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        return self.send_file(file, body)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, file, body):
        data = file.read_bytes()
        start = 0
        if asked := self.headers.get("Range"):  # bytes=START- or bytes=START-END
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        if asked:
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send_header("Content-Range", span)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        cut = self.server.cuts.pop(file.name, None)
        if cut is None:
            self.wfile.write(data[start:])
        else:  # fewer bytes than Content-Length says, then the connection ends
            self.wfile.write(data[start:cut])
            self.close_connection = True


def describe(repo, folder, rest):
    """The API's answer about a model: its files, or its commit and files."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if rest[:1] == ["tree"]:
        return [
            {
                "type": "file",
                "path": file.name,
                "size": file.stat().st_size,
                "oid": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]
    return {
        "id": repo,
        "modelId": repo,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "siblings": [{"rfilename": file.name} for file in files],
    }


@contextlib.contextmanager
def serve(repos, refusals=None, cuts=None):
    """Serve `repos` ({"owner/name": folder}) and yield the server, with `.url`.

    refusals: {"owner/name": (status, X-Error-Code)}. cuts: {file name: byte at which
    the first GET of it is cut off}. `.seen` lists each request: (method, path, Range).
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repos = {name: pathlib.Path(folder) for name, folder in repos.items()}
    server.refusals, server.cuts, server.seen = refusals or {}, cuts or {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
