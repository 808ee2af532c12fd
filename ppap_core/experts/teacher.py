"""Answers of the plain network on the images of a store, computed once and kept beside the images."""
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..io.folders import claim
from ..io.hashing import digest, fingerprint_network
from .bank import base_network
from .samples import SampleStore
from .shards import SHARD_SIZE, Shards

FOLDER = "answers"   # inside a store, and the part of a shard
WAITING = 600.0      # seconds for another process that computes the same file
BATCH = 16           # images that the network answers at once
SMALL = 2**16        # bytes of an answer that is kept whatever the size of the image

log = logging.getLogger(__name__)


@torch.no_grad()
def answer(guider: Guider, images: Tensor) -> Tensor:
    """Output of a plain guider for finished images (B, 3, H, W) in [-1, 1], on the device of its network."""
    images = images.to(next(base_network(guider).parameters()).device)
    return guider.predict(images, clean(images))


class TeacherAnswers:
    """A guider's outputs for the images of a store, as it would give them in each step of a training.

    They lie in a folder of the store, in a file for each shard, under a name by all that they depend on: the network, what
    it is asked for and the preprocessing. Larger ones than an image are not kept, and none in a store that cannot be
    written: they are computed each time.
    """

    def __init__(self, guider: Guider, store: SampleStore):
        self.guider, self.store = guider, store
        asked = [fingerprint_network(base_network(guider)), guider.preprocess, guider.task, guider.prompt]
        self.shards = Shards(store.folder / FOLDER / digest(asked), FOLDER)
        image = store.images_at([0])
        self.is_kept = answer(guider, image).nbytes <= max(math.prod(image.shape[1:]), SMALL)

    def count_missing(self) -> int:
        """Number of files that `fill` would make."""
        return len(self._missing())

    def _missing(self) -> list[int]:
        self.shards.forget()
        shards = range(len(self.store) // SHARD_SIZE) if self.is_kept else ()
        return [index for index in shards if self.shards.describe_damage(index)]

    def fill(self, on_shard: Callable[[], None] | None = None) -> None:
        """Compute the answers that are not there yet. on_shard: called after each file; may raise to stop.

        A folder that cannot be written is told in the log, and nothing is kept.
        """
        try:
            for seconds in (0.0, WAITING):  # first those that no other process computes
                for index in self._missing():
                    if self._make(index, seconds) and on_shard:
                        on_shard()
        except OSError as error:
            log.warning("%s The answers of %s are computed in each step.", error, self.guider.name)
            self.is_kept = False

    def _make(self, index: int, seconds: float) -> bool:
        """Compute a file, unless another process does so now, for longer than some seconds; returns whether it is there."""
        with claim(self.shards.file(index), seconds) as is_ours:
            if not is_ours and not seconds:
                return False
            if self.shards.describe_damage(index):
                rows = torch.arange(index * SHARD_SIZE, (index + 1) * SHARD_SIZE)
                parts = [answer(self.guider, self.store.images_at(part)).cpu() for part in rows.split(BATCH)]
                self.shards.write(index, {FOLDER: torch.cat(parts)})
        return True

    def __call__(self, rows: Tensor) -> Tensor:
        """Outputs for some images, (n, ...), on the device of the network. rows: their numbers, (n,) long."""
        if not self.is_kept:
            return answer(self.guider, self.store.images_at(rows))
        return self.shards.read(FOLDER, rows).to(next(base_network(self.guider).parameters()).device)


def kept_answers(guider: Guider, store: SampleStore, on_shard: Callable[[], None] | None = None) -> TeacherAnswers:
    """A guider's answers for a store, computed where they are missing. on_shard: called after each; may raise to stop."""
    answers = TeacherAnswers(guider, store)
    answers.fill(on_shard)
    return answers
