"""Answers of the plain network on the images of a store, computed once and kept beside the images."""
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..io.folders import claim
from ..io.hashing import digest, fingerprint_network
from .bank import base_network
from .samples import SampleStore
from .shards import SHARD_SIZE, Shards
from .variants import VARIANTS, Variant, vary

FOLDER = "answers"   # inside a store, and the part of a shard
WAITING = 600.0      # seconds for another process that computes the same file
BATCH = 16           # images that the network answers at once
SMALL = 2**16        # bytes of an answer that is kept whatever the size of the image

log = logging.getLogger(__name__)


Answers = Callable[[Tensor, Tensor], Tensor]
"""(numbers of images, of their variants, (B,) long) -> the outputs of the plain network, (B, ...)"""


@torch.no_grad()
def answer(guider: Guider, images: Tensor) -> Tensor:
    """Output of a plain guider for finished images (B, 3, H, W) in [-1, 1], on the device of its network."""
    images = images.to(next(base_network(guider).parameters()).device)
    return guider.predict(images, clean(images))


def soften(guider: Guider, output: Tensor, temperature: float) -> Tensor:
    """The teacher's output (B, ...) over a temperature, where the task has any; neutral: 1."""
    return output / temperature if TASKS[guider.task].is_logits else output


class TeacherAnswers:
    """A guider's outputs for the images of a store, as it would give them in each step of a training.

    They lie in a folder of the store, in a file for each shard, under a name by all that they depend on: the network, what
    it is asked for and the preprocessing; those on each variant of the images in a folder of their own. Larger ones than an
    image are not kept, and none in a store that cannot be written: they are computed each time.

    variants: of the images to which it answers; the first is the image itself.
    """

    def __init__(self, guider: Guider, store: SampleStore, variants: Sequence[Variant] = VARIANTS[:1]):
        self.guider, self.store, self.variants = guider, store, variants
        asked = [fingerprint_network(base_network(guider)), guider.preprocess, guider.task, guider.prompt]
        folders = [digest([*asked, *variant] if number else asked) for number, variant in enumerate(variants)]
        self.shards = [Shards(store.folder / FOLDER / folder, FOLDER) for folder in folders]  # of each variant
        image = store.images_at([0])
        self.is_kept = answer(guider, image).nbytes <= max(math.prod(image.shape[1:]), SMALL)

    def count_missing(self) -> int:
        """Number of files that `fill` would make."""
        return len(self._missing())

    def _missing(self) -> list[tuple[int, int]]:
        """The numbers of the variant and of the shard of each file that is not there."""
        for shards in self.shards:
            shards.forget()
        count = len(self.store) // SHARD_SIZE if self.is_kept else 0
        return [(variant, index) for index in range(count) for variant, shards in enumerate(self.shards)
                if shards.describe_damage(index)]

    def fill(self, on_shard: Callable[[], None] | None = None) -> None:
        """Compute the answers that are not there yet. on_shard: called after each file; may raise to stop.

        A folder that cannot be written is told in the log, and nothing is kept.
        """
        try:
            for seconds in (0.0, WAITING):  # first those that no other process computes
                for variant, index in self._missing():
                    if self._make(variant, index, seconds) and on_shard:
                        on_shard()
        except OSError as error:
            log.warning("%s The answers of %s are computed in each step.", error, self.guider.name)
            self.is_kept = False

    def _make(self, variant: int, index: int, seconds: float) -> bool:
        """Compute a file, unless another process does so now, for longer than some seconds; returns whether it is there."""
        shards = self.shards[variant]
        with claim(shards.file(index), seconds) as is_ours:
            if not is_ours and not seconds:
                return False
            if shards.describe_damage(index):
                rows = torch.arange(index * SHARD_SIZE, (index + 1) * SHARD_SIZE)
                shards.write(index, {FOLDER: torch.cat([self._compute(variant, part).cpu() for part in rows.split(BATCH)])})
        return True

    def _compute(self, variant: int, rows: Tensor) -> Tensor:
        return answer(self.guider, vary(self.store.images_at(rows), self.variants[variant]))

    def __call__(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Outputs for some images, (n, ...), on the device of the network.

        rows: their numbers, (n,) long. chosen: numbers of the variant of each, (n,) long.
        """
        parts = [(places, self._read(variant, rows[places])) for variant in range(len(self.variants))
                 if len(places := (chosen == variant).nonzero()[:, 0])]
        places, answers = (torch.cat(part) for part in zip(*parts, strict=True))
        return answers[places.argsort().to(answers.device)].to(next(base_network(self.guider).parameters()).device)

    def _read(self, variant: int, rows: Tensor) -> Tensor:
        return self.shards[variant].read(FOLDER, rows) if self.is_kept else self._compute(variant, rows)


def kept_answers(guider: Guider, store: SampleStore, variants: Sequence[Variant] = VARIANTS[:1],
                 on_shard: Callable[[], None] | None = None) -> TeacherAnswers:
    """A guider's answers for a store, computed where they are missing.

    variants: of the images to which it answers. on_shard: called after each file; may raise to stop.
    """
    answers = TeacherAnswers(guider, store, variants)
    answers.fill(on_shard)
    return answers
