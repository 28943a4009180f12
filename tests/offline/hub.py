"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as its client needs to make a repository, to
upload to it and to download from it, in plain storage (Git LFS, without Xet).
"""

import base64
import hashlib
import json
import os
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class Hub:
    """Repositories by name, each a list of commits, which are files' contents by path; tags: commits by repository and
    tag; private: those that are; requests: paths that were asked for; sent: bytes of files by path; ranges: whether a
    part of a file can be asked for.
    """

    def __init__(self):
        self.repos, self.tags, self.private, self.blobs, self.requests = {}, {}, set(), {}, []
        self.sent, self.ranges, self.url = {}, True, ""

    def commit(self, repo, files):
        """Add files to a repository and return the commit's name."""
        commits = self.repos.setdefault(repo, [])
        commits.append({**(commits[-1] if commits else {}), **files})
        return self.sha(repo, len(commits) - 1)

    def sha(self, repo, number):
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def find(self, repo, revision):
        """The number of a commit, by its name, a tag or the main branch, or None."""
        commits = self.repos.get(repo, [])
        names = {self.sha(repo, number): number for number in range(len(commits))}
        names |= {tag: names[sha] for (of, tag), sha in self.tags.items() if of == repo}
        return {**names, "main": len(commits) - 1}.get(revision) if commits else None

    def environment(self, home):
        """What makes the client in another process use this one; home: its directory for caches."""
        return {
            **os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip


@contextmanager
def serve():
    """A stand-in that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self):
        self.hub.requests.append(self.path)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repo, what = "/".join(parts[2:4]), parts[4:]
        else:
            repo, what = "/".join(parts[:2]), parts[2:]
        what = what or ["revision", "main"]
        number = self.hub.find(repo, what[1])
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound")
        if number is None:
            return self.refuse(404, "RevisionNotFound")
        files, sha = self.hub.repos[repo][number], self.hub.sha(repo, number)
        if what[0] == "revision":
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            private = repo in self.hub.private
            return self.answer(200, {"id": repo, "sha": sha, "siblings": siblings, "private": private})
        if what[0] == "tree":
            entries = [(path, len(content), hashlib.sha1(content).hexdigest()) for path, content in files.items()]
            return self.answer(200, [{"type": "file", "path": p, "size": size, "oid": oid} for p, size, oid in entries])
        path = "/".join(what[2:])
        content = files.get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": sha}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if self.hub.ranges else None
        if part:
            headers["Content_Range"] = f"bytes {part[1]}-{part[2]}/{len(content)}"
            content = content[int(part[1]) : int(part[2]) + 1]
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(content)
        return self.answer(206 if part else 200, content, **headers)

    do_HEAD = do_GET

    def do_PUT(self):
        self.hub.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200)

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append(path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
            # Older clients say ``private``.
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo)
            self.hub.commit(repo, {".gitattributes": b""})
            return self.answer(200, {"url": f"{self.hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = [entry for entry in json.loads(body)["objects"] if entry["oid"] not in self.hub.blobs]
            actions = {entry["oid"]: {"upload": {"href": f"{self.hub.url}/put/{entry['oid']}"}} for entry in wanted}
            objects = [{**entry, "actions": actions[entry["oid"]]} for entry in wanted]
            return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/json")
        _, _, _, owner, name, what, *_ = path.split("/")
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "lfs" if p.endswith(".safetensors") else "regular"} for p in files]
            return self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        assert what == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        files = {value["path"]: base64.b64decode(value["content"]) for value in added}
        large = [line["value"] for line in lines if line["key"] == "lfsFile"]
        files |= {value["path"]: self.hub.blobs[value["oid"]] for value in large}
        sha = self.hub.commit(f"{owner}/{name}", files)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{sha}", "commitOid": sha})

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
