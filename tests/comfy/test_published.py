"""What the registry would publish, unpacked into a folder of its own and loaded by ComfyUI."""
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pathspec")
from tools.archive import ROOT, build  # noqa: E402

HEAVY = {"peft", "timm", "transformers", "matplotlib", "PIL.ImageFont", "huggingface_hub"}
SECONDS = 1.5  # of the processor, a multiple of what it takes, for busy machines
LOAD = """
import sys, asyncio, json, socket, time; sys.path.insert(0, {{comfyui!r}})
from comfy.cli_args import args; args.cpu = True
import utils.extra_config, nodes
before, begun = set(sys.modules), time.process_time()
socket.socket.connect = socket.getaddrinfo = None
assert asyncio.run(nodes.load_custom_node({folder!r}))
seconds, added = time.process_time() - begun, set(sys.modules) - before
ours = {{{{name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("PPAP")}}}}
ours["PPAPTinyWorld"].execute(batch_size=1)
ours["PPAPLoadGuider"].execute(guider_name="tinyworld-colours")
files = {{{{sys.modules[kind.__module__].__file__ for kind in ours.values()}}}}
print(json.dumps({{{{"seconds": seconds, "added": sorted(added), "nodes": sorted(ours), "files": sorted(files)}}}}))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pack, as a manager would unpack it."""
    if not (ROOT / ".git").exists():
        pytest.skip("the archive is made of what git tracks: run this in a clone")
    folder = tmp_path_factory.mktemp("custom_nodes") / "ppap"
    build(folder.with_suffix(".zip"))
    zipfile.ZipFile(folder.with_suffix(".zip")).extractall(folder)
    return folder


@pytest.fixture
def loaded(fresh_process, published: Path) -> dict[str, Any]:
    return json.loads(fresh_process(LOAD.format(folder=str(published))))


def test_the_archive_loads_quickly_and_asks_no_network(loaded: dict, published: Path):
    """All nodes are there, what is bundled loads, and heavy libraries wait until they are needed."""
    assert loaded["nodes"] == sorted(page.stem for page in (published / "web" / "docs").glob("PPAP*.md"))
    assert all(Path(file).is_relative_to(published) for file in loaded["files"])
    assert not HEAVY & set(loaded["added"]) and loaded["seconds"] < SECONDS
