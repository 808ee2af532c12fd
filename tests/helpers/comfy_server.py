"""A running ComfyUI, as its web page sees it."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACK = "ComfyUI-PPAP"


class Server:
    """The address of a ComfyUI, the folder it works in, and its process."""

    def __init__(self, port: int, folder: Path, pid: int):
        self.url, self.port, self.folder, self.client = f"http://127.0.0.1:{port}", port, folder, uuid.uuid4().hex
        self.pid = pid

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def post(self, path: str, value: dict) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return json.load(error)

    def queue(self, graph: dict) -> str:
        """Post an API graph; its id."""
        answer = self.post("/prompt", {"prompt": graph, "client_id": self.client})
        assert "prompt_id" in answer and not answer.get("node_errors"), answer
        return answer["prompt_id"]

    def wait(self, prompt: str, seconds: float = 120) -> dict:
        """The history of a finished prompt."""
        end = time.monotonic() + seconds
        while prompt not in (history := self.get(f"/history/{prompt}")):
            assert time.monotonic() < end, f"not finished after {seconds} s"
            time.sleep(0.05)
        return history[prompt]

    def run(self, graph: dict, seconds: float = 120) -> dict:
        """Run an API graph to its end; its outputs by node id."""
        history = self.wait(self.queue(graph), seconds)
        failed = [(error["node_type"], error["exception_message"]) for error in messages(history, "execution_error")]
        assert history["status"]["status_str"] == "success", failed
        return history["outputs"]

    def error(self, graph: dict) -> str:
        """The message of the error that ends a graph."""
        [failed] = messages(self.wait(self.queue(graph)), "execution_error")
        return failed["exception_message"].strip()

    def pictures(self, output: dict) -> list:
        """The pictures that a Save or Preview node reported."""
        from PIL import Image

        return [Image.open(self.folder / picture["type"] / picture["subfolder"] / picture["filename"])
                for picture in output["images"]]

    @contextmanager
    def listen(self) -> Iterator[Callable[[str], Iterator[tuple[str, Any]]]]:
        """Listen to the messages for the page: until(kind) yields (type, data) up to a message of a kind."""
        import websocket

        stream = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=60)

        def until(kind: str) -> Iterator[tuple[str, Any]]:
            received = ""
            while received != kind:
                message = stream.recv()
                value = json.loads(message) if isinstance(message, str) else {"type": "preview", "data": message}
                received = value["type"]
                yield received, value["data"]
        try:
            yield until
        finally:
            stream.close()


def messages(history: dict, kind: str) -> list[dict]:
    """The messages of a kind in the history of a prompt."""
    return [data for name, data in history["status"]["messages"] if name == kind]


def find_comfyui() -> Path:
    """The folder of the ComfyUI under test: COMFYUI_PATH, which must then hold one, or the default of comfy-cli."""
    chosen = os.environ.get("COMFYUI_PATH")
    folder = Path(chosen or Path.home() / "comfy" / "ComfyUI")
    if (folder / "main.py").is_file():
        return folder
    if chosen:
        pytest.fail(f"COMFYUI_PATH is {chosen}, and there is no ComfyUI: expected a folder with main.py")
    pytest.skip(f"no ComfyUI at {folder}: set COMFYUI_PATH to run the tests of the nodes")


@contextmanager
def running(comfyui: Path, folder: Path, settings: dict[str, Any] | None = None) -> Iterator[Server]:
    """ComfyUI as users start it, with the pack in its custom_nodes and everything else empty.

    folder: all that it reads and writes. settings: of its page, by their ids.
    """
    for name in ("custom_nodes", "user/default", "input"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / PACK).symlink_to(ROOT)
    (folder / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings or {}))
    port = _free_port()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "main.py", "--cpu", "--base-directory", str(folder), "--port", str(port),
                                    "--disable-auto-launch", "--preview-method", "auto"],
                                   cwd=comfyui, stdout=log, stderr=subprocess.STDOUT)
    server = Server(port, folder, process.pid)
    try:
        _wait_for(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(server: Server, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300  # on a busy machine; seconds on an idle one
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    process.kill()
    pytest.fail("ComfyUI did not start:\n" + (server.folder / "log.txt").read_text()[-3000:])
