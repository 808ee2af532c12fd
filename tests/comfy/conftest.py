"""A real ComfyUI on the CPU, twice: a server that workflows are posted to, and the same code in this process.

`find_comfyui` says where it is looked for; the tests are skipped when nothing is there.
"""
import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.comfy_server import ROOT, Server, find_comfyui, running
from helpers.workbench import Workbench
from helpers.worlds import LatentWorld, PixelWorld

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder; those that talk to the server run in one process, so that one server is started."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("comfy")
            if "server" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group("server"))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return find_comfyui()


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(comfyui, tmp_path_factory.mktemp("comfyui")) as server:
        yield server


class InProcess:
    """The nodes of a ComfyUI loaded into this process, called as its executor calls them: in inference mode."""

    def __init__(self, registered: dict, pack: Any):
        self.registered, self.pack = registered, pack

    def __call__(self, node: str, /, **inputs: Any) -> tuple:
        """Run a node; its outputs."""
        import torch

        kind = self.registered[node]
        with torch.inference_mode():
            if hasattr(kind, "define_schema"):
                made = kind.execute(**inputs)
                return getattr(made, "args", made)  # a few nodes of ComfyUI's return a plain tuple
            return getattr(kind(), kind.FUNCTION)(**inputs)


@pytest.fixture(scope="session")
def comfy(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    """The pack, loaded by ComfyUI's own loader under a name made of its path."""
    folder = tmp_path_factory.mktemp("in_process")
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    import folder_paths  # noqa: I001
    import utils.extra_config  # noqa: F401  before nodes, which puts another `utils` on the path

    import nodes

    folder_paths.models_dir = str(folder / "models")
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.add_model_folder_path("loras", str(folder / "models" / "loras"), is_default=True)
    assert asyncio.run(nodes.load_custom_node(str(ROOT)))
    kind = nodes.NODE_CLASS_MAPPINGS["PPAPTinyWorld"]
    return InProcess(nodes.NODE_CLASS_MAPPINGS, sys.modules[kind.__module__.rsplit(".nodes", 1)[0]])


@pytest.fixture(scope="session")
def load_extras(comfy: InProcess, comfyui: Path) -> Callable[..., None]:
    """load(*names) loads files of ComfyUI's comfy_extras, by their names without `nodes_`, that this version has."""
    def load(*names: str) -> None:
        import nodes

        files = (comfyui / "comfy_extras" / f"nodes_{name}.py" for name in names)
        for file in filter(Path.is_file, files):
            assert asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    return load


@pytest.fixture(scope="module")
def pixels(comfy: InProcess) -> PixelWorld:
    return PixelWorld(comfy)


@pytest.fixture(scope="module")
def latents(comfy: InProcess) -> LatentWorld:
    return LatentWorld(comfy)


@pytest.fixture(scope="module")
def bench(comfy: InProcess, load_extras: Callable[..., None]) -> Workbench:
    """Small models of all families, with the nodes of ComfyUI that are combined with guidance."""
    load_extras("custom_sampler", "pag", "slg", "apg", "cfg", "mahiro", "model_advanced", "differential_diffusion", "sag",
                "perpneg", "easycache", "tcfg", "fresca", "eps", "freelunch", "tomesd", "hypertile", "context_windows",
                "latent", "lumina2", "model_downscale", "hooks", "nag")
    return Workbench(comfy)


@pytest.fixture
def fresh_process(comfyui: Path):
    """run(code) in a new Python process beside ComfyUI; returns the last line it printed."""
    def run(code: str) -> str:
        code = code.format(comfyui=str(comfyui), root=str(ROOT))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]
    return run
