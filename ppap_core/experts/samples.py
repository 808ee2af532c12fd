"""A resumable store of generated images and the trajectories that led to them: all that experts learn from."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..io.files import ensure_manifest, load_tensors, save_tensors
from ..noise import to_vp
from ..rng import seeded
from ..sampling import Denoiser
from ..schedules import ExpertSchedule

SHARD_SIZE = 64           # images in one file: the most that an interruption can lose
STEPS_PER_TRAJECTORY = 6  # steps kept of each trajectory
HELD_OUT = "held_out"     # folder inside a store
HELD_OUT_SEEDS = 2**32    # seeds from the first image to learn from to the first one held out
HELD_OUT_SHARE = 8        # images to learn from for each one held out
MOST_HELD_OUT = 512


class Trajectories(NamedTuple):
    """K steps on the way to each of B images."""

    sigmas: Tensor    # (B, K) noise levels
    noisy_vp: Tensor  # (B, K, C, h, w) noisy states in VP scaling: inputs of experts of the noisy view
    denoised: Tensor  # (B, K, C, h, w) predictions: inputs of experts of the denoised view


Generate = Callable[[list[int]], tuple[Tensor, Trajectories]]
"""seeds -> images (n, 3, H, W) in [-1, 1], one for each seed, and their trajectories"""


class TrajectoryRecorder:
    """Records the inputs and predictions of a model while it is sampled, with any sampler."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        """Record one call: the VE state (B, C, h, w), its noise level (B,), and the prediction (B, C, h, w)."""
        self.calls.append((sigma.cpu(), to_vp(x, sigma).half().cpu(), denoised.half().cpu()))

    def wrap(self, denoise: Denoiser) -> Denoiser:
        """A denoiser that returns what `denoise` does and records it."""
        return partial(self._call, denoise)

    def _call(self, denoise: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        self.record(x, sigma, denoised)
        return denoised

    def trajectories(self, seeds: Sequence[int], kept: int = STEPS_PER_TRAJECTORY) -> Trajectories:
        """Per image, one seeded step from each of `kept` equal segments of its trajectory; clears the recording.

        seeds: one for each image of the batch, (B,). ValueError if nothing was recorded.
        """
        calls, self.calls = self.calls, []
        if not calls:
            raise ValueError("the model was not asked once: choose at least one step")
        draws = torch.stack([torch.rand(kept, generator=seeded(seed, 3)) for seed in seeds])
        steps = ((torch.arange(kept) + draws) * len(calls) / kept).long().clamp_max(len(calls) - 1)  # (B, K)
        rows = torch.arange(len(seeds))[:, None]
        return Trajectories(*(torch.stack(part, 1)[rows, steps] for part in zip(*calls, strict=True)))


@dataclass(frozen=True)
class BatchSpec:
    """Which random batch: the training step it is for, the number of images in it, and the seed of the training."""

    step: int
    size: int
    seed: int = 0


class Pairs(NamedTuple):
    """A batch for one expert: inputs for the student, and the images they led to, for the teacher."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    inputs: Tensor  # (B, C, h, w)
    sigma: Tensor   # (B,), all in the interval of the expert

    def to(self, device: torch.device | str) -> "Pairs":
        """Copy to a device."""
        return Pairs(*(part.to(device) for part in self))


class SampleStore:
    """A folder of generated images: a manifest and shards of images, uint8, with their trajectories in half precision.

    Image i depends only on the manifest and on seed + i. Shards are written beside their name and then renamed, so an
    interrupted fill leaves whole shards only, and the next one resumes after the last of them.

    manifest: what the images are made from, as JSON values; "seed" is the first image's (default 0).
    ValueError if the folder holds images of another manifest.
    """

    def __init__(self, folder: Path | str, manifest: dict):
        self.folder, self.manifest = Path(folder), ensure_manifest(folder, manifest)
        self._cache: dict[str, Tensor] = {}

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard_{index:05d}.safetensors"

    def __len__(self) -> int:
        shards = 0
        while self._shard(shards).exists():
            shards += 1
        return shards * SHARD_SIZE

    def fill(self, count: int, generate: Generate, on_shard: Callable[[int, Tensor], None] | None = None) -> None:
        """Generate whole shards until the store holds at least `count` images.

        on_shard(images so far, new images (n, 3, H, W)): called after each shard is saved; may raise to stop.
        ValueError, and nothing is saved, if a seed has no image or trajectory, or values are not finite.
        """
        first_seed = int(self.manifest.get("seed", 0))
        while (done := len(self)) < count:
            images, trajectories = generate(list(range(first_seed + done, first_seed + done + SHARD_SIZE)))
            _require_complete(images, trajectories)
            save_tensors(self._shard(done // SHARD_SIZE), {
                "images": to_uint8(images), "sigmas": trajectories.sigmas, "noisy": trajectories.noisy_vp,
                "denoised": trajectories.denoised}, {"first": done})
            self._cache.clear()
            if on_shard:
                on_shard(done + SHARD_SIZE, images)

    @property
    def held_out(self) -> "SampleStore | None":
        """Further images on which to measure what experts learned from these; None if there are none.

        Stores of earlier versions have none, and none are added to them: what was made with them stays as it is.
        """
        return self.hold_out() if (self.folder / HELD_OUT).exists() else None

    def hold_out(self) -> "SampleStore":
        """The store of images of the same kind, from seeds far away, that is kept apart in a folder inside this one."""
        seed = int(self.manifest.get("seed", 0)) + HELD_OUT_SEEDS
        return SampleStore(self.folder / HELD_OUT, self.manifest | {"seed": seed})

    @property
    def images(self) -> Tensor:
        """All images as they are stored, (n, 3, H, W) uint8."""
        return self._load("images")

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the kept steps, (n, K)."""
        return self._load("sigmas")

    @property
    def noisy_vp(self) -> Tensor:
        """Noisy states of the kept steps in VP scaling, (n, K, C, h, w)."""
        return self._load("noisy")

    @property
    def denoised(self) -> Tensor:
        """Predictions of the kept steps, (n, K, C, h, w)."""
        return self._load("denoised")

    def _load(self, key: str) -> Tensor:
        if key not in self._cache:
            count = len(self)
            if count == 0:
                raise ValueError(f"{self.folder.name} holds no images yet: generate samples first")
            shards = (load_tensors(self._shard(index))[0] for index in range(count // SHARD_SIZE))
            try:
                self._cache[key] = torch.cat([shard[key] for shard in shards])
            except KeyError:
                raise ValueError(f"the images of {self.folder.name} came without their trajectories: delete that folder and "
                                 "generate them again") from None
        return self._cache[key]

    def random_images(self, batch: BatchSpec) -> Tensor:
        """A random batch of images, (size, 3, H, W) in [-1, 1]: a pure function of `batch`."""
        chosen = torch.randint(len(self.images), (batch.size,), generator=seeded(batch.seed, batch.step))
        return from_uint8(self.images[chosen])


def _require_complete(images: Tensor, trajectories: Trajectories) -> None:
    if len(images) != SHARD_SIZE or any(len(part) != SHARD_SIZE for part in trajectories):
        raise ValueError(f"{SHARD_SIZE} seeds gave {len(images)} images and {len(trajectories.sigmas)} trajectories: "
                         "expected one of each for every seed")
    if not all(bool(torch.isfinite(part).all()) for part in (images, *trajectories)):
        raise ValueError("the model generated NaN or infinite values, in its images or on the way to them: expected finite "
                         "ones; try another precision or another sampler")


def trajectory_pairs(store: SampleStore, schedule: ExpertSchedule, index: int, batch: BatchSpec, view: str) -> Pairs:
    """Random steps in the interval of expert `index`, with the images they led to: a pure function of the arguments.

    view: "noisy" or "denoised". ValueError if the store has no step in the interval.
    """
    steps = steps_in(store, schedule, index)
    if len(steps) == 0:
        raise ValueError(f"no step of the images lies between sigma {schedule[index].lo:.4g} and {schedule[index].hi:.4g}, "
                         f"where expert {index} is to learn: generate samples with more steps, or use fewer experts")
    chosen = torch.randint(len(steps), (batch.size,), generator=seeded(batch.seed, index, batch.step))
    return pairs_at(store, steps[chosen], view)


def steps_in(store: SampleStore, schedule: ExpertSchedule, index: int) -> Tensor:
    """(image, step) of every kept step in the interval of expert `index`, (n, 2) long."""
    inner = torch.tensor(schedule.edges[1:-1], dtype=torch.float64)
    return (torch.bucketize(store.sigmas.double(), inner, right=True) == index).nonzero()


def pairs_at(store: SampleStore, steps: Tensor, view: str) -> Pairs:
    """The pairs of some (image, step) of a store, (n, 2) long. view: "noisy" or "denoised"."""
    image, step = steps.T
    inputs = (store.noisy_vp if view == "noisy" else store.denoised)[image, step]
    return Pairs(from_uint8(store.images[image]), inputs.float(), store.sigmas[image, step])


def held_out_count(images: int) -> int:
    """Number of images to hold out beside so many to learn from: an eighth, in whole shards, up to `MOST_HELD_OUT`."""
    return min(images // HELD_OUT_SHARE // SHARD_SIZE * SHARD_SIZE, MOST_HELD_OUT)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 in 0 ... 255, on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def from_uint8(images: Tensor) -> Tensor:
    """Images in 0 ... 255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
