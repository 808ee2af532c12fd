"""Files that make a network's folder, judged by their names before a weight is read or fetched."""
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ...io.files import read_header, read_json
from ...io.values import bare, is_whole, shown

MAX_NUMBER = 2**20  # the longest vocabulary has a quarter of it
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = r"[\w.-]+-\d+-of-\d+\.safetensors"
HEAD = "head.safetensors"  # of an aesthetic score, beside the network
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHERS = {"model_index.json": "a whole pipeline of diffusers", "open_clip_config.json": "a network in the form of open_clip",
          "adapter_config.json": "an adapter, which changes another network"}
"""File that tells what a folder holds which is no network of timm or transformers -> what that is."""
ELSEWHERE = r"(open_clip|adapter)_[\w.-]*"  # weights of those


def read_config(folder: Path) -> dict:
    """The config.json of a folder. ValueError for one that is damaged, or names numbers that no network has."""
    config = read_json(folder / "config.json")
    try:
        large = next(_too_large(config), None)
    except RecursionError:
        large = "values inside one another"
    if large:
        raise ValueError(f"{folder.name}/config.json has {large}: expected the description of a network, with whole numbers "
                         f"up to {MAX_NUMBER:,}; copy it again from the network's own page")
    return config


def _too_large(value: object, name: str = "a list") -> Iterator[str]:
    """Yield the names of whole numbers that would take the memory of a machine, as a number of layers or of classes."""
    if is_whole(value, MAX_NUMBER + 1, math.inf):
        yield f"{bare(name)} {shown(value)}"
    inner = value.items() if isinstance(value, dict) else ((name, each) for each in value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from _too_large(each, name)


def require_config(name: str, names: Collection[str]) -> None:
    """ValueError without a config.json, for what a folder or repository `name` holds instead. names: of all its files."""
    if "config.json" not in names:
        raise ValueError(f"{name} has no config.json, which says what network it is{_other_kind(names)}: expected one "
                         "beside the weights; choose another network")


def weight_names(name: str, names: Collection[str], weight_map: Mapping[str, str] | None = None) -> list[str]:
    """Files that hold the weights of a network, one copy of them, in order.

    name: of the folder or repository, for sentences. names: of all its files. weight_map: tensor -> file, as an index says;
    None: shards are those whose names say so. FileNotFoundError for weights that are not there, in safetensors, whole.
    """
    if WHOLE in names:
        return [WHOLE]
    tensors = sorted(file for file in names if re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII) and file != HEAD
                     and not re.fullmatch(ELSEWHERE, file))
    if INDEX in names:
        parts = sorted(set(weight_map.values()) if weight_map else filter(re.compile(SHARD).fullmatch, tensors))
        return _all_there(name, parts or [WHOLE], names)
    if len(tensors) == 1 and not re.fullmatch(SHARD, tensors[0]):
        return tensors
    if tensors:
        raise FileNotFoundError(f"{name} has no {WHOLE}, but {', '.join(map(bare, tensors[:3]))}, and no {INDEX} that says "
                                "how they belong together: expected one file of weights, or the index; copy it from the "
                                "network's own page")
    return _all_there(name, [WHOLE], names)


def _all_there(name: str, files: list[str], names: Collection[str]) -> list[str]:
    for file in files:
        if file not in names:
            pickle = next((f", only {bare(other)}, a pickle, which can hold code" for other in sorted(names)
                           if other.endswith(PICKLES)), "")
            raise FileNotFoundError(f"{name} has no weights in safetensors under the name {bare(file)}{pickle}"
                                    f"{_other_kind(names)}: copy them from the network's own page, or choose another "
                                    "network, or a copy of this one that has them")
    return files


def _other_kind(names: Collection[str]) -> str:
    return next((f" (it is {kind})" for file, kind in OTHERS.items() if file in names), "")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a network's folder: model.safetensors, those that its index lists, or the only one there is.

    FileNotFoundError naming a missing file; ValueError for an index or a file that is damaged.
    """
    names = file_names(folder)
    files = [folder / name for name in weight_names(folder.name, names, read_index(folder))]
    for file in files:
        read_header(file)
    return files


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, as the index of a folder's weights says, or None without one. ValueError for a damaged one."""
    if not (folder / INDEX).exists():
        return None
    parts = read_json(folder / INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise ValueError(f"{folder.name}/{INDEX} names no files of weights: copy it again from the network's own page")
    return parts


def file_names(folder: Path) -> set[str]:
    """Names of the files at the top of a folder; none for a folder that is not there."""
    return {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()
