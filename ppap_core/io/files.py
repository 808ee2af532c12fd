"""Reading and writing: safetensors with JSON metadata, written beside the name and then renamed."""
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .folders import claim, make_folder, sync_folder
from .values import bare, shown

RENAMING_PAUSES = (0.05, 0.1, 0.2, 0.4)  # seconds between attempts: virus scanners and indexers let go of a file soon
CLAIMING_SECONDS = 10.0  # to wait for another process that begins the same folder
MOST_NAMED = 5  # differences in a sentence
PART = ".part"  # ending of a file that is being written

log = logging.getLogger(__name__)


class FileInUseError(PermissionError):
    """A file cannot be replaced because something holds it open, as only Windows forbids."""


class DamagedFileError(ValueError):
    """A file is not whole, or was not written by safetensors."""


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write beside the name and rename, so that a reader sees the old file or the new one, whole.

    The new one is on the disk before it takes the name, so that a loss of power leaves one of the two as well.
    Missing folders are made. OSError in words when the disk is full or the folder cannot be written, `FileInUseError` when
    the old file is held open; nothing half-written is left behind.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        make_folder(path.parent)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _rename(part, path)
        sync_folder(path.parent)
    except FileInUseError:
        raise
    except OSError as error:
        raise OSError(f"could not write {path.name} into {path.parent}: {error}. Free some disk space or choose "
                      "another folder; what was there before is untouched.") from error
    finally:
        with suppress(OSError):  # a scanner may hold this one, too
            part.unlink(missing_ok=True)


def _rename(part: Path, path: Path) -> None:
    for pause in (*RENAMING_PAUSES, None):
        try:
            os.replace(part, path)
            return
        except PermissionError as error:
            if pause is None:
                raise FileInUseError(f"could not write {path.name} into {path.parent}: the file is held open ({error}), by "
                                     "a model that was loaded from it or by another program. Close what uses it and try "
                                     "again; what was there before is untouched.") from error
            time.sleep(pause)


def save_tensors(path: Path | str, tensors: dict[str, Tensor], header: dict) -> None:
    """Write tensors and a header of JSON values into one safetensors file, whole or not at all.

    OSError in words when the disk is full or the folder cannot be written.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(tensors, {"ppap": json.dumps(header)}))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and header of a file written by `save_tensors`. FileNotFoundError or ValueError in words."""
    tensors, metadata = read_safetensors(path)
    return tensors, _description(path, metadata)


def read_description(path: Path | str) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Shapes of the tensors and header of a file written by `save_tensors`. Errors are those of `load_tensors`."""
    shapes, metadata = read_shapes(path)
    return shapes, _description(path, metadata)


def _description(path: Path | str, metadata: dict[str, str]) -> dict:
    try:
        header = json.loads(metadata.get("ppap", "null"))
    except (ValueError, RecursionError):  # no JSON, numbers of thousands of digits, or nested as deep
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{Path(path).name} has no description of this pack: expected a file saved by it.")
    return header


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file. FileNotFoundError or ValueError in words."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_header(path: Path | str) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata of a safetensors file. FileNotFoundError, or DamagedFileError for one that is cut off."""
    with _opened(path) as file:
        return list(file.keys()), file.metadata() or {}


def read_shapes(path: Path | str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of the tensors of a safetensors file by name, and its metadata. Errors are those of `read_header`."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {}


def read_rows(path: Path | str, name: str, index: tuple[Tensor, ...]) -> Tensor:
    """Copy of some places of a tensor in a safetensors file, of which nothing else is read.

    index: positions in each of the leading dimensions, (n,) long each, as for `tensor[index]`.
    KeyError for a name that the file does not have; other errors are those of `read_header`.
    """
    with _opened(path) as file:
        if name not in file.keys():
            raise KeyError(name)
        return file.get_tensor(name)[index]  # the tensor itself lies in the file


def header_bytes(path: Path | str) -> int:
    """Length that a safetensors file says its header has, before any of it is read; 0 for what is too short or no file."""
    try:
        with Path(path).open("rb") as file:
            return int.from_bytes(file.read(8), "little")
    except OSError:
        return 0


@contextmanager
def _opened(path: Path | str) -> Iterator:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the name and the folder.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path.name} cannot be read ({bare(str(error))}): expected a whole safetensors file; "
                               "copy or make it again.") from error


def write_json(path: Path | str, value: object) -> None:
    """Write JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path | str) -> dict:
    """A JSON object from a file. ValueError in words."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a JSON file; copy or make it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: expected a JSON object; copy or make it again.")
    return value


def ensure_manifest(folder: Path | str, manifest: dict) -> dict:
    """Reserve a folder for results of one manifest, kept in its manifest.json; returns the manifest as JSON has it.

    A manifest that is damaged is written anew where nothing else is in the folder. Of several processes that begin a folder
    at once, one writes it. ValueError naming what differs when the folder holds results of another one.
    """
    file, expected = Path(folder) / "manifest.json", json.loads(json.dumps(manifest))  # tuples become lists, as on disk
    if _is_unclaimed(file):
        _begin(file, expected)
    saved = read_json(file)
    if saved != expected:
        differing = [key for key in sorted({*saved, *expected}) if saved.get(key) != expected.get(key)]
        differences = "; ".join(f"{bare(key)} is {shown(saved.get(key))}, expected {shown(expected.get(key))}"
                                for key in differing[:MOST_NAMED])
        raise ValueError(f"{Path(folder).name} holds results of other settings ({differences}): choose another name, or "
                         "delete that folder")
    return expected


def _is_unclaimed(manifest: Path) -> bool:
    """Whether a folder has no manifest, or one that was damaged before there was anything else."""
    if not manifest.exists():
        return True
    try:
        read_json(manifest)
    except ValueError:
        return all(each.name.startswith(manifest.name) for each in manifest.parent.iterdir())
    return False


def _begin(manifest: Path, value: dict) -> None:
    with claim(manifest, CLAIMING_SECONDS):
        if _is_unclaimed(manifest):
            if manifest.exists():
                log.warning("%s is damaged, and nothing else is in its folder: it is written anew", manifest)
            write_json(manifest, value)


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before names: {"a": t} -> {"prefix.a": t}."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a prefix, without it: {"prefix.a": t, "b": u} -> {"a": t}."""
    return {name[len(prefix) + 1:]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as flat tensors, by the number of the parameter: {"3.exp_avg": ...}."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, row in state.items() for name, value in row.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state of an optimiser from the tensors of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor.clone()  # a tensor of a file keeps it open, and Windows its name
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
