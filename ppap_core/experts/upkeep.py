"""Upkeep of sample stores: what they hold, whether it is whole, and shards of others taken over."""
import logging
import math
from collections.abc import Iterator
from pathlib import Path

from ..io.files import load_tensors, read_json, read_shapes
from ..io.folders import claim
from ..io.values import bare
from .samples import SampleStore
from .shards import CHECKSUM, SHARD_SIZE

MOST_NAMED = 8  # differences in a sentence

log = logging.getLogger(__name__)


def open_store(folder: Path | str) -> SampleStore:
    """The store in a folder, with the manifest that it has. ValueError if there is none."""
    return SampleStore(folder, read_json(Path(folder) / "manifest.json"))


def describe_store(store: SampleStore) -> str:
    """Lines on the images of a store: their number, size and parts, the shards that are not whole, and the held-out ones."""
    count, held_out = len(store), store.held_out
    shards = range(count // SHARD_SIZE)
    sizes = sum(store.shards.file(index).stat().st_size for index in shards)
    lines = [f"{store.folder.name}: {count} images from seed {store.first_seed} on, {sizes / 2**20:,.1f} MiB"]
    if count:
        lines += [f"{name}: {' x '.join(map(str, shape[1:]))} for each image"
                  for name, shape in read_shapes(store.shards.file(0))[0].items() if name != CHECKSUM]
    lines += [damage for index in shards if (damage := store.shards.describe_damage(index))]
    return "\n".join(lines if held_out is None else [*lines, describe_store(held_out)])


def verify_store(store: SampleStore, delete: bool = False) -> Iterator[str]:
    """Read every value of a store and of its held-out images, and yield what is wrong with a shard, in words.

    delete: such shards, so that the next fill makes them again; False: nothing is changed.
    """
    for index in range(len(store) // SHARD_SIZE):
        if damage := store.shards.verify(index):
            yield f"{store.folder.name}: {damage}"
            if delete:
                store.shards.file(index).unlink()
    if store.held_out:
        yield from verify_store(store.held_out, delete)


def merge_stores(store: SampleStore, other: SampleStore) -> int:
    """Copy the shards that a store lacks from another of the same manifest, or from later seeds; returns their number.

    Held-out images are taken from a store of the same seed only. A shard that is not whole is left out and named in the log.
    ValueError for a store of other images.
    """
    offset = _offset(store, other)
    copied = sum(_copy(store, index + offset, other, index) for index in range(len(other) // SHARD_SIZE))
    if offset == 0 and other.held_out:
        copied += merge_stores(store.hold_out(), other.held_out)
    return copied


def _offset(store: SampleStore, other: SampleStore) -> int:
    """Shards from the first image of a store to that of another."""
    offset, rest = divmod(other.first_seed - store.first_seed, SHARD_SIZE)
    differing = sorted(key for key in {**store.manifest, **other.manifest} if key != "seed"
                       and store.manifest.get(key, math.nan) != other.manifest.get(key, math.nan))
    if differing or rest or offset < 0:
        reason = f"they differ in {', '.join(map(bare, differing[:MOST_NAMED]))}" if differing else (
            f"its first seed is {other.first_seed}, expected {store.first_seed} and a multiple of {SHARD_SIZE} more")
        raise ValueError(f"the images of {other.folder} do not go with those of {store.folder}: {reason}; keep them apart")
    return offset


def _copy(store: SampleStore, index: int, other: SampleStore, source: int) -> bool:
    if damage := other.shards.verify(source):
        log.warning("%s It is left out.", damage)
        return False
    with claim(store.shards.file(index)) as is_ours:
        if not is_ours or not store.shards.describe_damage(index):
            return False
        tensors = load_tensors(other.shards.file(source))[0]
        store.shards.write(index, {name: tensor for name, tensor in tensors.items() if name != CHECKSUM})
        return True
