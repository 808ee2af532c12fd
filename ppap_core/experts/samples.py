"""A resumable store of generated images and the trajectories that led to them: all that experts learn from."""
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..io.files import ensure_manifest
from ..io.folders import claim
from ..io.values import is_whole, shown
from ..rng import seeded
from .shards import SHARD_SIZE, Shards
from .trajectories import Trajectories

HELD_OUT = "unseen"       # folder inside a store
HELD_OUT_SEEDS = 2**31    # from the first image to learn from to the first one held out: torch's noise repeats after 2**32
HELD_OUT_SHARE = 8        # images to learn from for each one held out
MOST_HELD_OUT = 512
MOST_SEEDS = 2**64
WAITING_SECONDS = 0.1     # between two looks at what other processes make

log = logging.getLogger(__name__)

Generate = Callable[[list[int]], tuple[Tensor, Trajectories]]
"""seeds -> images (n, 3, H, W) in [-1, 1], one for each seed, and their trajectories"""


@dataclass(frozen=True)
class BatchSpec:
    """Which random batch: the training step it is for, the number of images in it, and the seed of the training.

    part: which of how many equal parts of it; neutral: (0, 1), the whole.
    """

    step: int
    size: int
    seed: int = 0
    part: tuple[int, int] = (0, 1)


class SampleStore:
    """A folder of generated images: a manifest and shards of images, uint8, with their trajectories in half precision.

    Image i depends only on the manifest and on seed + i. Shards are written beside their name and then renamed, so an
    interrupted fill leaves whole shards only. Of several processes that fill a store, each makes other shards.

    manifest: what the images are made from, as JSON values; "seed" is the first image's (default 0).
    ValueError if the folder holds images of another manifest.
    """

    def __init__(self, folder: Path | str, manifest: dict):
        self.folder, self.manifest = Path(folder), ensure_manifest(folder, manifest)
        self.shards = Shards(self.folder)
        if not is_whole(seed := self.manifest.get("seed", 0), -MOST_SEEDS, MOST_SEEDS):
            raise ValueError(f"{self.folder.name} says that its first seed is {shown(seed)}, expected a whole number: "
                             "delete that folder, or choose another name")

    @property
    def first_seed(self) -> int:
        """Seed of the first image."""
        return self.manifest.get("seed", 0)

    def __len__(self) -> int:
        return len(self.shards)

    def fill(self, count: int, generate: Generate, on_shard: Callable[[int, Tensor], None] | None = None,
             on_wait: Callable[[], None] | None = None) -> None:
        """Generate whole shards until the store holds at least `count` images, and again those that are damaged.

        on_shard(images so far, new images (n, 3, H, W)): called after each shard is saved; may raise to stop.
        on_wait: called now and then while another process makes the last ones; may raise to stop.
        A damaged shard is named in the log. ValueError, and nothing is saved, if a seed has no image or trajectory, or
        values are not finite. OSError in words if images are missing and the folder cannot be written.
        """
        self.shards.forget()
        missing = self._find_missing(max(-(-count // SHARD_SIZE), len(self) // SHARD_SIZE))
        is_told = False
        while missing := [index for index in missing if not self._make(index, generate, on_shard)]:
            if not is_told:
                log.warning("another process makes %d files of %s: waiting for it", len(missing), self.folder.name)
            is_told = True
            if on_wait:
                on_wait()
            time.sleep(WAITING_SECONDS)

    def _find_missing(self, shards: int) -> list[int]:
        damages = {index: damage for index in range(shards) if (damage := self.shards.describe_damage(index))}
        for index, damage in damages.items():
            if self.shards.file(index).exists():
                log.warning("%s It is made again.", damage)
        return list(damages)

    def _make(self, index: int, generate: Generate, on_shard: Callable[[int, Tensor], None] | None) -> bool:
        """Make a shard, unless another process does, or has done so; returns whether it is there."""
        with claim(self.shards.file(index)) as is_ours:
            if not self.shards.describe_damage(index):
                self.shards.forget()
                return True
            if not is_ours:
                return False
            first = self.first_seed + index * SHARD_SIZE
            images, trajectories = generate(list(range(first, first + SHARD_SIZE)))
            _require_complete(images, trajectories)
            self.shards.write(index, {"images": to_uint8(images), "sigmas": trajectories.sigmas,
                                      "noisy": trajectories.noisy_vp, "denoised": trajectories.denoised})
        if on_shard:
            on_shard(len(self), images)
        return True

    @property
    def held_out(self) -> "SampleStore | None":
        """Further images on which to measure what experts learned from these; None if there are none.

        Stores of earlier versions have none, and none are added to them: what was made with them stays as it is. A folder
        "held_out" of an early 0.2 is not read, since its images are the first ones again.
        """
        return self.hold_out() if (self.folder / HELD_OUT).exists() else None

    def hold_out(self) -> "SampleStore":
        """The store of images of the same kind, from seeds far away, that is kept apart in a folder inside this one."""
        return SampleStore(self.folder / HELD_OUT, self.manifest | {"seed": self.first_seed + HELD_OUT_SEEDS})

    @property
    def images(self) -> Tensor:
        """All images as they are stored, (n, 3, H, W) uint8; of a large store rather ask for some, by `images_at`."""
        return self.shards.whole("images")

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the kept steps, (n, K)."""
        return self.shards.whole("sigmas")

    @property
    def noisy_vp(self) -> Tensor:
        """Noisy states of the kept steps in VP scaling, (n, K, C, h, w); of a large store rather ask by `pairs_at`."""
        return self.shards.whole("noisy")

    @property
    def denoised(self) -> Tensor:
        """Predictions of the kept steps, (n, K, C, h, w); of a large store rather ask by `pairs_at`."""
        return self.shards.whole("denoised")

    def images_at(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Some images, (n, 3, H, W) in [-1, 1]. rows: their numbers, (n,)."""
        return from_uint8(self.shards.read("images", torch.as_tensor(rows)))

    def random_images(self, batch: BatchSpec) -> Tensor:
        """A random batch of images, (size, 3, H, W) in [-1, 1]: a pure function of `batch`."""
        return self.images_at(torch.randint(self.shards.count(), (batch.size,), generator=seeded(batch.seed, batch.step)))


def _require_complete(images: Tensor, trajectories: Trajectories) -> None:
    if len(images) != SHARD_SIZE or any(len(part) != SHARD_SIZE for part in trajectories):
        raise ValueError(f"{SHARD_SIZE} seeds gave {len(images)} images and {len(trajectories.sigmas)} trajectories: "
                         "expected one of each for every seed")
    if not all(bool(torch.isfinite(part).all()) for part in (images, *trajectories)):
        raise ValueError("the model generated NaN or infinite values, in its images or on the way to them: expected finite "
                         "ones; try another precision or another sampler")


def held_out_count(images: int) -> int:
    """Number of images to hold out beside so many to learn from: an eighth, in whole shards, up to `MOST_HELD_OUT`."""
    return min(images // HELD_OUT_SHARE // SHARD_SIZE * SHARD_SIZE, MOST_HELD_OUT)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 in 0 ... 255, on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def from_uint8(images: Tensor) -> Tensor:
    """Images in 0 ... 255 as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
