"""Networks of transformers from a local folder, each as net(image[, prompt]) -> tensor that a gradient passes through.

Written against transformers 4.50 to 5: where the two differ, the loaded object is asked, not the version.
"""
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...io.files import read_json, read_safetensors, write_json
from ...io.packages import importing, release
from ..guider import Guider, IgnoreSigma
from ..preprocess import Preprocess, processor_preprocess
from ..resize import without_autocast
from .labels import Head, class_labels, count_labels, read_head
from .offline import offline, settled
from .weights import Loaded, read_weights, require_unused, tensors_without_weights, unwrapped

log = logging.getLogger(__name__)

METRIC_DEPTH = ("zoedepth", "glpn", "tipsv2_dpt")  # model types whose depth is in metres; that of all others is inverse
SMALLEST_SHARE = 1e-6  # of a class in a place, before its logarithm

ForwardFn = Callable[..., Tensor]
"""(model, image (B, 3, H, W)[, prompt (B, D)]) -> output"""


class ForwardNet(nn.Module):
    """A model with the function that calls it."""

    def __init__(self, model: nn.Module, forward_fn: ForwardFn):
        super().__init__()
        self.model, self.forward_fn = model, forward_fn

    def forward(self, image: Tensor, *prompt: Tensor) -> Tensor:
        return self.forward_fn(self.model, image, *prompt)

    def names_in_files(self) -> dict[str, str]:
        """Return the names that the weights have in files, and had in the network before transformers 5, by their own."""
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers 4, which names them as files do
            return {}
        model: Any = self.model
        own = list(model.state_dict())
        try:
            found = revert_weight_conversion(model, {name: torch.tensor([i]) for i, name in enumerate(own)})
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError):  # values would change as well
            return {}
        return {f"model.{own[int(index)]}": f"model.{name}" for name, index in found.items()}


def logits(model: Any, image: Tensor) -> Tensor:
    """Logits of classes (B, K), or of classes in each place (B, K, h, w)."""
    return model(pixel_values=image).logits


def inverse_depth(model: Any, image: Tensor) -> Tensor:
    """Depth as relative networks predict it, near is large, (B, 1, h, w)."""
    depth = model(pixel_values=image).predicted_depth[:, None]
    metric = getattr(model.config, "depth_estimation_type", "") == "metric" or model.config.model_type in METRIC_DEPTH
    return 1 / (1 + depth) if metric else depth


def semantic_logits(model: Any, image: Tensor, **task: Tensor) -> Tensor:
    """Log of the share of each class in each place, (B, K, h, w): class probabilities of the queries times their masks.

    Semantic inference (Cheng et al. 2021), as `post_process_semantic_segmentation` does it, with a gradient. A single class,
    with nothing to compare its share to, has the logit of being marked by any query instead.
    """
    output = model(pixel_values=image, **task)
    with without_autocast(image.device.type):  # float16 cannot hold the gradient of a small share
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = output.masks_queries_logits.float().sigmoid()
        if classes.shape[-1] == 1:
            absent = (1 - classes[..., None] * masks).clamp_min(SMALLEST_SHARE).log().sum(1, keepdim=True)
            return (-absent.expm1()).clamp_min(SMALLEST_SHARE).log() - absent
        return torch.einsum("bqk,bqhw->bkhw", classes, masks).clamp_min(SMALLEST_SHARE).log()


def task_semantic_logits(tokens: Tensor, model: Any, image: Tensor) -> Tensor:
    """`semantic_logits` of a network that is given its task in words, as tokens (1, n)."""
    return semantic_logits(model, image, task_inputs=tokens.to(image.device).expand(len(image), -1))


def image_embedding(model: Any, image: Tensor) -> Tensor:
    """Embedding of the image half of a dual encoder, (B, D)."""
    return model["projection"](model["vision"](pixel_values=image).pooler_output)


def naflex_embedding(patch: int, model: Any, image: Tensor) -> Tensor:
    """Image embedding (B, D) of a network that takes patches in any arrangement (SigLIP 2 NaFlex)."""
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
    grid = torch.tensor([[side // patch for side in image.shape[-2:]]], device=image.device).expand(len(image), -1)
    present = torch.ones(patches.shape[:2], dtype=torch.long, device=image.device)
    return model["projection"](model["vision"](patches, present, grid).pooler_output)


def cls_token(model: Any, image: Tensor) -> Tensor:
    """First token of a vision transformer, which stands for the whole image, (B, D)."""
    return model(pixel_values=image).last_hidden_state[:, 0]


def self_similarity(model: Any, image: Tensor) -> Tensor:
    """Cosine of each pair of patch tokens, (B, n, n): the structure of an image without its colours.

    Tumanyan et al. 2022, on the tokens of the last layer.
    """
    first_patch = 1 + getattr(model.config, "num_register_tokens", 0)
    tokens = F.normalize(model(pixel_values=image).last_hidden_state[:, first_patch:], dim=-1)
    return tokens @ tokens.mT


def prompted_mask(layers: list[int], model: Any, image: Tensor, prompt: Tensor) -> Tensor:
    """Mask logits (B, 1, h, w) for the embedding of a text (B, D). CLIPSeg's own forward keeps no gradient."""
    hidden = model["vision"](pixel_values=image, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return model["decoder"]([hidden[layer + 1] for layer in layers], prompt).logits[:, None]


def head_score(embed: ForwardFn, model: Any, image: Tensor) -> Tensor:
    """Number that a head gives to the normalised embedding, (B, 1)."""
    return model["head"](F.normalize(embed(model, image), dim=-1))


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
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")

MakeGuider = Callable[..., Guider]
"""`Guider` without the name and the preprocessing, which depend on the folder alone."""


def load_transformers(folder: Path, output: str = "own") -> Guider:
    """A guider of a folder that `save_pretrained` wrote or a page of the hub offers.

    output: "own" is what the network was made to predict; "structure" or "embedding" are read inside it. ValueError or
    FileNotFoundError for a folder that does not fit, and where the network has no such output.
    """
    model, missing = _load(folder)
    architecture = read_json(folder / "config.json")["architectures"][0]
    guider = _guider(folder, model, architecture, output)
    text = partial(_text_features, _text_model(model), torch.zeros(1, 1, dtype=torch.long)) if guider.read_text else None
    require_unused(guider, missing, _misfit(folder, architecture), text)
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
    read_text = partial(_read_text, folder, model) if hasattr(model, "text_model") else None
    return guider(IgnoreSigma(ForwardNet(parts, embed)), task="embedding", read_text=read_text)


def _backbone(guider: MakeGuider, model: Any, architecture: str, output: str) -> Guider:
    if architecture not in BACKBONES or output not in BACKBONE_OUTPUTS:
        raise ValueError(f"{architecture} cannot be read as {output}: expected 'own', or 'structure' or 'embedding' of "
                         f"one of {', '.join(BACKBONES)}; style is read by timm networks")
    return guider(IgnoreSigma(ForwardNet(model, BACKBONE_OUTPUTS[output])), task=output)


def _prompted(guider: MakeGuider, folder: Path, model: Any) -> Guider:
    parts = nn.ModuleDict({"vision": model.clip.vision_model, "decoder": model.decoder})
    net = ForwardNet(parts, partial(prompted_mask, list(model.extract_layers)))
    return guider(IgnoreSigma(net), task="mask", read_text=partial(_read_text, folder, model.clip))


def _with_task_head(guider: MakeGuider, folder: Path, model: Any, architecture: str) -> Guider:
    task, forward_fn = next(head for suffix, head in TASK_HEADS.items() if architecture.endswith(suffix))
    if architecture.startswith("OneFormer"):
        forward_fn = partial(task_semantic_logits, _task_tokens(folder, model.config.task_seq_len))
    head = _head(folder, model.config.num_labels, task)
    return guider(IgnoreSigma(ForwardNet(model, forward_fn)), task=head.task, labels=head.labels)


def _head(folder: Path, count: int, task: str) -> Head:
    """Task and labels of a network by its outputs: one segment is a mask, one number of a classifier is no class."""
    said = read_json(folder / "config.json")
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
    config = read_json(folder / "config.json")
    _architecture(config, name)
    settled(config, name)
    _preprocess(folder, name)


def _architecture(config: Mapping[str, Any], name: str) -> str:
    with importing("transformers", "this guider needs", "transformers>=4.50.3"):
        import transformers
    architecture = (config.get("architectures") or ["none"])[0]
    supported = (*DUAL_ENCODERS, PROMPTED, *BACKBONES)
    if architecture not in supported and not architecture.endswith(tuple(TASK_HEADS)):
        raise ValueError(f"{name}/config.json says the architecture is {architecture}, which answers nothing that "
                         f"can guide: expected one such as ...{', ...'.join(TASK_HEADS)}, {', '.join(supported)}")
    with importing("transformers", f"{architecture} needs", "transformers>=4.50.3"):  # only now is its module imported
        known = hasattr(transformers, architecture)
    if not known:
        raise ValueError(f"transformers {transformers.__version__} knows no {architecture} (from {name}/config.json)"
                         ": expected one it knows; a newer transformers may have it")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"the weights of {name} are quantised ({method}), and no gradient passes through them: expected "
                         "plain numbers; choose the network that they were made from")
    return architecture


def _load(folder: Path) -> Loaded:
    """The frozen model. Nothing is downloaded, only safetensors are read, no code of the folder is run."""
    said = read_json(folder / "config.json")
    architecture, config = _architecture(said, folder.name), settled(said, folder.name)
    weights = read_weights(folder)
    try:
        with offline():
            model, loading = _with_all_labels(architecture, _config(architecture, config), weights)
    except ImportError as error:  # a part of the network is of another package
        raise ImportError(f"{folder.name} needs a package that is missing, or that does not fit "
                          f"{release('transformers')}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # each release and each architecture has errors of its own
        raise ValueError(f"{folder.name} cannot be loaded as {architecture} ({' '.join(str(error).split())[:300]}): "
                         "copy the folder again from the network's own page") from error
    wrong = _mismatched(loading)
    if wrong:
        raise ValueError(f"{_misfit(folder, architecture)}: {len(wrong)} are of another shape than config.json says, such "
                         f"as {min(wrong)}; copy the folder again")
    _require_values(model, folder.name)
    model = model.float().eval().requires_grad_(False)
    _warn_of_unused(folder.name, weights, loading["unexpected_keys"])
    return Loaded(model, tensors_without_weights(model, loading["missing_keys"]))


def _misfit(folder: Path, architecture: str) -> str:
    return f"the weights in {folder.name} do not fit {architecture}"


def _config(architecture: str, config: Mapping[str, Any]) -> Any:
    import transformers

    kind = getattr(transformers, architecture).config_class
    config = {key: value for key, value in config.items() if key != "problem_type"}  # of losses only; some is refused
    with TemporaryDirectory() as place:  # only from a file is it read as the library reads it
        write_json(Path(place) / "config.json", config)
        return kind.from_pretrained(place, local_files_only=True)


def _with_all_labels(architecture: str, config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """`_filled` with as many labels as the weights have, where the names in the file are fewer or more."""
    model, loading = _filled(architecture, config, weights)
    own = model.state_dict()
    shapes = [(weights[key].shape, own[key].shape) for key in _mismatched(loading) if key in weights and key in own]
    count = count_labels(config.num_labels, shapes)
    if count == config.num_labels:
        return model, loading
    config.num_labels = count
    return _filled(architecture, config, weights)


def _mismatched(loading: Mapping[str, Any]) -> list[str]:
    return [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]


def _filled(architecture: str, config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """A model with its weights, and what the library says of how they fit: of all wrappers the one that fits best."""
    import transformers

    filled = []
    for layout in (weights, *unwrapped(weights)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what no file holds is the same each time
            filled.append(getattr(transformers, architecture).from_pretrained(
                None, config=config, state_dict=dict(layout), output_loading_info=True, ignore_mismatched_sizes=True))
        if not filled[-1][1]["missing_keys"]:
            break
    return min(filled, key=_count_missing)


def _require_values(model: nn.Module, name: str) -> None:
    """ValueError for a model that the library left with tensors on no device."""
    empty = [part for part, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(f"this release of transformers leaves {len(empty)} tensors of {name} without values, such as "
                         f"{empty[0]}: expected a network that it can load; another release may load it")


def _count_missing(filled: tuple[Any, dict[str, Any]]) -> int:
    return len(filled[1]["missing_keys"])


def _warn_of_unused(name: str, weights: Mapping[str, Tensor], unexpected: Collection[str]) -> None:
    unused = sorted(key for key in unexpected if key not in weights or weights[key].is_floating_point())
    if unused:
        log.warning("%s: the network that config.json describes has no place for %d of its weights, such as %s; it was "
                    "loaded without them", name, len(unused), unused[0])


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
    layers = [_linear(tensors, name) for name in names]
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    if not sizes or sizes[-1][1] != 1 or any(a[1] != b[0] for a, b in pairwise(sizes)):
        raise ValueError(f"{file.parent.name}/{file.name} has linear layers of {sizes} inputs and outputs: expected a chain "
                         "that ends in one number")
    return nn.Sequential(*layers)


def _numeric_key(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in name.removesuffix(".weight").split(".")]


def _linear(tensors: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight = tensors[name].float()
    bias = tensors.get(name.removesuffix("weight") + "bias", torch.zeros(len(weight)))
    layer = nn.Linear(weight.shape[-1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias.float()})
    return layer


@torch.no_grad()
def _read_text(folder: Path, model: Any, text: str) -> Tensor:
    """The embedding of a text, (1, D)."""
    length, padded = model.config.text_config.max_position_embeddings, "siglip" in model.config.model_type
    tokens = _tokens(folder, text, length, padded)
    return _text_features(model, tokens["input_ids"])


def _text_model(model: Any) -> Any:
    return getattr(model, "clip", model)


def _text_features(model: Any, tokens: Tensor) -> Tensor:
    features = model.get_text_features(input_ids=tokens)  # no mask: SigLIP was trained to read its padding
    return features if isinstance(features, Tensor) else features.pooler_output


def _task_tokens(folder: Path, length: int) -> Tensor:
    """The task that OneFormer is given, (1, length)."""
    tokens = _tokens(folder, "the task is semantic", length, padded=True)
    return tokens["input_ids"] * tokens["attention_mask"]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, AttributeError):  # of a class that another release has; tokenizer.json is all that a fast one does
        if not (folder / "tokenizer.json").exists():
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _tokens(folder: Path, text: str, length: int, padded: bool) -> Mapping[str, Tensor]:
    if not any((folder / name).exists() for name in TOKENIZERS):  # transformers 5 would make one that knows no word
        raise FileNotFoundError(f"{folder.name} has no tokenizer: expected one of {', '.join(TOKENIZERS)}; copy the "
                                "tokenizer's files from the network's own page")
    try:
        with offline():
            tokenizer = _tokenizer(folder)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the tokenizer in {folder.name} cannot be read ({' '.join(str(error).split())[:150]}): copy its "
                         "files again from the network's own page") from error
    return tokenizer([text], padding="max_length" if padded else False, truncation=True, max_length=length,
                     return_tensors="pt", return_attention_mask=True)
