"""Networks of the Hugging Face hub that are good to begin with, one for each purpose."""
from typing import NamedTuple


class Suggestion(NamedTuple):
    """A network on the hub. What its page says of size and licence holds, should it differ."""

    repo: str       # owner/name
    megabytes: int  # of its weights
    licence: str


SUGGESTED = {
    "classes of ImageNet": Suggestion("timm/resnet18.a1_in1k", 47, "Apache 2.0"),
    "tags of drawings": Suggestion("SmilingWolf/wd-vit-tagger-v3", 378, "Apache 2.0"),
    "texts": Suggestion("openai/clip-vit-base-patch32", 605, "MIT"),
    "depth": Suggestion("depth-anything/Depth-Anything-V2-Small-hf", 99, "Apache 2.0"),
    "regions": Suggestion("nvidia/segformer-b0-finetuned-ade-512-512", 15, "of NVIDIA, not for commercial use"),
    "a mask from a text": Suggestion("CIDAS/clipseg-rd64-refined", 603, "Apache 2.0"),
    "structure": Suggestion("facebook/dinov2-small", 88, "Apache 2.0"),
    "style": Suggestion("timm/vgg19.tv_in1k", 575, "BSD 3-clause"),
}
"""By purpose."""


def repository(name: str, purpose: str) -> str:
    """The network of a name, or without one that of a purpose of SUGGESTED. ValueError without either."""
    if name:
        return name
    if purpose not in SUGGESTED:
        raise ValueError(f"nothing is named to download: enter owner/name, or choose one of {', '.join(SUGGESTED)}")
    return SUGGESTED[purpose].repo
