"""The little of a hub that a download needs, served on this machine."""
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO, SHA = "some-one/a_net.v1", "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The little of the hub's interface that a download needs, over HTTP on this machine."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.asked, self.served = files, [], 0
        self.ranges, self.damaged, self.refuse = True, "", None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *unused):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        self.asked.append(path)
        if self.refuse:
            return self.send(request, self.refuse[0], b"", {"X-Error-Code": self.refuse[1]})
        if path.startswith("/api/"):
            answers = {"": self.about, f"/revision/{SHA}": self.about, f"/tree/{SHA}": self.tree}
            value = answers[path.removeprefix(f"/api/models/{REPO}")]()
            return self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})
        resolved = re.fullmatch(rf"/{REPO}/resolve/{SHA}/(.+)", path)
        if resolved and resolved[1].endswith(".safetensors"):  # large files lie on other servers
            return self.send(request, 302, b"", {"Location": f"{self.url}/far/{resolved[1]}"})
        name = resolved[1] if resolved else path.removeprefix("/far/")
        self.send_file(request, self.files[name][::-1] if self.damaged == name else self.files[name])

    def send_file(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"]).groups())
        part = content[first:last + 1] if self.ranges else content
        self.served += len(part)
        self.send(request, 206 if self.ranges else 200, part, {})

    def send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            request.send_header(name, str(value))
        request.end_headers()
        request.wfile.write(content)

    def about(self) -> dict:
        def sibling(name: str, content: bytes) -> dict:
            entry = {"rfilename": name, "size": len(content),
                     "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            return entry
        return {"id": REPO, "modelId": REPO, "sha": SHA, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [sibling(*item) for item in self.files.items()]}

    def tree(self) -> list[dict]:
        return [{"type": "file", "path": name, "size": len(content), "oid": ""} for name, content in self.files.items()
                if "/" not in name]


CONFIG = b'{"architecture": "resnet18"}'
FILES = {"config.json": CONFIG, "model.safetensors": bytes(range(256)) * 41 + b"end", "tokenizer.json": b"{}",
         "vocab.txt": b"", "README.md": b"about", "pytorch_model.bin": b"code", "model.pt": b"code", "modeling.py": b"code",
         "model.fp16.safetensors": b"twice", "onnx/model.safetensors": b"elsewhere", "training_args.bin": b"code"}
TAKEN = {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub(dict(FILES))
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
