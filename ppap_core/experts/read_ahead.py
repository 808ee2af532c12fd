"""Batches that are read while the one before is learned from."""
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Batch = TypeVar("Batch")


class ReadAhead(Generic[Batch]):
    """Reads the batch of a step, and in the background already that of the next one, so that a device need not wait.

    read: makes the batch of a step, as a function of the step alone, and may do so in another thread. steps: of all.
    Leaving its context waits for a batch that is being read.
    """

    def __init__(self, read: Callable[[int], Batch], steps: int):
        self.read, self.steps = read, steps
        self.pool, self.coming = ThreadPoolExecutor(1, "read ahead"), dict[int, Future[Batch]]()

    def __enter__(self) -> "ReadAhead[Batch]":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, in any order of steps. Raises what reading it does."""
        batch = self.coming.pop(step, None) or self.pool.submit(self.read, step)
        self.coming = {step + 1: self.pool.submit(self.read, step + 1)} if step + 1 < self.steps else {}
        return batch.result()
