"""Folders: made and kept for good, and shared by processes, of which one makes each file."""
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, on the disk when it returns. OSError if it cannot be made."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        with suppress(OSError):  # some shared folders do not know the call
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextmanager
def claim(file: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Context manager: claim a file that is to be made; gives whether it is ours, and not another process's.

    seconds: to wait for it; 0: not at all. A claim ends with its process, also when that is killed: it is a lock of the
    system on a file beside the name, which is deleted when the claim is given up. Missing folders are made.
    OSError in words when the folder cannot be written.
    """
    lock = FileLock(f"{file}.lock")
    try:
        make_folder(file.parent)
        lock.acquire(timeout=seconds)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise OSError(f"could not write {file.name} into {file.parent}: {error}. Choose a folder that can be written; what "
                      "was there before is untouched.") from error
    try:
        yield True
    finally:
        with suppress(OSError):  # while it is ours, or another process may hold it; Windows deletes it on release
            Path(lock.lock_file).unlink()
        lock.release()
