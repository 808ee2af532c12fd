"""A resumable store of generated images and of the trajectories that led to them: all that experts learn from."""
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..io.files import ensure_manifest, load_tensors, save_tensors
from ..noise import expand, to_vp
from ..rng import seeded
from ..sampling import Denoiser
from ..schedules import ExpertSchedule

SHARD_SIZE = 64  # images in one file: what an interruption can lose
STEPS_PER_TRAJECTORY = 6    # steps of each trajectory that are kept


class Trajectories(NamedTuple):
    """Some steps on the way to each image: what the experts of either view look at, and how much noise there was."""

    sigmas: Tensor    # (B, K)
    noisy: Tensor     # (B, K, C, h, w), to_vp
    denoised: Tensor  # (B, K, C, h, w)


class TrajectoryRecorder:
    """Notes what a model was asked and what it answered while a batch was sampled, whatever sampler asked."""

    def __init__(self):
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        """One call of the model: the VE state (B, C, h, w), its noise level (B,), the prediction."""
        self.calls.append((sigma.cpu(), to_vp(x, sigma).half().cpu(), denoised.half().cpu()))

    def wrap(self, denoise: Denoiser) -> Denoiser:
        """The same denoiser, overheard."""
        def recording_model(x: Tensor, sigma: Tensor) -> Tensor:
            denoised = denoise(x, sigma)
            self.note(x, sigma, denoised)
            return denoised
        return recording_model

    def trajectories(self, seeds: Sequence[int], kept: int = STEPS_PER_TRAJECTORY) -> Trajectories:
        """Of each image one call of each of `kept` equal parts of the trajectory, by its seed; and forgets them all."""
        calls, self.calls = self.calls, []
        if not calls:
            raise ValueError("the model was not asked once: choose at least one step")
        draws = torch.stack([torch.rand(kept, generator=seeded(seed, 3)) for seed in seeds])
        chosen = ((torch.arange(kept) + draws) * len(calls) / kept).long().clamp_max(len(calls) - 1)  # (B, K)
        rows = torch.arange(len(seeds))[:, None]
        return Trajectories(*(torch.stack(part, 1)[rows, chosen] for part in zip(*calls, strict=True)))


class Pairs(NamedTuple):
    """What a training step looks at."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]: what the trajectory led to, for the teacher
    seen: Tensor    # (B, C, h, w): what the expert looks at
    sigma: Tensor   # (B,), all of one expert

    def to(self, device: torch.device | str) -> "Pairs":
        """The same on another device."""
        return Pairs(*(part.to(device) for part in self))


class SampleStore:
    """A folder of generated images: manifest.json (the recipe) and shards of images, uint8 (n, 3, H, W), and of their
    trajectories, in half precision.

    Image i depends only on the recipe and on seed + i. A shard is written beside its name and then renamed, so an
    interrupted fill leaves whole shards only, and the next fill goes on after the last one.
    """

    def __init__(self, folder: Path | str, recipe: dict):
        self.folder, self.recipe = Path(folder), ensure_manifest(folder, recipe)

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard_{index:05d}.safetensors"

    def __len__(self) -> int:
        shards = 0
        while self._shard(shards).exists():
            shards += 1
        return shards * SHARD_SIZE

    def fill(self, count: int, generate: Callable[[list[int]], tuple[Tensor, Trajectories]],
             on_shard: Callable[[int, Tensor], None] | None = None) -> None:
        """Generate until at least `count` images are there.

        generate(seeds) -> images (n, 3, H, W) in [-1, 1], one for each seed, and their trajectories; on_shard(images so
        far, the new ones) may raise to stop.
        """
        seed = int(self.recipe.get("seed", 0))
        while (have := len(self)) < count:
            images, paths = generate(list(range(seed + have, seed + have + SHARD_SIZE)))
            if len(images) != SHARD_SIZE or any(len(part) != SHARD_SIZE for part in paths):
                raise ValueError(f"{len(images)} images and {len(paths.sigmas)} trajectories were made of {SHARD_SIZE} seeds: "
                                 "expected one of each for every seed")
            if not all(bool(torch.isfinite(part).all()) for part in (images, *paths)):
                raise ValueError("the model generated NaN or infinite values, in its images or on the way to them: expected "
                                 "finite ones; try another precision or another sampler")
            save_tensors(self._shard(have // SHARD_SIZE), {"images": to_uint8(images), **paths._asdict()}, {"first": have})
            for name in self.__dict__.keys() - {"folder", "recipe"}:
                del self.__dict__[name]
            if on_shard:
                on_shard(have + SHARD_SIZE, images)

    @cached_property
    def images(self) -> Tensor:
        """All images as they are stored, (n, 3, H, W) uint8."""
        return self._all("images")

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise levels of the steps that are kept, (n, K)."""
        return self._all("sigmas")

    @cached_property
    def noisy(self) -> Tensor:
        """What experts of the noisy view look at, (n, K, C, h, w)."""
        return self._all("noisy")

    @cached_property
    def denoised(self) -> Tensor:
        """What experts of the denoised view look at, (n, K, C, h, w)."""
        return self._all("denoised")

    def _all(self, name: str) -> Tensor:
        count = len(self)
        if count == 0:
            raise ValueError(f"{self.folder.name} holds no images yet: generate samples first")
        shards = (load_tensors(self._shard(index))[0] for index in range(count // SHARD_SIZE))
        try:
            return torch.cat([shard[name] for shard in shards])
        except KeyError:
            raise ValueError(f"the images of {self.folder.name} came without their trajectories: delete that folder and "
                             "generate them again") from None

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """Some images, (size, 3, H, W) in [-1, 1]: a pure function of (step, size, seed)."""
        return from_uint8(self.images[torch.randint(len(self.images), (size,), generator=seeded(seed, step))])


def trajectory_pairs(store: SampleStore, schedule: ExpertSchedule, index: int, step: int, size: int, seed: int,
                     view: str) -> Pairs:
    """Steps of the interval of expert `index`, and the images they led to: a pure function of its arguments."""
    mine = _steps_of(store, schedule, index)
    image, kept = mine[torch.randint(len(mine), (size,), generator=seeded(seed, index, step))].T
    seen = (store.noisy if view == "noisy" else store.denoised)[image, kept]
    return Pairs(from_uint8(store.images[image]), seen.float(), store.sigmas[image, kept])


def _steps_of(store: SampleStore, schedule: ExpertSchedule, index: int) -> Tensor:
    """(image, step) of all kept steps that an expert is responsible for, (n, 2). ValueError where there is none."""
    inner = torch.tensor(schedule.edges[1:-1], dtype=torch.float64)
    found = (torch.bucketize(store.sigmas.double(), inner, right=True) == index).nonzero()
    if len(found) == 0:
        raise ValueError(f"no step of the images lies between sigma {schedule[index].lo:.4g} and {schedule[index].hi:.4g}, "
                         f"where expert {index} is to learn: generate samples with more steps, or use fewer experts")
    return found


def fresh_pairs(store: SampleStore, schedule: ExpertSchedule, index: int, step: int, size: int, seed: int,
                see: Callable[[Tensor, Tensor], Tensor], device: torch.device | str = "cpu") -> Pairs:
    """Pairs as the paper has them: images, some mirrored, under noise that is drawn anew.

    see(x, sigma): what the expert looks at, `to_vp` or a denoiser, which is asked on the device. For stores of a model
    that diffuses pixels.
    """
    if store.noisy.shape[2:] != store.images.shape[1:]:
        raise ValueError(f"what was diffused has the shape {tuple(store.noisy.shape[2:])} and its images "
                         f"{tuple(store.images.shape[1:])}: fresh noise is for models of pixels, take the trajectories")
    generator = seeded(seed, index, step)
    images = store.batch(step, size, seed + index * 2**64)
    images = torch.where(torch.rand(size, 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    sigma = schedule[index].sample(size, generator)
    noise = torch.randn(images.shape, generator=generator)
    images, sigma, noise = (part.to(device) for part in (images, sigma, noise))
    with torch.no_grad():
        return Pairs(images, see(images + expand(sigma, images) * noise, sigma), sigma)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def from_uint8(images: Tensor) -> Tensor:
    """0 ... 255 -> [-1, 1] float32."""
    return images.float() / 127.5 - 1
