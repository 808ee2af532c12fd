"""Strange inputs for everything that reads a file or a name, and a watch over what each of them costs and does."""
import copy
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis makes the inputs: pip install hypothesis")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("PPAP_FUZZ", 200))  # of all tests together; `make fuzz` takes 100,000
SECONDS, MEGABYTES = 2.0, 200                   # that one input may take
LONGEST = 1500                                  # characters of a sentence

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "shutil.rmtree", "shutil.copyfile", "shutil.move"}
NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"}


def inputs(share: float) -> Callable:
    """Run a test on a share of all inputs."""
    return settings(max_examples=max(int(INPUTS * share), 5), deadline=None, database=None, derandomize=INPUTS <= 1000,
                    suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False,
                    phases=(Phase.explicit, Phase.generate, Phase.shrink))


class _Watch:
    """Notes what this process does to files while it is on; an audit hook cannot be taken out again."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        if self.inside is None:
            return
        if event in NEVER:
            self.seen.append(f"{event} {args[:1]}")
        elif event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            by_handle = event != "open" and isinstance(args[-1], int) and args[-1] >= 0  # of a folder that was opened before
            paths = () if by_handle else args[:2 if event == "os.rename" else 1]
            self.seen += [f"{event} {path}" for path in paths if not self._allows(path)]

    def _allows(self, path: object) -> bool:
        """A number is a file that was opened before."""
        return isinstance(path, int) or Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.inside)


_watch = _Watch()
sys.addaudithook(_watch)


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS as they are, VmHWM at their highest."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not on Linux
        return 0
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    _forget_peak()
    memory, started = _memory("VmRSS"), time.process_time()
    _watch.inside, _watch.seen = folder, []
    try:
        yield
    finally:
        _watch.inside = None
    seconds, memory = time.process_time() - started, _memory("VmHWM") - memory
    assert not _watch.seen, _watch.seen
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert memory < MEGABYTES * 2**20, f"{memory / 2**20:.0f} MiB"


def harmless(read: Callable[[], object], folder: Path, *errors: type[Exception], names: str = "") -> bool:
    """Read something strange: it may go well, or end in one documented error in words; returns whether it went well.

    folder: all that may be written to. errors: documented ones, of exactly these types. names: what each sentence
    has to hold.
    """
    with _watched(folder):
        try:
            read()
            return True
        except Exception as error:
            if type(error) not in errors:
                raise
            message = str(error)
    assert message.encode() and len(message) < LONGEST and names in message, message
    return False


@contextmanager
def keeping_to(folder: Path) -> Iterator[Path]:
    """Context manager: a folder in which temporary files are made as well, and none of compiled Python."""
    before, compiled = tempfile.tempdir, sys.dont_write_bytecode
    (folder / "tmp").mkdir()
    tempfile.tempdir, sys.dont_write_bytecode = str(folder / "tmp"), True
    try:
        yield folder
    finally:
        tempfile.tempdir, sys.dont_write_bytecode = before, compiled


# Values

NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([
    -2**63, -10**9, 10**4, 10**5, 10**6, 10**7, 2**31, 10**9, 2**53, 2**63, 10**18, 10**30, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True, width=32))
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from([
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:\\x", "nul", "a\x00b", "a\nb", "\ud800", "\u202e", "x" * 10_000,
    "%s%n", "{0}", "$HOME", "~", "1e400", "-1", "NaN", "None", "true", "__class__"]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)), max_leaves=8)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, inner in items for each in [(*path, key), *places(inner, (*path, key))]]


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A JSON object of which some values are replaced, moved or taken out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        if not (paths := places(value)):
            break
        *outer, last = draw(st.sampled_from(paths))
        holder = value
        for key in outer:
            holder = holder[key]
        if draw(st.integers(0, 4)) == 0:
            del holder[last]
        elif isinstance(holder, dict) and draw(st.integers(0, 9)) == 0:
            holder[draw(TEXTS)] = draw(VALUES)
        else:
            holder[last] = draw(VALUES)
    return value


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """A file cut off, lengthened, or with other bytes in it."""
    data = bytearray(data)
    head = min(len(data), 8 + struct.unpack("<Q", bytes(data[:8]).ljust(8, b"\0"))[0])
    for _ in range(draw(st.integers(1, 4))):
        kind, at = draw(st.integers(0, 4)), draw(st.integers(0, max(head if draw(st.booleans()) else len(data), 1) - 1))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == 2:
            del data[at:at + draw(st.integers(1, 16))]
        else:
            data[at:at + 1] = draw(st.binary(min_size=1, max_size=8 if kind == 3 else 1))
    return bytes(data)


def with_header(data: bytes, change: Callable[[dict], Any]) -> bytes:
    """A safetensors file whose header is changed, and whose tensors are not."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(change(json.loads(data[8:8 + size]))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + size:]
