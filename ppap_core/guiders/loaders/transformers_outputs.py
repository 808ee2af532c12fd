"""What networks of transformers answer, each as (model, image[, prompt]) -> tensor that a gradient passes through."""
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..resize import without_autocast

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
