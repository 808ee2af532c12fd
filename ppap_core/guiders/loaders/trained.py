"""Guiders that were trained on a few pictures, as folders: a linear head, and the name of the network that it reads."""
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...io.files import load_tensors, read_description, read_json, save_tensors, write_json
from ...io.hashing import digest, weight_digests
from ...io.values import bare, is_name, shown
from ..guider import Guider, clean, with_input
from ..preprocess import CHANNELS, PADDINGS
from ..train import MAX_FEATURES, MOST_CLASSES, TrainedGuider, class_names, require_backbone, with_head
from .contents import HEAD, read_config

KEY, FORMAT = "ppap_trained", 1
INNER = ("structure", "style", "embedding")  # tasks that are named as the output of a network that they are

FindBackbone = Callable[[str, str], Guider]
"""(name of a guider such as "timm/resnet18", one of OUTPUTS) -> that guider"""


def is_trained(folder: Path | str) -> bool:
    """Whether a folder holds a trained guider, whatever its state."""
    try:
        return KEY in read_json(Path(folder) / "config.json")
    except ValueError:
        return False


def save_trained(folder: Path | str, trained: TrainedGuider, backbone: Guider) -> str:
    """Write the head of a trained guider, and what it reads, into a folder that `load_guider` reads.

    backbone: the network that it was trained on, which is named and not copied. A folder that holds another trained guider
    is written anew. Returns what happened: "saved", "replaced", or "unchanged" where the folder holds these very files.
    ValueError for a folder that holds anything else; OSError if it cannot be written.
    """
    folder, head = Path(folder), trained.guider.net.net.head  # type: ignore[attr-defined]
    existed = require_replaceable(folder)
    tensors = {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
    config = {KEY: FORMAT, "backbone": _record(backbone), "labels": list(trained.guider.labels), "head": digest(tensors),
              "pictures": [count for _, count in trained.counts], "recognised": [right for right, _ in trained.counts]}
    if existed and _holds(folder, config):
        return "unchanged"
    save_tensors(folder / HEAD, tensors, {"kind": "trained head"})
    write_json(folder / "config.json", config)  # last: it names the head, so that a mix of two is noticed
    return "replaced" if existed else "saved"


def _holds(folder: Path, config: dict) -> bool:
    """Whether a folder holds a trained guider of this description, whole."""
    try:
        return read_json(folder / "config.json") == config and bool(_head(folder, config))
    except (ValueError, FileNotFoundError):
        return False


def require_replaceable(folder: Path) -> bool:
    """Whether a folder holds a trained guider. ValueError for one that holds something else."""
    if is_trained(folder):
        return True
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - {HEAD}):
        raise ValueError(f"there is a '{folder.name}' already, which is no trained guider and would be lost: choose another "
                         "name")
    return False


def _record(backbone: Guider) -> dict[str, Any]:
    """Name and identity of a network, as the folder of a guider trained on it has them."""
    return {"name": backbone.name, "output": backbone.task if backbone.task in INNER else "own",
            "fingerprint": _fingerprint(backbone), "preprocess": backbone.preprocess.to_dict()}


def _fingerprint(guider: Guider) -> str:
    """16 hex digits of a network's weights, whatever the release of its library calls them."""
    return digest(sorted(weight_digests(guider.net.state_dict()).values()))  # type: ignore[attr-defined]


def load_trained(folder: Path, output: str, find_backbone: FindBackbone) -> Guider:
    """The trained guider in a folder. ValueError for damaged files, and for a backbone that is not there or has changed."""
    config = _checked(folder, read_config(folder))
    if output != "own":
        raise ValueError(f"{folder.name} was trained on pictures and has classes only: expected the output 'own'; choose "
                         f"its backbone {bare(config['backbone']['name'])} for {output}")
    weight, bias = _head(folder, config)
    backbone = _backbone(folder.name, config["backbone"], find_backbone)
    size = _embedding_size(backbone)
    if weight.shape[1] != size:
        raise ValueError(f"{folder.name}/{HEAD} reads {weight.shape[1]} numbers, but {backbone.name} gives {size}: train it "
                         "again")
    return with_head(backbone, weight, bias, class_names(config["labels"]), folder.name)


def _checked(folder: Path, config: dict) -> dict:
    said, labels = config.get("backbone"), config.get("labels")
    if config.get(KEY) != FORMAT:
        raise ValueError(f"{folder.name}/config.json has the format {shown(config.get(KEY))}, expected {FORMAT}: it is of a "
                         "later version, or damaged; update this one, or train it again")
    if not isinstance(said, dict) or not all(is_name(said.get(key)) for key in ("name", "output", "fingerprint")):
        raise ValueError(f"{folder.name}/config.json says of the backbone {shown(said)}: expected its name, output and "
                         "fingerprint; copy the folder again")
    if not isinstance(labels, list) or not all(map(is_name, labels)) or len(labels) > MOST_CLASSES:
        raise ValueError(f"{folder.name}/config.json has the labels {shown(labels)}: expected names of classes; copy the "
                         "folder again")
    return config


def _head(folder: Path, config: dict) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of a folder."""
    shapes, count = read_description(folder / HEAD)[0], len(config["labels"])
    rows, columns = [*shapes.get("weight", ()), 0, 0][:2]
    if shapes != {"weight": (count, columns), "bias": (rows,)} or not 0 < columns <= MAX_FEATURES:
        raise ValueError(f"{folder.name}/{HEAD} has tensors of the shapes {shown(shapes)}: expected a weight and a bias "
                         f"for {count} classes; copy the folder again")
    tensors = load_tensors(folder / HEAD)[0]
    if digest(tensors) != config.get("head") or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"{folder.name}/{HEAD} is not the one that its config.json was written with: copy both again, or "
                         "train it again")
    return tensors["weight"].float(), tensors["bias"].float()


def _backbone(folder: str, said: dict, find_backbone: FindBackbone) -> Guider:
    """The network that a trained guider reads, as it read it then."""
    name = bare(said["name"])
    try:
        backbone = find_backbone(said["name"], said["output"])
        require_backbone(backbone)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder} was trained on {name}, which cannot be loaded: {error}") from error
    if said["fingerprint"] != _fingerprint(backbone):
        raise ValueError(f"{folder} was trained on another {name}: the weights of the one that is here differ; put that "
                         "network back, or train it again")
    ways = (with_input(backbone, channels, padding) for channels, padding in product(CHANNELS, PADDINGS))
    found = next((way for way in ways if way.preprocess.to_dict() == said.get("preprocess")), None)
    if found is None:
        raise ValueError(f"{folder} was trained on a {name} that reads images in another way: put its files back, or train "
                         "it again")
    return found


def _embedding_size(backbone: Guider) -> int:
    image = torch.zeros(1, 3, 64, 64, device=next(backbone.net.parameters()).device)  # type: ignore[attr-defined]
    with torch.no_grad():
        output = backbone.predict(image, clean(image))
    return output.shape[1] if output.ndim == 2 else 0
