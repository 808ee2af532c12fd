"""Networks of timm from a local folder: the class of an image, its style, its structure, or its embedding."""
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...io.packages import importing
from ..guider import Guider, IgnoreSigma, with_input
from ..preprocess import timm_preprocess
from .contents import read_config
from .labels import TAGS_FILE, Head, imagenet_labels, read_head
from .offline import offline
from .timm_layouts import best_layout, without_tables
from .weights import Loaded, no_larger_than, read_weights, require_unused, tensors_without_weights

log = logging.getLogger(__name__)

LABEL_KEYS = ("label_names", "labels", "id2label", "label2id")  # of config.json, in the order in which they count
FINE_STRIDE = 16  # layers with at most so many pixels between two places show textures


class IntermediateFeatures(nn.Module):
    """Feature maps of some layers, without the layers after them: image -> [(B, C, h, w)]."""

    def __init__(self, net: Any, layers: list[int]):
        super().__init__()
        self.net, self.layers = net, layers
        net.prune_intermediate_layers(layers)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.net.forward_intermediates(image, indices=self.layers, intermediates_only=True, output_fmt="NCHW")


class VggFeatures(nn.Module):
    """VGG features, which not every release of timm shows: the input of every max-pool, image -> [(B, C, h, w)]."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(image)
            image = layer(image)
        return maps


class Features(nn.Module):
    """A function of a network's feature maps."""

    def __init__(self, maps: nn.Module, read: Callable[[list[Tensor]], Tensor]):
        super().__init__()
        self.maps, self.read = maps, read

    def forward(self, image: Tensor) -> Tensor:
        return self.read(self.maps(image))


class Embedding(nn.Module):
    """A network up to the vector that its head reads, (B, D)."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(image), pre_logits=True)


def gram(maps: Sequence[Tensor]) -> Tensor:
    """Gram matrices of all layers, (B, n): which features occur together, wherever they are.

    Gatys et al. 2016, with features of unit length, and scaled so that every layer counts alike.
    """
    blocks = []
    for layer in maps:
        features = F.normalize(layer.flatten(2), dim=1)
        blocks.append((features @ features.mT).flatten(1) * (features.shape[1] / features.shape[2]))
    total = sum(block.shape[1] for block in blocks)
    return torch.cat([block * (total / (len(blocks) * block.shape[1])) ** 0.5 for block in blocks], dim=1)


def self_similarity(maps: Sequence[Tensor]) -> Tensor:
    """Cosine of each pair of places of the last layer, (B, n, n): the structure of an image without its colours."""
    places = F.normalize(maps[-1].flatten(2), dim=1)
    return places.mT @ places


FEATURES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"style": gram, "structure": self_similarity}
"""Task -> function of feature maps."""


def load_timm(folder: Path, output: str = "own") -> Guider:
    """A guider of a timm network saved with config.json and safetensors, as its model cards and `save_for_hf` write them.

    output: "own" is its classes, or its embedding if it has none; "embedding", "style" or "structure" are read inside it.
    ValueError or FileNotFoundError for a folder that does not fit, and where the network has no such output.
    """
    (net, missing), config = _load(folder)
    guider = _guider(folder, net, config, output)
    require_unused(guider, missing, _misfit(folder, config["architecture"]))
    return guider


def _guider(folder: Path, net: Any, config: dict[str, Any], output: str) -> Guider:
    guider = partial(Guider, f"timm/{folder.name}", preprocess=timm_preprocess(_data_config(folder, config, net)))
    if output == "own" and net.num_classes > 0:
        head = _head(folder, config, net.num_classes)
        own = guider(IgnoreSigma(net), task=head.task, labels=head.labels)
        return _as_taggers_read(own) if (folder / TAGS_FILE).exists() else own
    if output in ("own", "embedding"):
        return guider(IgnoreSigma(Embedding(net)), task="embedding")
    return guider(IgnoreSigma(Features(_feature_maps(net, config["architecture"], output), FEATURES[output])), task=output)


def _as_taggers_read(guider: Guider) -> Guider:
    """The guider reading images as those taggers do whose tags are in a table; their config.json does not say it."""
    log.info("%s is read blue first, and made square with white around it, as taggers with a %s are", guider.name, TAGS_FILE)
    return with_input(guider, "blue first", "white")


def _feature_maps(net: Any, architecture: str, output: str) -> nn.Module:
    if architecture.startswith("vgg"):
        return VggFeatures(net.features)
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{architecture} shows timm no inner maps, which {output} is read from: expected another "
                         "network, such as vgg19 for style or a vision transformer for structure")
    fine = [index for index, layer in enumerate(net.feature_info) if layer["reduction"] <= FINE_STRIDE]
    return IntermediateFeatures(net, fine if output == "style" else [len(net.feature_info) - 1])


def check_timm(folder: Path, name: str) -> None:
    """Refuse a network by its config.json in a folder. name: of the folder or repository, for sentences.

    ImportError without timm; ValueError for an architecture that it does not know, or settings that are none.
    """
    _architecture(read_config(folder), name)


def _architecture(config: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """The name of an architecture and its settings."""
    with importing("timm", "this guider needs", "timm>=1.0.15"):
        import timm
    architecture = config.get("architecture") or ""
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} knows no architecture {config.get('architecture')!r} (from "
                         f"{name}/config.json): expected one of timm.list_models(); a newer timm may have it")
    classes = {"num_classes": 1000, **_pretrained(config), **config}
    options = {"num_classes": classes["num_classes"]} | (config.get("model_args") or {})
    foreign = [option for option in inspect.signature(timm.create_model).parameters if option in options]
    if foreign:  # checkpoint_path may be a pickle, pretrained downloads
        raise ValueError(f"model_args in {name}/config.json holds {foreign[0]}, which is no setting of the network: "
                         "take it out; the weights are those of model.safetensors, whatever it says")
    return architecture, options


def _load(folder: Path) -> tuple[Loaded, dict[str, Any]]:
    config = read_config(folder)
    architecture, options = _architecture(config, folder.name)
    import timm

    weights = read_weights(folder)
    try:
        with offline(), no_larger_than(weights):
            net = timm.create_model(architecture, pretrained=False, **options)
    except Exception as error:  # of each architecture another one
        raise ValueError(f"{folder.name}/config.json describes a network that timm {timm.__version__} cannot make of "
                         f"{architecture} ({' '.join(str(error).split())[:200]}): copy the folder again; another timm may "
                         "make it") from error
    return Loaded(net, _load_weights(net, weights, folder, architecture)), config


def _load_weights(net: Any, saved: dict[str, Tensor], folder: Path, architecture: str) -> dict[str, Tensor]:
    """Fill a network with what a folder holds, and return its tensors that the files do not hold."""
    weights = best_layout(net, saved, architecture)
    if weights.keys() != without_tables(net, saved).keys():
        log.warning("%s: the names of its weights are of another layout; they were changed to timm's of today", folder.name)
    own = net.state_dict()
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"{_misfit(folder, architecture)}: {wrong[0]} is {tuple(weights[wrong[0]].shape)}, expected "
                         f"{tuple(own[wrong[0]].shape)}; copy the folder again")
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if unexpected:
        raise ValueError(f"{_misfit(folder, architecture)}: {len(missing)} weights are missing and {len(unexpected)} "
                         f"unexpected, such as {(missing + unexpected)[0]}; copy the folder again")
    return tensors_without_weights(net, missing)


def _misfit(folder: Path, architecture: str) -> str:
    return f"{folder.name}/model.safetensors does not fit {architecture}"


def _data_config(folder: Path, config: Mapping[str, Any], net: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_data_config

    try:
        data = resolve_data_config({**config, **_pretrained(config)}, model=net)  # old files have it all at the top
    except Exception as error:  # of any kind, and without words: timm trusts its files
        raise ValueError(f"{folder.name}/config.json says of images what timm cannot read ({type(error).__name__}: "
                         f"{str(error)[:150]}): copy the folder again") from error
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)  # the file may say that of the network it came from
    return data | {"input_size": (3, *size)} if size else data


def _pretrained(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.get("pretrained_cfg") or {}


def _head(folder: Path, config: Mapping[str, Any], count: int) -> Head:
    """The folder's own names, else those of ImageNet if the network was trained on it, else numbers."""
    said = {**_pretrained(config), **{key: value for key, value in config.items() if value}}
    names, descriptions = next(filter(None, map(said.get, LABEL_KEYS)), None), said.get("label_descriptions")
    if not names and not descriptions:
        names = imagenet_labels(folder.name, said, count)
    return read_head(folder, count, said.get("problem_type"), names, descriptions)
