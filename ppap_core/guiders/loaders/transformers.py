"""Networks of transformers from a local folder, each as net(image[, prompt]) -> tensor that a gradient goes through.

Written against transformers 4.50 to 5: what the two disagree about is asked of the value, not of the version.
"""
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...io.files import read_json, read_safetensors, weight_files
from ..guider import Guider, IgnoreSigma, short_labels
from ..preprocess import Preprocess, processor_preprocess

log = logging.getLogger(__name__)
METRIC = ("zoedepth", "glpn")  # depth networks that answer in metres; the others answer with what is near being large


class Network(nn.Module):
    """A model and the function that asks it: (model, image[, prompt]) -> answer."""

    def __init__(self, model: nn.Module, ask: Callable[..., Tensor]):
        super().__init__()
        self.model, self.ask = model, ask

    def forward(self, image: Tensor, *prompt: Tensor) -> Tensor:
        return self.ask(self.model, image, *prompt)


def logits(model: nn.Module, image: Tensor) -> Tensor:
    """Of classes (B, K), or of classes in each place (B, K, h, w)."""
    return model(pixel_values=image).logits


def inverse_depth(model: nn.Module, image: Tensor) -> Tensor:
    """Depth as relative networks give it, near is large, (B, 1, h, w)."""
    depth = model(pixel_values=image).predicted_depth[:, None]
    metric = getattr(model.config, "depth_estimation_type", "") == "metric" or model.config.model_type in METRIC
    return 1 / (1 + depth) if metric else depth


def semantic_logits(model: nn.Module, image: Tensor, **task: Tensor) -> Tensor:
    """Log of the share of each class in each place, (B, K, h, w): the queries' classes times their masks.

    What `post_process_semantic_segmentation` does (Cheng et al. 2021, semantic inference), with a gradient.
    """
    found = model(pixel_values=image, **task)
    kind = image.device.type  # in full, for the gradient of a small share is more than float16 can hold
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        classes = found.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = found.masks_queries_logits.float().sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", classes, masks).clamp_min(1e-6).log()


def semantic_logits_of_task(tokens: Tensor, model: nn.Module, image: Tensor) -> Tensor:
    """The same by a network that is told its task in words, (1, n) tokens."""
    return semantic_logits(model, image, task_inputs=tokens.to(image.device).expand(len(image), -1))


def embedding(model: nn.Module, image: Tensor) -> Tensor:
    """Image embedding (B, D)."""
    return model["projection"](model["vision"](pixel_values=image).pooler_output)


def embedding_of_patches(size: int, model: nn.Module, image: Tensor) -> Tensor:
    """The same by a network that takes patches of any arrangement (SigLIP 2 NaFlex)."""
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)
    grid = torch.tensor([[side // size for side in image.shape[-2:]]], device=image.device).expand(len(image), -1)
    seen = torch.ones(patches.shape[:2], dtype=torch.long, device=image.device)
    return model["projection"](model["vision"](patches, seen, grid).pooler_output)


def summary(model: nn.Module, image: Tensor) -> Tensor:
    """The first token of a vision transformer, which stands for the whole image, (B, D)."""
    return model(pixel_values=image).last_hidden_state[:, 0]


def self_similarity(model: nn.Module, image: Tensor) -> Tensor:
    """Cosine of each pair of places, (B, n, n): the structure of an image without its colours.

    Tumanyan et al. 2022, on the last layer's tokens.
    """
    others = 1 + getattr(model.config, "num_register_tokens", 0)
    tokens = F.normalize(model(pixel_values=image).last_hidden_state[:, others:], dim=-1)
    return tokens @ tokens.mT


def prompted_mask(layers: list[int], model: nn.Module, image: Tensor, prompt: Tensor) -> Tensor:
    """Logits of the mask of what a text asks for, (B, 1, h, w). CLIPSeg's own forward keeps no gradient."""
    hidden = model["vision"](pixel_values=image, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return model["decoder"]([hidden[layer + 1] for layer in layers], prompt).logits[:, None]


def score(ask: Callable[..., Tensor], model: nn.Module, image: Tensor) -> Tensor:
    """A linear head's number for the embedding, (B, 1)."""
    return model["head"](F.normalize(ask(model, image), dim=-1))


def load_transformers(folder: Path, answer: str = "own") -> Guider:
    """The guider in a folder that `save_pretrained` wrote or a hub's page offers. ValueError in words."""
    config, model = _load(folder)
    name, architecture = f"transformers/{folder.name}", config.architectures[0]
    make = partial(Guider, name, preprocess=_preprocess(folder))
    if architecture in DUAL_ENCODERS and answer in ("own", "embedding"):
        return _image_tower(make, folder, config, model)
    if answer != "own" or architecture in BACKBONES:
        return _backbone(make, model, architecture, "structure" if answer == "own" else answer)
    if architecture == "CLIPSegForImageSegmentation":
        parts = nn.ModuleDict({"vision": model.clip.vision_model, "decoder": model.decoder})
        return make(IgnoreSigma(Network(parts, partial(prompted_mask, list(model.extract_layers)))), task="mask",
                    read_text=partial(_read_text, folder, model.clip))
    task, ask = next(found for suffix, found in TASK_HEADS.items() if architecture.endswith(suffix))
    if architecture.startswith("OneFormer"):
        ask = partial(semantic_logits_of_task, _tokens_of_task(folder, config.task_seq_len))
    labels = () if task == "depth" else _labels(name, config.id2label)
    return make(IgnoreSigma(Network(model, ask)), task=task, labels=labels)


TASK_HEADS = {
    "ForImageClassification": ("class", logits), "ForDepthEstimation": ("depth", inverse_depth),
    "ForSemanticSegmentation": ("segmentation", logits), "ForUniversalSegmentation": ("segmentation", semantic_logits),
    "MaskFormerForInstanceSegmentation": ("segmentation", semantic_logits),
}
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
BACKBONES = ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "ViTModel", "ViTMSNModel")
DUAL_ENCODERS = ("CLIPModel", "SiglipModel", "Siglip2Model", "CLIPVisionModelWithProjection", "SiglipVisionModel",
          "Siglip2VisionModel")


def _load(folder: Path) -> tuple:
    """Configuration and model. Nothing is downloaded, only safetensors are read, no code of the folder is run."""
    import transformers

    said = read_json(folder / "config.json")
    architecture = (said.get("architectures") or ["none"])[0]
    known = (*DUAL_ENCODERS, "CLIPSegForImageSegmentation", *BACKBONES)
    if architecture not in known and not architecture.endswith(tuple(TASK_HEADS)):
        raise ValueError(f"{folder.name}/config.json says the architecture is {architecture}, which answers nothing that "
                         f"can guide: expected one such as ...{', ...'.join(TASK_HEADS)}, {', '.join(known)}")
    if not hasattr(transformers, architecture):
        raise ValueError(f"transformers {transformers.__version__} knows no {architecture} (from {folder.name}/config.json)"
                         ": expected one it knows; a newer transformers may have it")
    weight_files(folder)
    try:
        model, found = getattr(transformers, architecture).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder.name} cannot be loaded as {architecture} ({' '.join(str(error).split())[:200]}): "
                         "copy the folder again from the network's own page") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"the weights in {folder.name} do not fit {architecture}: {len(missing)} are missing, such as "
                         f"{missing[0]}; copy the folder again")
    return model.config, model.float().eval().requires_grad_(False)


def _preprocess(folder: Path) -> Preprocess:
    file = folder / "preprocessor_config.json"
    if file.exists():
        return processor_preprocess(read_json(file))
    if (folder / "processor_config.json").exists():
        return processor_preprocess(read_json(folder / "processor_config.json").get("image_processor", {}))
    raise FileNotFoundError(f"{folder.name} has no preprocessor_config.json: expected the file that says how large and how "
                            "bright the network wants its images; copy it from the network's own page")


def _labels(name: str, named: dict[int, str]) -> tuple[str, ...]:
    labels = [str(named.get(index, index)) for index in range(len(named))]
    if labels == [f"LABEL_{index}" for index in range(len(labels))]:
        log.warning("%s has no names for its %d classes in config.json: aim it at numbers", name, len(labels))
        return tuple(map(str, range(len(labels))))
    return short_labels(labels)


def _backbone(make: Callable[..., Guider], model: nn.Module, architecture: str, answer: str) -> Guider:
    asks = {"structure": self_similarity, "embedding": summary}
    if architecture not in BACKBONES or answer not in asks:
        raise ValueError(f"{architecture} cannot be read as {answer}: expected 'own', or 'structure' or 'embedding' of "
                         f"one of {', '.join(BACKBONES)}; style is read by timm networks")
    return make(IgnoreSigma(Network(model, asks[answer])), task=answer)


def _image_tower(make: Callable[..., Guider], folder: Path, config, model: nn.Module) -> Guider:
    """CLIP, SigLIP and SigLIP 2, with their text half if there is one; with head.safetensors an aesthetic score."""
    parts = nn.ModuleDict({"vision": getattr(model, "vision_model", model),
                           "projection": getattr(model, "visual_projection", None) or nn.Identity()})
    patches = "Siglip2" in config.architectures[0]
    ask = partial(embedding_of_patches, getattr(config, "vision_config", config).patch_size) if patches else embedding
    if (folder / "head.safetensors").exists():
        parts["head"] = linear_head(folder / "head.safetensors")
        return make(IgnoreSigma(Network(parts, partial(score, ask))), task="number")
    read_text = partial(_read_text, folder, model) if hasattr(model, "text_model") else None
    return make(IgnoreSigma(Network(parts, ask)), task="embedding", read_text=read_text)


def linear_head(file: Path) -> nn.Sequential:
    """A chain of linear layers from their weights, in the order of their numbers, as aesthetic predictors have it."""
    tensors, _ = read_safetensors(file)
    names = sorted((name.removesuffix(".weight") for name in tensors if name.endswith("weight")),
                   key=lambda name: [int(part) if part.isdecimal() else part for part in name.split(".")])
    layers = nn.Sequential()
    for name in names:
        weight, prefix = tensors.get(f"{name}.weight", tensors.get(name)), f"{name}." if f"{name}.weight" in tensors else ""
        layer = nn.Linear(weight.shape[-1], weight.shape[0])
        bias = tensors.get(f"{prefix}bias", torch.zeros(len(weight)))
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer)
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    if not sizes or sizes[-1][1] != 1 or any(a[1] != b[0] for a, b in pairwise(sizes)):
        raise ValueError(f"{file.parent.name}/{file.name} has linear layers of {sizes} inputs and outputs: expected a chain "
                         "that ends in one number")
    return layers


@torch.no_grad()
def _read_text(folder: Path, model: nn.Module, text: str) -> Tensor:
    """The embedding of a text, (1, D)."""
    length, padded = model.config.text_config.max_position_embeddings, "siglip" in model.config.model_type
    tokens = _tokens(folder, text, length, padded)
    found = model.get_text_features(input_ids=tokens["input_ids"])  # without a mask: SigLIP was trained to read its padding
    return found if isinstance(found, Tensor) else found.pooler_output


def _tokens_of_task(folder: Path, length: int) -> Tensor:
    """What OneFormer is told, (1, length)."""
    tokens = _tokens(folder, "the task is semantic", length, padded=True)
    return tokens["input_ids"] * tokens["attention_mask"]


def _tokens(folder: Path, text: str, length: int, padded: bool) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZERS):  # transformers 5 would make one that knows no word
        raise FileNotFoundError(f"{folder.name} has no tokenizer: expected one of {', '.join(TOKENIZERS)}; copy the "
                                "tokenizer's files from the network's own page")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the tokenizer in {folder.name} cannot be read ({' '.join(str(error).split())[:150]}): copy its "
                         "files again from the network's own page") from error
    return tokenizer([text], padding="max_length" if padded else False, truncation=True, max_length=length,
                     return_tensors="pt", return_attention_mask=True)
