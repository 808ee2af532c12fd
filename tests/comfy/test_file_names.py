"""Names of experts in the list and in workflows of other systems, and what is no name."""
from pathlib import Path
from typing import Any

import pytest
from helpers import says

NAMES = ["two words.safetensors", "sub folder/gr\u00fcn \u7f51\u7edc.safetensors", f"deep/{'x' * 200}.safetensors"]


@pytest.fixture
def experts(comfy) -> Path:
    """A folder of experts with names of all kinds, and with files that are none."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("ppap_experts")[0])
    for name in [*NAMES, "pickled.pt", "pickled.pkl", "notes.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    folder_paths.filename_list_cache.clear()
    return folder


def paths(comfy) -> Any:
    return comfy.pack.nodes.bridge.paths


def test_the_list_holds_safetensors_with_any_name(comfy, experts: Path):
    listed = paths(comfy).expert_files()
    assert set(NAMES) <= listed.keys() and not [name for name in listed if not name.endswith(".safetensors")]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_another_system_are_the_same_file(comfy, experts: Path, name: str):
    assert paths(comfy).expert_file(name.replace("/", "\\")) == paths(comfy).expert_file(name) == experts / name


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub folder\\..\\..\\secret.safetensors", "/etc/passwd",
                                  "\\\\server\\share\\experts.safetensors", "pickled.pt"])
def test_what_is_not_in_the_list_is_no_name(comfy, experts: Path, name: str):
    (experts.parent / "secret.safetensors").touch()
    with says(ValueError, "there is no expert file", "models/ppap_experts"):
        paths(comfy).expert_file(name)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "C:x", "", ".hidden", "x\t"])
def test_a_new_file_stays_in_its_folder(comfy, name: str):
    with says(ValueError, "cannot name a file"):
        paths(comfy).new_expert_file(name)


def test_every_network_that_comes_with_the_pack_loads(comfy):
    cache = comfy.pack.nodes.bridge.guider_cache
    names = [name for name in cache.guider_sources() if name.startswith("tinyworld")]
    assert {cache.load_guider(name).task for name in names} == {"class", "depth", "segmentation"} and len(names) == 4
