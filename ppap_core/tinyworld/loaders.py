"""The tiny world of pixels: a trained denoiser of 32 x 32 scenes and networks that guide it, small enough for a laptop."""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..guiders.guider import Guider, IgnoreSigma
from ..guiders.preprocess import Preprocess
from ..guiders.tasks import TASKS
from ..io.files import load_tensors
from .networks.classifiers import TinyFeatures, tiny_resnet
from .networks.denoiser import TinyDenoiser
from .scenes import CLASSES

SIZE = 32
SIGMA_MIN, SIGMA_MAX = 0.02, 80.0
CONDITIONS = 16  # numbers that a model is conditioned on: one for each class, the rest spare
WEIGHTS = Path(__file__).parent / "weights"
GUIDERS = Path(__file__).parent / "guiders"  # folders as people have them, for the loaders of folders
LABELS: dict[str, tuple[str, ...]] = {"class": CLASSES, "depth": (), "segmentation": ("wall", *CLASSES)}
"""Task of a tiny network -> names of its classes."""

Net = TypeVar("Net", bound=nn.Module)


def condition(labels: Tensor) -> Tensor:
    """One-hot condition of labels (B,) long, (B, CONDITIONS); a label of -1 is unconditional, all zeros."""
    return F.one_hot(labels.clamp_min(0), CONDITIONS).float() * (labels >= 0)[:, None]


def load_weights(net: Net, name: str, folder: Path = WEIGHTS) -> Net:
    """The network with the weights of <folder>/<name>.safetensors, frozen."""
    tensors, _ = load_tensors(folder / f"{name}.safetensors")
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def load_denoiser() -> TinyDenoiser:
    """The trained unconditional denoiser of scenes, (B, 3, 32, 32)."""
    return load_weights(TinyDenoiser(), "denoiser")


def load_sibling() -> TinyDenoiser:
    """A bad version of the denoiser, for autoguidance: half as wide, with a sixteenth of the training."""
    return load_weights(TinyDenoiser(width=32), "sibling")


def tiny_guider(make: Callable[[int, bool], nn.Module], role: str, task: str, folder: Path = WEIGHTS) -> Guider:
    """A guider of the tiny world from the weights <folder>/<role>_<task>.safetensors.

    make(outputs, dense) builds its network; task is a key of LABELS.
    """
    net = load_weights(make(max(len(LABELS[task]), 1), TASKS[task].dense), f"{role}_{task}", folder)
    return Guider(f"tinyworld/{role}_{task}", IgnoreSigma(net), Preprocess((SIZE, SIZE)), task, LABELS[task])


def load_guider(task: str, output: str = "own") -> Guider:
    """The tiny network that guides: "class", "depth" or "segmentation".

    output: "own", or "embedding" for its features of the image as a whole. ValueError for other tasks and outputs.
    """
    if task not in LABELS:
        raise ValueError(f"the tiny world has no network for {task}: expected {', '.join(LABELS)}, or another network")
    guider = tiny_guider(tiny_resnet, "guider", task)
    if output == "embedding":
        net = IgnoreSigma(TinyFeatures(guider.net.net))  # type: ignore[attr-defined]
        return replace(guider, net=net, task=output, labels=())
    if output != "own":
        raise ValueError(f"the tiny world's network for {task} cannot be read as {output}: expected its own answer or its "
                         "embedding; choose 'own', or another network")
    return guider
