"""Reading and writing: safetensors with JSON metadata, written beside the name and then renamed."""
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write beside the name and rename: a reader sees the old file or the new one, whole.

    OSError in words when the disk is full or the folder cannot be written; nothing half-written is left behind.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"could not write {path.name} into {path.parent}: {error}. Free some disk space or choose "
                      "another folder; what was there before is untouched.") from error
    finally:
        if part.exists():
            part.unlink()


def save_tensors(path: Path | str, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a JSON description into one safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(tensors, {"ppap": json.dumps(about)}))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file written by `save_tensors`. FileNotFoundError or ValueError in words."""
    tensors, metadata = read_safetensors(path)
    try:
        about = json.loads(metadata.get("ppap", "null"))
    except json.JSONDecodeError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{Path(path).name} has no description of this pack: expected a file saved by it.")
    return tensors, about


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file. FileNotFoundError or ValueError in words."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_header(path: Path | str) -> tuple[list[str], dict[str, str]]:
    """Names and metadata of a safetensors file that is whole. FileNotFoundError or ValueError in words."""
    with _opened(path) as file:
        return list(file.keys()), file.metadata() or {}


@contextmanager
def _opened(path: Path | str) -> Iterator:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the name and the folder.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}): expected a whole safetensors file; copy or make it "
                         "again.") from error


def weight_files(folder: Path) -> list[Path]:
    """The whole safetensors files of a folder, by its index if it has one. FileNotFoundError or ValueError in words."""
    index = folder / "model.safetensors.index.json"
    parts = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise ValueError(f"{folder.name}/{index.name} names no files of weights: copy it again from the network's own page")
    names = sorted(set(parts.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            pickle = next((f", only {file.name}, a pickle, which can hold code" for file in folder.glob("*.bin")), "")
            raise FileNotFoundError(f"{folder.name} has no {name}{pickle}: expected weights in safetensors; copy them from "
                                    "the network's own page")
        read_header(folder / name)
    return [folder / name for name in names]


def write_json(path: Path | str, value: object) -> None:
    """Write JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path | str) -> dict:
    """A JSON object from a file. ValueError in words."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a JSON file; copy or make it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: expected a JSON object; copy or make it again.")
    return value


def ensure_manifest(folder: Path | str, recipe: dict) -> dict:
    """Make a folder the place of one recipe, kept in its manifest.json; returns the recipe as JSON has it.

    ValueError naming what differs when the folder holds the results of another recipe.
    """
    manifest, wanted = Path(folder) / "manifest.json", json.loads(json.dumps(recipe))  # tuples become lists, as on disk
    found = read_json(manifest) if manifest.exists() else None
    if found is None:
        write_json(manifest, wanted)
    elif found != wanted:
        differences = "; ".join(f"{key} is {found.get(key)!r}, expected {wanted.get(key)!r}"
                                for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key))
        raise ValueError(f"{Path(folder).name} holds the results of another recipe ({differences}): choose another name, "
                         "or delete that folder")
    return wanted


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"a": t} -> {"prefix.a": t}."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, with the prefix taken off."""
    return {name[len(prefix) + 1:]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, {"3.exp_avg": ...}."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, row in state.items() for name, value in row.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor.clone()  # a tensor of a file keeps it open, and Windows its name
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
