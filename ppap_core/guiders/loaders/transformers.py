"""Guiders of transformers' networks from a local folder.

Written against transformers 4.50 to 5: where the two differ, the loaded object is asked, not the version.
"""
import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...io.files import read_json, read_safetensors
from ...io.packages import importing
from ...io.values import bare, shown
from ..guider import Guider, IgnoreSigma
from ..preprocess import Preprocess
from ..processor_config import processor_preprocess
from .contents import read_config
from .labels import Head, class_labels, read_head
from .offline import settled
from .texts import read_text, task_tokens, text_features, text_model
from .transformers_outputs import (
    ForwardFn,
    ForwardNet,
    cls_token,
    head_score,
    image_embedding,
    inverse_depth,
    logits,
    naflex_embedding,
    prompted_mask,
    self_similarity,
    semantic_logits,
    task_semantic_logits,
)
from .transformers_weights import load_model, misfit
from .weights import require_unused

log = logging.getLogger(__name__)

TASK_HEADS: dict[str, tuple[str, ForwardFn]] = {
    "ForImageClassification": ("class", logits), "ForImageClassificationWithTeacher": ("class", logits),
    "ForDepthEstimation": ("depth", inverse_depth),
    "ForSemanticSegmentation": ("segmentation", logits), "ForUniversalSegmentation": ("segmentation", semantic_logits),
    "MaskFormerForInstanceSegmentation": ("segmentation", semantic_logits),
}
"""How the name of an architecture ends -> its task and its output; some outputs make it another task: see `_head`."""
DUAL_ENCODERS = ("CLIPModel", "SiglipModel", "Siglip2Model", "CLIPVisionModelWithProjection", "SiglipVisionModel",
                 "Siglip2VisionModel")
BACKBONES = ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "ViTModel", "ViTMSNModel")
BACKBONE_OUTPUTS: dict[str, ForwardFn] = {"structure": self_similarity, "embedding": cls_token}
PROMPTED = "CLIPSegForImageSegmentation"

MakeGuider = Callable[..., Guider]
"""`Guider` without the name and the preprocessing, which depend on the folder alone."""


def load_transformers(folder: Path, output: str = "own") -> Guider:
    """A guider of a folder that `save_pretrained` wrote or a page of the hub offers.

    output: "own" is what the network was made to predict; "structure" or "embedding" are read inside it. ValueError or
    FileNotFoundError for a folder that does not fit, and where the network has no such output.
    """
    architecture = _architecture(read_config(folder), folder.name)
    model, missing = load_model(folder, architecture)
    guider = _guider(folder, model, architecture, output)
    text = partial(text_features, text_model(model), torch.zeros(1, 1, dtype=torch.long)) if guider.read_text else None
    require_unused(guider, missing, misfit(folder, architecture), text)
    return guider


def _guider(folder: Path, model: Any, architecture: str, output: str) -> Guider:
    guider = partial(Guider, f"transformers/{folder.name}", preprocess=_preprocess(folder))
    if architecture in DUAL_ENCODERS and output in ("own", "embedding"):
        return _dual_encoder(guider, folder, model)
    if output != "own" or architecture in BACKBONES:
        return _backbone(guider, model, architecture, "structure" if output == "own" else output)
    if architecture == PROMPTED:
        return _prompted(guider, folder, model)
    return _with_task_head(guider, folder, model, architecture)


def _dual_encoder(guider: MakeGuider, folder: Path, model: Any) -> Guider:
    """CLIP, SigLIP and SigLIP 2, with their text half if there is one; with head.safetensors an aesthetic score."""
    parts = nn.ModuleDict({"vision": getattr(model, "vision_model", model),
                           "projection": getattr(model, "visual_projection", None) or nn.Identity()})
    embed: ForwardFn = image_embedding
    if "Siglip2" in model.config.architectures[0]:
        embed = partial(naflex_embedding, getattr(model.config, "vision_config", model.config).patch_size)
    if (folder / "head.safetensors").exists():
        parts["head"] = linear_head(folder / "head.safetensors")
        return guider(IgnoreSigma(ForwardNet(parts, partial(head_score, embed))), task="number")
    reader = partial(read_text, folder, model) if hasattr(model, "text_model") else None
    return guider(IgnoreSigma(ForwardNet(parts, embed)), task="embedding", read_text=reader)


def _backbone(guider: MakeGuider, model: Any, architecture: str, output: str) -> Guider:
    if architecture not in BACKBONES or output not in BACKBONE_OUTPUTS:
        raise ValueError(f"{architecture} cannot be read as {output}: expected 'own', or 'structure' or 'embedding' of "
                         f"one of {', '.join(BACKBONES)}; style is read by timm networks")
    return guider(IgnoreSigma(ForwardNet(model, BACKBONE_OUTPUTS[output])), task=output)


def _prompted(guider: MakeGuider, folder: Path, model: Any) -> Guider:
    parts = nn.ModuleDict({"vision": model.clip.vision_model, "decoder": model.decoder})
    net = ForwardNet(parts, partial(prompted_mask, list(model.extract_layers)))
    return guider(IgnoreSigma(net), task="mask", read_text=partial(read_text, folder, model.clip))


def _with_task_head(guider: MakeGuider, folder: Path, model: Any, architecture: str) -> Guider:
    task, forward_fn = next(head for suffix, head in TASK_HEADS.items() if architecture.endswith(suffix))
    if architecture.startswith("OneFormer"):
        forward_fn = partial(task_semantic_logits, task_tokens(folder, model.config.task_seq_len))
    head = _head(folder, model.config.num_labels, task)
    return guider(IgnoreSigma(ForwardNet(model, forward_fn)), task=head.task, labels=head.labels)


def _head(folder: Path, count: int, task: str) -> Head:
    """Task and labels of a network by its outputs: one segment is a mask, one number of a classifier is no class."""
    said = read_config(folder)
    if task == "class":
        return read_head(folder, count, said.get("problem_type"), _names(folder.name, said))
    if task == "segmentation" and count > 1:
        return Head(task, class_labels(folder.name, count, _names(folder.name, said)))
    return Head("mask" if task == "segmentation" else task, ())


def _names(folder: str, said: Mapping[str, Any]) -> Mapping[Any, Any] | None:
    """Names of the classes as config.json has them; the log says where it contradicts itself."""
    names, index_of = said.get("id2label"), said.get("label2id")
    if not isinstance(names, Mapping) or not isinstance(index_of, Mapping):
        return names or index_of
    made_up = all(name == f"LABEL_{index}" for index, name in names.items())
    wrong = [name for index, name in names.items()
             if str(index_of.get(name, index)) != str(index) and list(names.values()).count(name) == 1]
    if wrong and not made_up:
        log.warning("%s/config.json contradicts itself: %s is class %s in label2id but not in id2label, which counts",
                    folder, wrong[0], index_of[wrong[0]])
    return index_of if made_up else names


def check_transformers(folder: Path, name: str) -> None:
    """Refuse a network by the small files in a folder. name: of the folder or repository, for sentences.

    ImportError without transformers; ValueError or FileNotFoundError for what cannot guide, whatever its weights are.
    """
    config = read_config(folder)
    _architecture(config, name)
    settled(config, name)
    _preprocess(folder, name)


def _architecture(config: Mapping[str, Any], name: str) -> str:
    with importing("transformers", "this guider needs", "transformers>=4.50.3"):
        import transformers
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "none"
    supported = (*DUAL_ENCODERS, PROMPTED, *BACKBONES)
    if architecture not in supported and not architecture.endswith(tuple(TASK_HEADS)):
        raise ValueError(f"{name}/config.json says the architecture is {bare(architecture)}, which answers nothing that "
                         f"can guide: expected one such as ...{', ...'.join(TASK_HEADS)}, {', '.join(supported)}")
    with importing("transformers", f"{architecture} needs", "transformers>=4.50.3"):  # only now is its module imported
        known = hasattr(transformers, architecture)
    if not known:
        raise ValueError(f"transformers {transformers.__version__} knows no {architecture} (from {name}/config.json)"
                         ": expected one it knows; a newer transformers may have it")
    if quantization := config.get("quantization_config"):
        method = shown(quantization.get("quant_method") if isinstance(quantization, dict) else quantization)
        raise ValueError(f"the weights of {name} are quantised ({method}), and no gradient passes through them: expected "
                         "plain numbers; choose the network that they were made from")
    return architecture


def _preprocess(folder: Path, name: str = "") -> Preprocess:
    file = folder / "preprocessor_config.json"
    if file.exists():
        return processor_preprocess(read_json(file))
    if (folder / "processor_config.json").exists():
        return processor_preprocess(read_json(folder / "processor_config.json").get("image_processor", {}))
    raise FileNotFoundError(f"{name or folder.name} has no preprocessor_config.json: expected the file that says how large "
                            "and how bright the network wants its images; copy it from the network's own page")


def linear_head(file: Path) -> nn.Sequential:
    """A chain of linear layers from their weights alone, in the order of their numbers, as aesthetic predictors save it.

    ValueError for weights that are no chain ending in one number.
    """
    tensors, _ = read_safetensors(file)
    names = sorted((name for name in tensors if name.endswith("weight")), key=_numeric_key)
    if wrong := [name for name in names if not _is_linear(tensors, name)]:
        raise ValueError(f"{file.parent.name}/{file.name} has the weight {bare(wrong[0])} of shape "
                         f"{tuple(tensors[wrong[0]].shape)}: expected matrices of linear layers, with a bias for each row")
    layers = [_linear(tensors, name) for name in names]
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    if not sizes or sizes[-1][1] != 1 or any(a[1] != b[0] for a, b in pairwise(sizes)):
        raise ValueError(f"{file.parent.name}/{file.name} has linear layers of {sizes} inputs and outputs: expected a chain "
                         "that ends in one number")
    return nn.Sequential(*layers)


def _numeric_key(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in name.removesuffix(".weight").split(".")]


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _is_linear(tensors: Mapping[str, Tensor], name: str) -> bool:
    weight = tensors[name]
    return weight.ndim == 2 and weight.numel() > 0 and tensors.get(_bias_of(name), weight[:, 0]).shape == weight.shape[:1]


def _linear(tensors: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight = tensors[name].float()
    bias = tensors.get(_bias_of(name), torch.zeros(len(weight)))
    layer = nn.Linear(weight.shape[-1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias.float()})
    return layer
