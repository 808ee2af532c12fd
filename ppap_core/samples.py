"""A resumable store of generated images, and of the latents they were decoded from: all that experts learn from."""
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .files import claim, load_tensors, save_tensors
from .noise import seeded

SHARD = 64  # images in one file: what an interruption can lose


class SampleStore:
    """A folder of generated images: manifest.json (the recipe) and shards of uint8 (n, 3, H, W), and of the latents, in
    half precision, where the model diffuses latents.

    Image i depends only on the recipe and on seed + i. A shard is written beside its name and then renamed, so an
    interrupted fill leaves whole shards only, and the next fill goes on after the last one.
    """

    def __init__(self, folder: Path | str, recipe: dict):
        self.folder, self.recipe = Path(folder), claim(folder, recipe)

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard_{index:05d}.safetensors"

    def __len__(self) -> int:
        shards = 0
        while self._shard(shards).exists():
            shards += 1
        return shards * SHARD

    def fill(self, count: int, generate: Callable[[list[int]], Tensor | tuple[Tensor, Tensor]],
             on_shard: Callable[[int, Tensor], None] | None = None) -> None:
        """Generate until at least `count` images are there.

        generate(seeds) -> images (n, 3, H, W) in [-1, 1], or these and what was diffused; on_shard(images so far, the new
        ones) may raise to stop.
        """
        seed = int(self.recipe.get("seed", 0))
        while (have := len(self)) < count:
            made = generate(list(range(seed + have, seed + have + SHARD)))
            images, latents = made if isinstance(made, tuple) else (made, None)
            if not torch.isfinite(images).all():
                raise ValueError("the model generated NaN or infinite pixels: expected finite images; try another "
                                 "precision or another sampler")
            tensors = {"images": to_uint8(images)} | ({} if latents is None else {"latents": latents.half()})
            save_tensors(self._shard(have // SHARD), tensors, {"first": have})
            for name in ("images", "latents"):
                self.__dict__.pop(name, None)
            if on_shard:
                on_shard(have + SHARD, images)

    @cached_property
    def images(self) -> Tensor:
        """All images as they are stored, (n, 3, H, W) uint8."""
        return torch.cat([shard["images"] for shard in self._shards()])

    @cached_property
    def latents(self) -> Tensor | None:
        """What was diffused, (n, C, h, w) float16; None where that is the images."""
        found = [shard["latents"] for shard in self._shards() if "latents" in shard]
        return torch.cat(found) if found else None

    def _shards(self) -> list[dict[str, Tensor]]:
        count = len(self)
        if count == 0:
            raise ValueError(f"{self.folder.name} holds no images yet: generate samples first")
        return [load_tensors(self._shard(index))[0] for index in range(count // SHARD)]

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The batch of a training step, (size, 3, H, W) in [-1, 1]: a pure function of (step, size, seed)."""
        return from_uint8(self.images[self._chosen(step, size, seed)])

    def latent_batch(self, step: int, size: int, seed: int) -> Tensor | None:
        """What the images of the same batch were decoded from, (size, C, h, w); None where images are diffused."""
        return None if self.latents is None else self.latents[self._chosen(step, size, seed)].float()

    def _chosen(self, step: int, size: int, seed: int) -> Tensor:
        return torch.randint(len(self.images), (size,), generator=seeded(seed, step))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def from_uint8(images: Tensor) -> Tensor:
    """0 ... 255 -> [-1, 1] float32."""
    return images.float() / 127.5 - 1
