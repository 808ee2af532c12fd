"""A world small enough for a laptop: exact scenes, a trained denoiser of them, and networks that guide and judge."""
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from ..files import load_tensors
from ..guider import Guider, IgnoreSigma
from ..preprocess import Preprocess
from .denoiser import TinyDenoiser
from .networks import TinyTransformer, tiny_convnext, tiny_resnet
from .scenes import CLASSES

SIZE = 32
SIGMA_MIN, SIGMA_MAX = 0.02, 80.0
CONDITIONS = 16  # numbers that a model is conditioned on: one for each class, the rest spare
WEIGHTS = Path(__file__).parent / "weights"
TASKS = {"class": (CLASSES, False), "depth": ((), True), "segmentation": (("wall", *CLASSES), True)}  # labels, dense


def condition(labels: Tensor) -> Tensor:
    """(B,) long -> (B, CONDITIONS): a one in the place of the class; a label of -1 is no condition, all zeros."""
    return F.one_hot(labels.clamp_min(0), CONDITIONS).float() * (labels >= 0)[:, None]


def load_weights(net: nn.Module, name: str, folder: Path = WEIGHTS) -> nn.Module:
    """A network of the bundled weights, frozen."""
    tensors, _ = load_tensors(folder / f"{name}.safetensors")
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def load_denoiser() -> TinyDenoiser:
    """The trained unconditional denoiser of scenes, (B, 3, 32, 32)."""
    return load_weights(TinyDenoiser(), "denoiser")


def load_conditional_denoiser() -> TinyDenoiser:
    """Its sibling that is told the class, as `condition` writes it; told zeros, no class, it is unconditional."""
    return load_weights(TinyDenoiser(conditions=CONDITIONS), "conditional_denoiser")


def load_sibling(told: bool = False) -> TinyDenoiser:
    """A bad version of either denoiser, for autoguidance: half as wide, with a sixteenth of the training."""
    net = TinyDenoiser(width=32, conditions=CONDITIONS if told else 0)
    return load_weights(net, "conditional_sibling" if told else "sibling")


def label_map_denoiser() -> TinyDenoiser:
    """A small denoiser of label maps, before its training."""
    return TinyDenoiser(width=32, blocks=2, channels=len(TASKS["segmentation"][0]))


def load_label_prior() -> TinyDenoiser:
    """The trained denoiser of label maps, (B, 9, 32, 32) as `labelmaps.as_points` writes them; it never saw an image."""
    return load_weights(label_map_denoiser(), "labelmaps")


def tour_denoiser() -> TinyDenoiser:
    """A small denoiser of pictures of tours, before its training."""
    return TinyDenoiser(width=32, blocks=2, channels=1)


def load_tour_prior() -> TinyDenoiser:
    """The trained denoiser of pictures of short tours, (B, 1, 64, 64) as `tours.picture` draws them."""
    return load_weights(tour_denoiser(), "tours")


def _network(make, role: str, task: str) -> Guider:
    labels, dense = TASKS[task]
    net = load_weights(make(max(len(labels), 1), dense), f"{role}_{task}")
    return Guider(f"tinyworld/{role}_{task}", IgnoreSigma(net), Preprocess((SIZE, SIZE)), task, labels)


def load_guider(task: str) -> Guider:
    """The tiny network that guides: "class", "depth" or "segmentation"."""
    return _network(tiny_resnet, "guider", task)


def load_judge(task: str) -> Guider:
    """A network of another architecture and another seed, which never guides."""
    return _network(tiny_convnext, "judge", task)


def load_second_judge(task: str) -> Guider:
    """A judge of a third architecture, which never guides and by which nothing is chosen."""
    return _network(TinyTransformer, "second_judge", task)
