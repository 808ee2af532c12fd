"""The pack's files among ComfyUI's folders, and the names that they may have."""
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import folder_paths

from ...ppap_core.guiders.loaders.hub import folder_name
from ...ppap_core.guiders.loaders.trained import require_replaceable
from ...ppap_core.io.files import read_header
from ...ppap_core.tinyworld.loaders import GUIDERS, WEIGHTS

Value = TypeVar("Value")


def register_folders() -> None:
    """Add the pack's model folders to those of extra_model_paths.yaml, and the tiny world's files to the loaders' lists."""
    for name in ("ppap_guiders", "ppap_experts"):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    folder_paths.add_model_folder_path("ppap_guiders", str(GUIDERS))
    for name in ("diffusion_models", "vae", "controlnet", "loras"):
        folder_paths.add_model_folder_path(name, str(WEIGHTS / name))


def guider_folders() -> list[Path]:
    """List the folders in models/ppap_guiders that hold a config.json. A dot hides one that is not complete yet."""
    roots = map(Path, folder_paths.get_folder_paths("ppap_guiders"))
    return sorted(file.parent for root in roots if root.is_dir() for file in root.glob("[!.]*/config.json"))


def downloaded_guider(repo: str) -> Path:
    """Return the folder of a guider owner/name on the hub. ValueError for what is no such name."""
    return Path(folder_paths.get_folder_paths("ppap_guiders")[0]) / folder_name(repo)


def new_guider_folder(name: str) -> Path:
    """Return the folder in which a trained guider of a name is saved. ValueError if it exists and holds something else."""
    folder = Path(folder_paths.get_folder_paths("ppap_guiders")[0]) / checked_file_name(name)
    require_replaceable(folder)
    return folder


def output_folder(*names: str) -> Path:
    """Return a folder or file of the pack in ComfyUI's output."""
    return Path(folder_paths.get_output_directory()).joinpath(*names)


def guider_stamp(name: str) -> list[str]:
    """Return texts that change when the files of a guider do."""
    return [file_stamp(file) for folder in guider_folders() if folder.name == name
            for file in sorted(folder.iterdir()) if file.is_file()]


def download_stamp(repo: str | None) -> list[str]:
    """Return texts that change when a downloaded guider comes or goes; nothing for None, the name on a wire."""
    return guider_stamp(folder_name(repo)) if repo else []


def expert_files() -> dict[str, Path]:
    """Return all expert files by name, with / between folders on every system."""
    return {name.replace("\\", "/"): Path(folder_paths.get_full_path_or_raise("ppap_experts", name))
            for name in folder_paths.get_filename_list("ppap_experts") if name.endswith(".safetensors")}


def expert_file(name: str) -> Path:
    """Return an expert file by its name in the list. ValueError for any other name."""
    return lookup(expert_files(), name.replace("\\", "/"), "expert file", "put it into models/ppap_experts")


def new_expert_file(name: str) -> Path:
    """Return the file in which experts of a name are saved."""
    return Path(folder_paths.get_folder_paths("ppap_experts")[0]) / f"{checked_file_name(name)}.safetensors"


def new_lora_file(name: str) -> Path:
    """Return the file in which a LoRA of a name is saved. ValueError if it exists and this pack did not make it."""
    file = Path(folder_paths.get_folder_paths("loras")[0]) / f"{checked_file_name(name)}.safetensors"
    if file.exists() and "ppap" not in read_header(file)[1]:
        raise ValueError(f"there is a LoRA '{name}' already, which was not made here and would be lost: choose another name")
    return file


def expert_stamp(name: str) -> list[str]:
    """Return texts that change when an expert file does."""
    return [file_stamp(file) for listed, file in expert_files().items() if listed == name]


def file_stamp(file: Path) -> str:
    """Return a text that changes when a file does."""
    return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"


def checked_file_name(name: str) -> str:
    """Return a name that stays in its folder on every system. ValueError for any other."""
    if not re.fullmatch(r"\w([\w .-]*\w)?", name):
        raise ValueError(f"'{name}' cannot name a file: expected letters, digits, spaces, dots, - and _, without a folder")
    return name


def lookup(registered: Mapping[str, Value], name: str, kind: str, advice: str) -> Value:
    """Return the value of a name. ValueError that lists the registered names.

    kind, advice: for the error, such as "guider" and "put its folder into models/ppap_guiders".
    """
    if name not in registered:
        raise ValueError(f"there is no {kind} '{name}': expected one of {', '.join(registered) or 'none yet'}; {advice}")
    return registered[name]


def validate(check: Callable[..., Any], *args: Any) -> bool | str:
    """Call check(*args) for ComfyUI's validate_inputs: True, or the words of its ValueError.

    Arguments that come through a wire are None, which is not checked.
    """
    if None in args:
        return True
    try:
        check(*args)
    except ValueError as error:
        return str(error)
    return True
