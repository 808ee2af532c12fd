"""Shards: the files of a sample store, each of them whole or made again, and read row by row."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import PART, DamagedFileError, load_tensors, read_rows, read_shapes, save_tensors
from ..io.hashing import fingerprint_state

SHARD_SIZE = 64        # images in one file: the most that an interruption can lose
CHECKSUM = "checksum"  # tensor of the bytes of a fingerprint; files of earlier versions have none
IN_MEMORY = 2**28      # bytes of a part, up to which it is read whole and kept


class Shards:
    """The files of a folder as one table, whose parts are tensors with a row for each image.

    Only the rows that are asked for are read, unless a part is small, so that the length is a matter of the disk.
    needed: the part without which a file is not whole.
    """

    def __init__(self, folder: Path, needed: str = "images"):
        self.folder, self.needed = folder, needed
        self._cache: dict[object, Any] = {}

    def file(self, index: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard_{index:05d}.safetensors"

    def __len__(self) -> int:
        shards = 0
        while self.file(shards).exists():
            shards += 1
        return shards * SHARD_SIZE

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard with its checksum, whole or not at all, and delete what a killed process left of it.

        tensors: a part each, (SHARD_SIZE, ...). The file has to be claimed. OSError in words if it cannot be written.
        """
        file = self.file(index)
        for part in self.folder.glob(f"{file.name}.*{PART}"):
            part.unlink()
        save_tensors(file, tensors | {CHECKSUM: _checksum(tensors)}, {"first": index * SHARD_SIZE})
        self.forget()

    def describe_damage(self, index: int) -> str:
        """In words, what a shard lacks by its header and its size; "" if it is in order. Its values are not read."""
        file, first = self.file(index), index * SHARD_SIZE
        try:
            shapes, metadata = read_shapes(file)
            found = json.loads(metadata["ppap"])["first"]
        except (FileNotFoundError, DamagedFileError) as error:
            return str(error)
        except (KeyError, TypeError, ValueError, RecursionError):
            return f"{file.name} has no description of this pack: expected a shard saved by it."
        rows = {shape[:1] for name, shape in shapes.items() if name != CHECKSUM}
        if found != first or self.needed not in shapes or rows != {(SHARD_SIZE,)}:
            return f"{file.name} holds {shapes} from image {found} on: expected {SHARD_SIZE} of each from {first} on."
        return ""

    def verify(self, index: int) -> str:
        """In words, what is wrong with a shard, of which every value is read; "" if it is in order."""
        if damage := self.describe_damage(index):
            return damage
        tensors = load_tensors(self.file(index))[0]
        saved = tensors.pop(CHECKSUM, None)
        if saved is None or torch.equal(saved, _checksum(tensors)):
            return ""
        return f"{self.file(index).name} holds other values than were written: the disk or a copy has changed them."

    def read(self, part: str, images: Tensor, *steps: Tensor) -> Tensor:
        """Rows of a part as they are stored, (n, ...), in the order asked for.

        images: (n,) long. steps: (n,) long, one place in the rows for each; none: whole rows.
        ValueError if there are no images, or none with this part; DamagedFileError for a shard that is not whole.
        """
        if self.row(part).nbytes * self.count() <= IN_MEMORY:
            places = images, *steps
            return self.whole(part)[places]
        return self._read(part, images, *steps)

    def whole(self, part: str) -> Tensor:
        """All rows of a part, kept in memory."""
        return self.cached(part, self._read, part, range(self.count()))

    def row(self, part: str) -> Tensor:
        """The first row of a part."""
        self.count()
        return self.cached(("first", part), self._read_shard, 0, part, torch.zeros(1, dtype=torch.long))[0]

    def count(self) -> int:
        """Number of images, as it was when something was first read. ValueError if there are none."""
        if not (count := self.cached("count", self.__len__)):
            raise ValueError(f"{self.folder.name} holds no images yet: generate samples first")
        return count

    def cached(self, key: object, make: Callable[..., Any], *arguments: Any) -> Any:
        """The result of make(*arguments), kept until a shard is written or `forget` is called."""
        if key not in self._cache:
            self._cache[key] = make(*arguments)
        return self._cache[key]

    def forget(self) -> None:
        """Look again at what is on the disk."""
        self._cache.clear()

    def _read(self, part: str, images: Tensor | range, *steps: Tensor) -> Tensor:
        """Rows, of which each shard is opened once."""
        images, row = torch.as_tensor(images), self.row(part)
        found, order = row.new_empty(len(images), *row.shape[len(steps):]), images.argsort()
        shards, counts = (images[order] // SHARD_SIZE).unique_consecutive(return_counts=True)
        for shard, rows in zip(shards.tolist(), order.split(counts.tolist()), strict=True):
            found[rows] = self._read_shard(shard, part, images[rows] % SHARD_SIZE, *(step[rows] for step in steps))
        return found

    def _read_shard(self, shard: int, part: str, *index: Tensor) -> Tensor:
        try:
            return read_rows(self.file(shard), part, index)
        except KeyError:
            raise ValueError(f"the images of {self.folder.name} came without their trajectories: delete that folder and "
                             "generate them again") from None


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(fingerprint_state(tensors))), dtype=torch.uint8)
