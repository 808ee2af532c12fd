"""Fetching a network from a hub that runs in the test: what is taken, what is not, and what happens when it stops."""
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import says

from ppap_core import download as module
from ppap_core.download import download, folder_name, wanted

pytest.importorskip("huggingface_hub")
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
            asked = {"": self.about, f"/revision/{SHA}": self.about, f"/tree/{SHA}": self.tree}
            found = asked[path.removeprefix(f"/api/models/{REPO}")]()
            return self.send(request, 200, json.dumps(found).encode(), {"Content-Type": "application/json"})
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
            found = {"rfilename": name, "size": len(content),
                     "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if name.endswith(".safetensors"):
                found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            return found
        return {"id": REPO, "modelId": REPO, "sha": SHA, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [sibling(*each) for each in self.files.items()]}

    def tree(self) -> list[dict]:
        return [{"type": "file", "path": name, "size": len(content), "oid": ""} for name, content in self.files.items()
                if "/" not in name]


CONFIG = b'{"architecture": "resnet18"}'
FILES = {"config.json": CONFIG, "model.safetensors": bytes(range(256)) * 41 + b"end", "tokenizer.json": b"{}",
         "vocab.txt": b"", "README.md": b"about", "pytorch_model.bin": b"code", "model.pt": b"code", "modeling.py": b"code",
         "model.fp16.safetensors": b"twice", "onnx/model.safetensors": b"elsewhere", "training_args.bin": b"code"}
TAKEN = {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(module, "PIECE", 2000)
    hub = Hub(dict(FILES))
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def fetch(hub: Hub, folder: Path, report=lambda done, total: None) -> Path:
    return download(REPO, folder, report, endpoint=hub.url)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# What is fetched

def test_weights_and_what_says_what_they_are_are_fetched_and_nothing_that_can_hold_code(hub, tmp_path):
    folder = tmp_path / "guiders" / folder_name(REPO)
    assert fetch(hub, folder) == folder
    assert contents(folder) == {name: FILES[name] for name in TAKEN}
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"
    assert hub.served == sum(len(FILES[name]) for name in TAKEN), "every byte comes once"


PLAIN, SHARDS = ["config.json", "model.safetensors"], [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize(("names", "taken"), [
    ([*PLAIN, "open_clip_model.safetensors"], PLAIN),
    ([*SHARDS[::-1], "model.safetensors.index.json", "config.json"],
     ["config.json", "model.safetensors.index.json", *SHARDS]),
    (["config.json", "other.safetensors", "spiece.model", "preprocessor_config.json", "special_tokens_map.json"],
     ["config.json", "preprocessor_config.json", "special_tokens_map.json", "spiece.model", "other.safetensors"]),
    ([*PLAIN, "../evil.safetensors", "a\\b.safetensors", "config.json.py", "tokenizer.py", "x.bin"], PLAIN)])
def test_of_a_repository_only_the_known_kinds_at_its_root_are_wanted(names, taken):
    assert wanted(REPO, names) == taken


@pytest.mark.parametrize(("names", "words"), [
    ({"config.json": CONFIG, "pytorch_model.bin": b"code"}, ["no weights in safetensors", "another network"]),
    ({"config.json": CONFIG, "onnx/model.safetensors": b"x"}, ["no weights in safetensors"]),
    ({"model.safetensors": b"x"}, ["no config.json"]), ({}, ["no weights in safetensors"])])
def test_a_repository_without_weights_or_config_is_refused_and_nothing_is_fetched(hub, tmp_path, names, words):
    hub.files = names
    with says(ValueError, REPO, *words):
        fetch(hub, tmp_path / "net")
    assert hub.served == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "resnet", "a/b/c", "https://huggingface.co/a/b", "../b", "a/..", "a/b c", "/a", "a/",
                                  "a/b\t", "-a/b", "a--b/c", "ä/b", "a\\b", "a/" + 97 * "x"])
def test_only_owner_slash_name_names_a_repository(name, tmp_path):
    with says(ValueError, f"'{name}'", "owner/name"):
        download(name, tmp_path / "net", print)


def test_a_name_makes_one_folder():
    assert folder_name("timm/resnet18.a1_in1k") == "timm--resnet18.a1_in1k"


# Progress, and what happens when it stops

def test_progress_counts_bytes_up_to_the_whole(hub, tmp_path):
    seen = []
    fetch(hub, tmp_path / "net", lambda done, total: seen.append((done, total)))
    whole = sum(len(FILES[name]) for name in TAKEN)
    assert seen[0] == (0, whole) and seen[-1] == (whole, whole)
    assert seen == sorted(seen) and len(seen) > 8 and max(b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)) <= 2000


class Cancelled(BaseException):
    """What a cancel button raises."""


@pytest.mark.parametrize("stops", [[0], [15], [5000], [3000, 3500, 9000]])
def test_a_download_that_was_stopped_goes_on_where_it_stopped(hub, tmp_path, stops):
    folder = tmp_path / "net"
    for stop in stops:
        def cancel(done, total, stop=stop):
            if done >= stop:
                raise Cancelled
        with pytest.raises(Cancelled):
            fetch(hub, folder, cancel)
        assert not folder.exists(), "a folder that is not whole cannot be chosen"
        assert [each.name[0] for each in tmp_path.iterdir()] == ["."]
    fetch(hub, folder)
    assert contents(folder) == {name: FILES[name] for name in TAKEN}
    assert hub.served == sum(len(FILES[name]) for name in TAKEN), "no byte comes twice"


def test_a_folder_that_is_there_is_left_alone_and_the_hub_is_not_asked(hub, tmp_path):
    (tmp_path / "net").mkdir()
    assert fetch(hub, tmp_path / "net") == tmp_path / "net"
    assert not hub.asked and not contents(tmp_path)


@pytest.mark.parametrize("begun", [b"", FILES["model.safetensors"][:700], b"older" + FILES["model.safetensors"]])
def test_from_a_server_that_knows_no_ranges_a_file_comes_whole_or_is_begun_anew(hub, tmp_path, begun):
    hub.ranges = False
    part = tmp_path / f".{folder_name(REPO)}"
    part.mkdir()
    (part / "model.safetensors").write_bytes(begun)
    if begun:
        with says(ValueError, "model.safetensors", REPO, "again"):
            fetch(hub, tmp_path / "net")
    fetch(hub, tmp_path / "net")
    assert contents(tmp_path / "net") == {name: FILES[name] for name in TAKEN}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_damaged_on_its_way_is_thrown_away_and_fetched_again(hub, tmp_path, name):
    hub.damaged = name
    with says(ValueError, name, REPO, "again"):
        fetch(hub, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    hub.damaged = ""
    fetch(hub, tmp_path / "net")
    assert contents(tmp_path / "net") == {name: FILES[name] for name in TAKEN}


# What is said when it cannot be

@pytest.mark.parametrize(("status", "code", "words"), [
    (404, "RepoNotFound", ["no network", "check the name"]), (403, "GatedRepo", ["accepted its terms", "hf auth login"])])
def test_what_the_hub_refuses_is_said_in_words(hub, tmp_path, status, code, words):
    hub.refuse = status, code
    with says(ValueError, REPO, *words):
        fetch(hub, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_no_connection_is_said_in_words(tmp_path):
    with says(ConnectionError, REPO, "check the connection", "where it stopped"):
        download(REPO, tmp_path / "net", print, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(("code", "error", "words"), [
    ("Forbidden", ConnectionError, "where it stopped"), ("GatedRepo", ValueError, "accepted its terms")])
def test_a_file_that_is_refused_is_said_in_words(hub, tmp_path, code, error, words):
    def refuse(done, total):
        hub.refuse = 403, code
    with says(error, REPO, words):
        fetch(hub, tmp_path / "net", refuse)


def test_a_disk_without_room_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4000}))
    with says(ValueError, "GB are free", str(tmp_path), "make room"):
        fetch(hub, tmp_path / "net")
    assert hub.served == 0


def test_the_missing_package_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with says(ImportError, "pip install huggingface_hub", "by hand"):
        download(REPO, tmp_path / "net", print)
