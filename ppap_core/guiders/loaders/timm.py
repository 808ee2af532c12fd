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

from ...io.files import read_json, read_safetensors, weight_files
from ..guider import Guider, IgnoreSigma, short_labels
from ..preprocess import timm_preprocess

log = logging.getLogger(__name__)

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
    net, config = _load(folder)
    guider = partial(Guider, f"timm/{folder.name}", preprocess=timm_preprocess(_data_config(config, net)))
    if output == "own" and net.num_classes > 0:
        return guider(IgnoreSigma(net), task="class", labels=_labels(folder.name, config, net))
    if output in ("own", "embedding"):
        return guider(IgnoreSigma(Embedding(net)), task="embedding")
    return guider(IgnoreSigma(Features(_feature_maps(net, config["architecture"], output), FEATURES[output])), task=output)


def _feature_maps(net: Any, architecture: str, output: str) -> nn.Module:
    if architecture.startswith("vgg"):
        return VggFeatures(net.features)
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{architecture} shows timm no inner maps, which {output} is read from: expected another "
                         "network, such as vgg19 for style or a vision transformer for structure")
    fine = [index for index, layer in enumerate(net.feature_info) if layer["reduction"] <= FINE_STRIDE]
    return IntermediateFeatures(net, fine if output == "style" else [len(net.feature_info) - 1])


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"this guider needs the package timm ({error}): install it with 'pip install timm>=1.0.15'"
                          ) from error

    config = read_json(folder / "config.json")
    architecture = config.get("architecture") or ""
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} knows no architecture {config.get('architecture')!r} (from "
                         f"{folder.name}/config.json): expected one of timm.list_models(); a newer timm may have it")
    options = {"num_classes": config.get("num_classes", 1000)} | config.get("model_args", {})
    foreign = [name for name in inspect.signature(timm.create_model).parameters if name in options]
    if foreign:  # checkpoint_path may be a pickle, pretrained downloads
        raise ValueError(f"model_args in {folder.name}/config.json holds {foreign[0]}, which is no setting of the network: "
                         "take it out; the weights are those of model.safetensors, whatever it says")
    net = timm.create_model(architecture, pretrained=False, **options)
    _load_weights(net, folder, architecture)
    return net, config


def _load_weights(net: nn.Module, folder: Path, architecture: str) -> None:
    weights = {name: tensor for file in weight_files(folder) for name, tensor in read_safetensors(file)[0].items()}
    own = net.state_dict()
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"{folder.name}/model.safetensors does not fit {architecture}: {wrong[0]} is "
                         f"{tuple(weights[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}; copy the folder again")
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"{folder.name}/model.safetensors does not fit {architecture}: {len(missing)} weights are missing "
                         f"and {len(unexpected)} unexpected, such as {(missing + unexpected)[0]}; copy the folder again")


def _data_config(config: Mapping[str, Any], net: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_data_config

    data = resolve_data_config(config.get("pretrained_cfg", {}), model=net)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)  # the file may say that of the network it came from
    return data | {"input_size": (3, *size)} if size else data


def _labels(name: str, config: Mapping[str, Any], net: Any) -> tuple[str, ...]:
    """The folder's own names, else those of ImageNet if the network was trained on it, else numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    labels = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if labels:
        return short_labels(labels)
    subset = infer_imagenet_subset(net)
    if subset:
        return short_labels(list(ImageNetInfo(subset).label_descriptions()))
    log.warning("%s has no names for its %d classes in config.json: aim it at numbers", name, net.num_classes)
    return tuple(map(str, range(net.num_classes)))
