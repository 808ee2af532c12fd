"""Where the pack's files are among ComfyUI's folders, and which names may be used."""
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths

from ...ppap_core.guiders.loaders.hub import folder_name
from ...ppap_core.io.files import read_header
from ...ppap_core.tinyworld.loaders import WEIGHTS


def register_folders() -> None:
    """The pack's model folders, those of extra_model_paths.yaml stay; and the tiny world's files for the stock loaders."""
    for name in ("ppap_guiders", "ppap_experts"):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    for name in ("diffusion_models", "vae", "controlnet"):
        folder_paths.add_model_folder_path(name, str(WEIGHTS / name))


def guider_folders() -> list[Path]:
    """Folders that hold a guider: those with a config.json in models/ppap_guiders. A dot hides one that is not whole yet."""
    roots = map(Path, folder_paths.get_folder_paths("ppap_guiders"))
    return sorted(file.parent for root in roots if root.is_dir() for file in root.glob("[!.]*/config.json"))


def downloaded_guider(repo: str) -> Path:
    """Where the guider of owner/name on the hub goes. ValueError for what is no such name."""
    return Path(folder_paths.get_folder_paths("ppap_guiders")[0]) / folder_name(repo)


def output_folder(*names: str) -> Path:
    """A folder of the pack in ComfyUI's output."""
    return Path(folder_paths.get_output_directory()).joinpath(*names)


def guider_state(name: str) -> list[str]:
    """Changes when the files of a guider change."""
    return [_state(file) for folder in guider_folders() if folder.name == name
            for file in sorted(folder.iterdir()) if file.is_file()]


def download_state(repo: str | None) -> list[str]:
    """Changes when a downloaded guider comes or goes. A linked name, None, is not known yet."""
    return guider_state(folder_name(repo)) if repo else []


def expert_files() -> dict[str, Path]:
    """Every expert file by its name, with / between folders on every system."""
    return {name.replace("\\", "/"): Path(folder_paths.get_full_path_or_raise("ppap_experts", name))
            for name in folder_paths.get_filename_list("ppap_experts") if name.endswith(".safetensors")}


def expert_file(name: str) -> Path:
    """An expert file by the name in the list. ValueError for any other name."""
    return lookup(expert_files(), name.replace("\\", "/"), "expert file", "put it into models/ppap_experts")


def new_expert_file(name: str) -> Path:
    """Where experts of a name are saved."""
    return Path(folder_paths.get_folder_paths("ppap_experts")[0]) / f"{checked_file_name(name)}.safetensors"


def new_lora_file(name: str) -> Path:
    """Where a LoRA of a name is saved. ValueError for a name that belongs to a LoRA which this pack did not make."""
    file = Path(folder_paths.get_folder_paths("loras")[0]) / f"{checked_file_name(name)}.safetensors"
    if file.exists() and "ppap" not in read_header(file)[1]:
        raise ValueError(f"there is a LoRA '{name}' already, which was not made here and would be lost: choose another name")
    return file


def expert_state(name: str) -> list[str]:
    """Changes when an expert file changes."""
    return [_state(file) for known, file in expert_files().items() if known == name]


def _state(file: Path) -> str:
    return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"


def checked_file_name(name: str) -> str:
    """A name that stays in its folder on every system. ValueError for any other."""
    if not re.fullmatch(r"\w([\w .-]*\w)?", name):
        raise ValueError(f"'{name}' cannot name a file: expected letters, digits, spaces, dots, - and _, without a folder")
    return name


def lookup(known: dict[str, Any], name: str, what: str, how: str) -> Any:
    """The value of a name. ValueError that lists the known names."""
    if name not in known:
        raise ValueError(f"there is no {what} '{name}': expected one of {', '.join(known) or 'none yet'}; {how}")
    return known[name]


def validate(check: Callable[..., Any], *args: Any) -> bool | str:
    """The answer that ComfyUI wants of validate_inputs: True, or what is wrong. A linked input, None, is not known yet."""
    if None in args:
        return True
    try:
        check(*args)
    except ValueError as error:
        return str(error)
    return True
