"""Folders: made and kept for good, and shared by processes, of which one makes each file."""
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

WITHOUT_LOCKS = {None, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # of some shared disks; None: filelock's

log = logging.getLogger(__name__)


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
    system on a file beside the name, which is deleted when the claim is given up. Missing folders are made. Where the disk
    knows no locks, that is told in the log, and every file is ours. OSError in words when the folder cannot be written.
    """
    lock = FileLock(f"{file}.lock")
    is_ours = _acquire(lock, file, seconds)
    try:
        yield is_ours
    finally:
        if is_ours:
            with suppress(OSError):  # while it is ours, or another process may hold it; Windows deletes it on release
                Path(lock.lock_file).unlink()
            lock.release()


def _acquire(lock: FileLock, file: Path, seconds: float) -> bool:
    try:
        make_folder(file.parent)
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) not in WITHOUT_LOCKS:
            raise OSError(f"could not write {file.name} into {file.parent}: {error}. Choose a folder that can be written; "
                          "what was there before is untouched.") from error
        log.warning("%s lies on a disk without locks (%s): let one process at a time fill it", file.parent, error)
    return True
