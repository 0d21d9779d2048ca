"""A Hub on loopback: as much of its protocol as downloads and uploads need."""

import base64
import contextlib
import hashlib
import json
import pathlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers model info, the file tree, HEAD and GET (with Range), and uploads."""

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
        private = self.server.created.get(repo, False)
        if private and not self.has_token():
            return self.refuse(401, "RepoNotFound")
        if is_api and rest[:1] == ["xet-write-token"]:  # Xet is not spoken here
            return self.refuse(403, "Forbidden")
        if repo not in self.server.repos:
            return self.refuse(404, "RepoNotFound")
        folder = self.server.repos[repo]
        if is_api and len(rest) > 2:  # the tree of a folder inside: there is none
            return self.refuse(404, "EntryNotFound")
        if is_api and len(rest) == 2 and rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if is_api:
            return self.send_json(describe(repo, folder, rest, private))
        # /owner/name/resolve/revision/file
        if len(rest) < 3 or rest[0] != "resolve":
            return self.refuse(404, "EntryNotFound")
        if rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        return self.send_file(file, body)

    def do_POST(self):
        path, sent = self.receive()
        if path == "api/validate-yaml":  # of a model's card: no token needed
            return self.send_json({})
        if not self.has_token():
            return self.refuse(401, "Unauthorized")
        if path == "api/repos/create":
            return self.create(json.loads(sent))
        # api/models/owner/name/preupload/main, the same with commit, or
        # owner/name.git/info/lfs/objects/batch
        owner, name, action, *_ = path.removeprefix("api/models/").split("/")
        repo = f"{owner}/{name.removesuffix('.git')}"
        if refusal := self.server.refusals.get(repo):
            return self.refuse(*refusal)
        if repo in self.server.repos and repo not in self.server.created:
            return self.refuse(403, "Forbidden")  # a test's own folder
        if repo not in self.server.created:
            return self.refuse(404, "RepoNotFound")
        if action == "commit":
            return self.commit(repo, [json.loads(line) for line in sent.splitlines()])
        given = json.loads(sent)
        if action == "preupload":
            return self.send_json({"files": [mode(file) for file in given["files"]]})
        return self.send_json({"objects": [self.ask(big) for big in given["objects"]]})

    def do_PUT(self):
        """A large file: its address came from `ask`, and no token comes with it."""
        path, sent = self.receive()
        if path not in self.server.large:
            return self.refuse(403, "Forbidden")
        if path != f"lfs/{hashlib.sha256(sent).hexdigest()}":
            return self.refuse(400, "BadDigest")
        self.server.large[path] = sent
        return self.send_json({})

    def receive(self):
        path = urlsplit(self.path).path.strip("/")
        self.server.seen.append((self.command, path, None))
        return path, self.rfile.read(int(self.headers["Content-Length"]))

    def has_token(self):
        return self.headers.get("Authorization", "").startswith("Bearer ")

    def create(self, given):
        repo = f"{given['organization'] or 'me'}/{given['name']}"
        if refusal := self.server.refusals.get(repo):
            return self.refuse(*refusal)
        answer = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repos or repo in self.server.created:
            return self.send_json(answer, 409)
        if self.server.uploads is None:
            return self.refuse(403, "Forbidden")
        self.server.created[repo] = given.get("visibility") == "private"
        return self.send_json(answer)

    def ask(self, file):
        """Where to PUT a large file, all at once."""
        path = f"lfs/{file['oid']}"
        self.server.large[path] = None
        return {**file, "actions": {"upload": {"href": f"{self.server.url}/{path}"}}}

    def commit(self, repo, lines):
        folder = self.server.uploads / repo
        for line in lines:
            value = line["value"]
            if line["key"] == "header":  # the message
                continue
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
            else:  # lfsFile: deletions are not spoken here
                data = self.server.large[f"lfs/{value['oid']}"]
            file = folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        self.server.repos[repo] = folder
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        return self.send_json({"commitUrl": url, "commitOid": COMMIT})

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, answer, status=200):
        data = json.dumps(answer).encode()
        self.send_response(status)
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


def mode(file):
    """How to upload a file: weights as large ones (LFS), the rest in the commit."""
    large = file["path"].endswith(".safetensors")
    way = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": way, "shouldIgnore": False}


def describe(repo, folder, rest, private):
    """The API's answer about a model: its files, or its commit and files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    if rest[:1] == ["tree"]:
        return [
            {
                "type": "file",
                "path": name,
                "size": file.stat().st_size,
                "oid": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file, name in zip(files, names, strict=True)
        ]
    return {
        "id": repo,
        "modelId": repo,
        "sha": COMMIT,
        "private": private,
        "gated": False,
        "siblings": [{"rfilename": name} for name in names],
    }


@contextlib.contextmanager
def serve(repos, refusals=None, cuts=None, uploads=None):
    """Serve `repos` ({"owner/name": folder}) and yield the server, with `.url`.

    refusals: {"owner/name": (status, X-Error-Code)}. cuts: {file name: byte at which
    the first GET of it is cut off}. `.seen` lists each request: (method, path, Range).

    uploads: the folder where new repositories come to lie, as owner/name; left out,
    none can be made (403), and those of `repos` are never written to. `.created` holds
    {"owner/name": whether private}; a commit adds them to `.repos`. The client needs
    HF_HUB_DISABLE_XET=1: with hf_xet installed it takes Xet, whatever a server says.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repos = {name: pathlib.Path(folder) for name, folder in repos.items()}
    server.refusals, server.cuts, server.seen = refusals or {}, cuts or {}, []
    server.uploads = uploads and pathlib.Path(uploads)
    server.created = {}
    server.large = {}  # path of the PUT: what came, None before
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
