"""Small deterministic networks and images for the tests. Sizes are odd and distinct, so that a swapped axis fails."""
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ppap_core.experts.trajectories import Trajectories, TrajectoryRecorder
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.noise import expand

B, H, W = 3, 20, 28
CLASSES = 5
VIEWS = ("noisy", "denoised")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(count: int = B, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth-valued noise as images (count, 3, H, W) in [-1, 1]."""
    return (randn(count, 3, H, W, seed=seed, dtype=dtype) * 0.6).tanh()


def level(sigma: float, like: Tensor) -> Tensor:
    """One noise level for a batch, (B,)."""
    return like.new_full((len(like),), sigma)


def gaussian_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(0, 0.5²) pixels: x (B, C, H, W), sigma (B,)."""
    return x * expand(0.25 / (0.25 + sigma**2), x)


LEVELS = (20.0, 4.0, 1.5, 0.7, 0.3, 0.05)  # noise levels of a made-up trajectory


def made_up_trajectories(images: Tensor, seed: int = 0, levels: Sequence[float] = LEVELS) -> Trajectories:
    """Trajectories that end at these images (B, C, H, W): each under fresh noise of each level, and its prediction."""
    recorder = TrajectoryRecorder()
    for step, sigma in enumerate(levels):
        x = images + sigma * randn(*images.shape, seed=1000 * seed + step)
        recorder.wrap(gaussian_denoise)(x, level(sigma, x))
    return recorder.trajectories(range(len(images)), len(levels))


class SmallNet(nn.Module):
    """Convolutions, batch norms and a head; outputs of this shape for each image, or channels for each pixel when dense."""

    def __init__(self, shape: tuple[int, ...] = (CLASSES,), dense: bool = False, width: int = 8):
        super().__init__()
        outputs = shape[0] if dense else math.prod(shape)
        self.conv_1 = nn.Conv2d(3, width, 3, 2, 1)
        self.norm_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, outputs, 1) if dense else nn.Linear(width, outputs)
        self.dense, self.shape = dense, shape

    def forward(self, image: Tensor) -> Tensor:
        h = nn.functional.silu(self.norm_1(self.conv_1(image)))
        h = nn.functional.silu(self.norm_2(self.conv_2(h)) + self.mix(h))
        return self.head(h) if self.dense else self.head(h.mean(dim=(2, 3))).unflatten(1, self.shape)


def fixed_weights(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every weight and statistic with numbers that depend on the seed only, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(net.state_dict().items()):
        if not tensor.is_floating_point():
            tensor.fill_(7)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(generator=generator).mul_(1.5 / tensor[0].numel() ** 0.5)
        else:
            tensor.normal_(0.3, 0.3, generator=generator)
    return net


class Example(NamedTuple):
    """Small outputs of a task, for one image: their shape (a map of 6 x 8 where it is one), a target, names of classes."""

    shape: tuple[int, ...]
    target: Tensor
    labels: tuple[str, ...] = ()


EXAMPLES = {
    "class": Example((CLASSES,), torch.tensor([2]), ("red fox", "grey fox", "tabby", "tiger", "goldfish")),
    "tags": Example((CLASSES,), torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]]), ("1girl", "solo", "long_hair", ":d", "+_+")),
    "depth": Example((1, 6, 8), randn(1, 1, 6, 8, seed=5)),
    "segmentation": Example((2, 6, 8), randn(1, 6, 8, seed=6).gt(0).long(), ("wall", "thing")),
    "mask": Example((1, 6, 8), randn(1, 1, 6, 8, seed=7).sigmoid()),
    "embedding": Example((6,), randn(1, 6, seed=8)),
    "number": Example((1,), torch.tensor([[0.8]])),
    "features": Example((4, 6, 8), randn(1, 4, 6, 8, seed=9)),
    "style": Example((7,), randn(1, 7, seed=10)),
    "structure": Example((3, 3), randn(1, 3, 3, seed=11)),
}
"""Name of each task -> its example; all that is tested of every task runs on it."""


def small_guider(task: str = "class", view: str = "denoised", seed: int = 0, dtype: torch.dtype = torch.float32) -> Guider:
    """An aimed guider with what troubles experts: batch norms, a resize, and statistics of its own."""
    shape, target, labels = EXAMPLES[task]
    net = fixed_weights(SmallNet(shape, dense=shape[1:] == (6, 8)), seed).to(dtype)
    preprocess = Preprocess((12, 16), (0.48, 0.45, 0.4), (0.22, 0.23, 0.24))
    return Guider(f"small/{task}", IgnoreSigma(net), preprocess, task, labels, view, target)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def disturb(bank, index: int, seed: int = 1, size: float = 0.1) -> None:
    """Give one expert weights as if it had been trained."""
    bank.load(index, {name: size * randn(*tensor.shape, seed=seed + place)
                      for place, (name, tensor) in enumerate(sorted(bank.weights(index).items()))})


@contextmanager
def says(kind: type[Exception], *words: str) -> Iterator[None]:
    """Assert that the block raises this error with one line of text that holds all of these words."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message.strip(), f"more than one line: {message}"
    assert len(message) > 25, f"too short to help: {message!r}"
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


@contextmanager
def full_disk(room: int = 300) -> Iterator[None]:
    """Let no file grow beyond a few bytes, as on a full disk: the system itself refuses to write."""
    resource = pytest.importorskip("resource", reason="limits on the size of files need Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
