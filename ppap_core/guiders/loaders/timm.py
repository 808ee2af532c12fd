"""Networks of timm from a local folder: what class an image is of, or its style, its structure, its embedding."""
import inspect
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...io.files import read_json, read_safetensors, weight_files
from ..guider import Guider, IgnoreSigma, short_labels
from ..preprocess import timm_preprocess

log = logging.getLogger(__name__)


class IntermediateFeatures(nn.Module):
    """Some of a network's inner maps, without what comes after them: image -> [(B, C, h, w)]."""

    def __init__(self, net: nn.Module, layers: list[int]):
        super().__init__()
        self.net, self.layers = net, layers
        net.prune_intermediate_layers(layers)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.net.forward_intermediates(image, indices=self.layers, intermediates_only=True, output_fmt="NCHW")


class VggFeatures(nn.Module):
    """The same for a network that is one chain of layers (VGG), which not every timm shows: what each pooling is given."""

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
    """What is made of a network's inner maps."""

    def __init__(self, maps: nn.Module, read: Callable[[list[Tensor]], Tensor]):
        super().__init__()
        self.maps, self.read = maps, read

    def forward(self, image: Tensor) -> Tensor:
        return self.read(self.maps(image))


class Embedding(nn.Module):
    """A network up to the vector that its head would read."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(image), pre_logits=True)


def gram(maps: list[Tensor]) -> Tensor:
    """Which features occur together, wherever they are: the Gram matrices of all layers, (B, n).

    Gatys et al. 2016, of features of unit length, and so that every layer counts alike.
    """
    blocks = []
    for each in maps:
        features = F.normalize(each.flatten(2), dim=1)
        blocks.append((features @ features.mT).flatten(1) * (features.shape[1] / features.shape[2]))
    total = sum(block.shape[1] for block in blocks)
    return torch.cat([block * (total / (len(blocks) * block.shape[1])) ** 0.5 for block in blocks], dim=1)


def self_similarity(maps: list[Tensor]) -> Tensor:
    """Cosine of each pair of places of the last layer, (B, n, n): the structure of an image without its colours."""
    places = F.normalize(maps[-1].flatten(2), dim=1)
    return places.mT @ places


def load_timm(folder: Path, answer: str = "own") -> Guider:
    """A timm network saved with config.json and safetensors, as its model cards and `save_for_hf` write them."""
    net, config = _load(folder)
    data = _data_config(config, net)
    make = partial(Guider, f"timm/{folder.name}", preprocess=timm_preprocess(data))
    if answer == "own" and net.num_classes > 0:
        return make(IgnoreSigma(net), task="class", labels=_labels(folder.name, config, net))
    if answer in ("own", "embedding"):
        return make(IgnoreSigma(Embedding(net)), task="embedding")
    read = gram if answer == "style" else self_similarity
    if config["architecture"].startswith("vgg"):
        return make(IgnoreSigma(Features(VggFeatures(net.features), read)), task=answer)
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{config['architecture']} shows timm no inner maps, which {answer} is read from: expected another "
                         "network, such as vgg19 for style or a vision transformer for structure")
    fine = [index for index, about in enumerate(net.feature_info) if about["reduction"] <= 16]
    layers = fine if answer == "style" else [len(net.feature_info) - 1]
    return make(IgnoreSigma(Features(IntermediateFeatures(net, layers), read)), task=answer)


def _load(folder: Path) -> tuple[nn.Module, dict]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"this guider needs the package timm ({error}): install it with 'pip install timm>=1.0.15'"
                          ) from error

    config = read_json(folder / "config.json")
    architecture = config.get("architecture")
    if not timm.is_model(architecture or ""):
        raise ValueError(f"timm {timm.__version__} knows no architecture {architecture!r} (from {folder.name}/config.json): "
                         "expected one of timm.list_models(); a newer timm may have it")
    args = {"num_classes": config.get("num_classes", 1000)} | config.get("model_args", {})
    strange = [name for name in inspect.signature(timm.create_model).parameters if name in args]
    if strange:  # checkpoint_path may be a pickle, pretrained downloads
        raise ValueError(f"model_args in {folder.name}/config.json holds {strange[0]}, which is no setting of the network: "
                         "take it out; the weights are those of model.safetensors, whatever it says")
    net = timm.create_model(architecture, pretrained=False, **args)
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
    return net, config


def _data_config(config: dict, net: nn.Module) -> dict:
    from timm.data import resolve_data_config

    data = resolve_data_config(config.get("pretrained_cfg", {}), model=net)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)  # the file may say that of the network it came from
    return data | {"input_size": (3, *size)} if size else data


def _labels(name: str, config: dict, net: nn.Module) -> tuple[str, ...]:
    """The folder's own names, those of ImageNet where the network is of it, or numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    labels = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if labels:
        return short_labels(labels)
    subset = infer_imagenet_subset(net)
    if subset:
        return short_labels(ImageNetInfo(subset).label_descriptions())
    log.warning("%s has no names for its %d classes in config.json: aim it at numbers", name, net.num_classes)
    return tuple(map(str, range(net.num_classes)))
