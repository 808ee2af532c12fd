"""A world small enough for a laptop: exact scenes, a trained denoiser of them, and networks that guide and judge."""
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from ..guiders.guider import Guider, IgnoreSigma
from ..guiders.preprocess import Preprocess
from ..io.files import load_tensors
from .networks.classifiers import tiny_resnet
from .networks.denoiser import TinyDenoiser
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


def load_sibling() -> TinyDenoiser:
    """A bad version of the denoiser, for autoguidance: half as wide, with a sixteenth of the training."""
    return load_weights(TinyDenoiser(width=32), "sibling")


def tiny_guider(make, role: str, task: str, folder: Path = WEIGHTS) -> Guider:
    labels, dense = TASKS[task]
    net = load_weights(make(max(len(labels), 1), dense), f"{role}_{task}", folder)
    return Guider(f"tinyworld/{role}_{task}", IgnoreSigma(net), Preprocess((SIZE, SIZE)), task, labels)


def load_guider(task: str, answer: str = "own") -> Guider:
    """The tiny network that guides: "class", "depth" or "segmentation". ValueError for any answer but its own."""
    if answer != "own":
        raise ValueError(f"the tiny world's network for {task} cannot be read as {answer}: expected its own answer; choose "
                         "'own', or another network")
    return tiny_guider(tiny_resnet, "guider", task)
