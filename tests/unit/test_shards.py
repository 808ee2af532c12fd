"""Shards of a sample store: rows are read alone, damage is named and made again, processes share the work."""
import errno
import json
import os
import shutil
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import VIEWS, made_up_trajectories, randn, says
from helpers.faults import as_nobody, contents, finish, killed_after, needs_fork, start

from ppap_core.cli import main
from ppap_core.experts import shards
from ppap_core.experts.pairs import pairs_at, steps_in
from ppap_core.experts.samples import HELD_OUT, BatchSpec, SampleStore
from ppap_core.experts.shards import CHECKSUM, SHARD_SIZE, Shards
from ppap_core.experts.trajectories import Trajectories
from ppap_core.experts.upkeep import describe_store, merge_stores, open_store, verify_store
from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.io.folders import claim
from ppap_core.schedules import ExpertSchedule

MANIFEST = {"model": "made up", "seed": 5}
SHAPE = (3, 5, 7)
SCHEDULE = ExpertSchedule((0.1, 1.0, 10.0))


def made(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    images = randn(len(seeds), *SHAPE, seed=seeds[0]).tanh()
    return images, made_up_trajectories(images, seeds[0])


def filled(folder: Path, count: int, manifest: dict = MANIFEST) -> SampleStore:
    store = SampleStore(folder, manifest)
    store.fill(count, made)
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    """Four shards, made at a stretch."""
    return filled(tmp_path_factory.mktemp("whole") / "store", 4 * SHARD_SIZE)


@pytest.fixture
def copied(whole: SampleStore, tmp_path: Path) -> SampleStore:
    """The same four in a folder of their own."""
    return SampleStore(shutil.copytree(whole.folder, tmp_path / "copy"), MANIFEST)


# Rows

@pytest.mark.parametrize("view", VIEWS)
def test_rows_are_the_same_from_memory_and_from_files(whole: SampleStore, view: str, monkeypatch: pytest.MonkeyPatch):
    rows = torch.tensor([200, 3, 3, 255, 0, 64])
    steps = steps_in(whole, SCHEDULE, 1)[[50, 2, 2, 300]]
    kept = whole.images_at(rows), pairs_at(whole, steps, view), whole.random_images(BatchSpec(3, 20))
    monkeypatch.setattr(shards, "IN_MEMORY", 0)
    store = SampleStore(whole.folder, MANIFEST)
    read = store.images_at(rows), pairs_at(store, steps, view), store.random_images(BatchSpec(3, 20))
    for one, other in ((kept[0], read[0]), (kept[2], read[2]), *zip(kept[1], read[1], strict=True)):
        assert torch.equal(one, other)
    assert torch.equal(store.shards.read("noisy", rows), whole.noisy_vp[rows])


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_images_of_any_number_are_read_in_little_memory(tmp_path: Path):
    """Six gigabytes of black images, in files that take no room."""
    size = SHARD_SIZE * 3 * 2048 * 2048
    for index in range(8):
        header = json.dumps({"__metadata__": {"ppap": json.dumps({"first": index * SHARD_SIZE})}, "images": {
            "dtype": "U8", "shape": [SHARD_SIZE, 3, 2048, 2048], "data_offsets": [0, size]}}).encode()
        with Shards(tmp_path).file(index).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(file.tell() + size)
    store, before = SampleStore(tmp_path, {}), resident()
    assert store.random_images(BatchSpec(0, 2)).shape == (2, 3, 2048, 2048)
    assert len(store) == 8 * SHARD_SIZE and resident() - before < 400 * 2**20


# Damage

def spoil(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "description":
        save_tensors(file, load_tensors(file)[0], {})
    elif how == "another's":
        save_tensors(file, load_tensors(file)[0], {"first": 0})
    elif how == "too few":
        save_tensors(file, {name: rows[:9] for name, rows in load_tensors(file)[0].items()}, {"first": 2 * SHARD_SIZE})
    else:
        file.write_bytes({"empty": b"", "cut": data[:-1], "zeros": bytes(len(data))}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "zeros", "description", "another's", "too few"])
def test_a_damaged_shard_is_named_and_made_again(copied: SampleStore, whole: SampleStore, how: str, caplog):
    """Also where no more images are asked for than before it; the others stay."""
    asked: list[int] = []
    spoil(copied.shards.file(2), how)
    assert "shard_00002" in describe_store(copied)
    copied.fill(SHARD_SIZE, lambda seeds: asked.extend(seeds) or made(seeds))
    assert asked == list(range(5 + 2 * SHARD_SIZE, 5 + 3 * SHARD_SIZE))
    assert contents(copied.folder) == contents(whole.folder) and caplog.text.count("It is made again") == 1
    assert "shard_00002" in caplog.text


def test_a_changed_value_is_found_by_its_checksum(copied: SampleStore, whole: SampleStore, capsys):
    folder, file = str(copied.folder), copied.shards.file(1)
    assert not list(verify_store(copied))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not copied.shards.describe_damage(1), "its header and size are in order"
    for arguments in ([], ["--delete"]):
        with pytest.raises(SystemExit) as stopped:
            main(["samples", "verify", folder, *arguments])
        assert stopped.value.code == 1 and "shard_00001.safetensors holds other values" in capsys.readouterr().err
    copied.fill(4 * SHARD_SIZE, made)
    assert contents(copied.folder) == contents(whole.folder)
    main(["samples", "verify", folder])
    assert "256 images are whole" in capsys.readouterr().out


def test_shards_without_a_checksum_are_taken_as_they_are(tmp_path: Path):
    """Those of earlier versions."""
    store = filled(tmp_path, SHARD_SIZE)
    file = store.shards.file(0)
    tensors, header = load_tensors(file)
    save_tensors(file, {name: rows.clone() for name, rows in tensors.items() if name != CHECKSUM}, header)
    before = contents(tmp_path)
    assert not list(verify_store(store))
    filled(tmp_path, SHARD_SIZE)
    assert contents(tmp_path) == before


def test_a_torn_manifest_is_written_anew_where_nothing_is(tmp_path: Path, caplog):
    whole = (SampleStore(tmp_path, MANIFEST).folder / "manifest.json").read_bytes()
    for size in range(len(whole) - 2):
        (tmp_path / "manifest.json").write_bytes(whole[:size])
        assert SampleStore(tmp_path, MANIFEST).manifest == MANIFEST and (tmp_path / "manifest.json").read_bytes() == whole
    assert "written anew" in caplog.text


# Processes

def make_in_turn(folder: Path, own: str, other: str) -> None:
    """Make images while another process does, and note whose they are."""
    def generate(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
        with (folder.parent / own).open("a") as notes:
            print(seeds[0], file=notes)
        deadline = time.monotonic() + 20
        while not (folder.parent / other).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return made(seeds)
    SampleStore(folder, MANIFEST).fill(4 * SHARD_SIZE, generate)


@needs_fork
def test_two_processes_share_the_shards_of_a_store(tmp_path: Path, whole: SampleStore):
    """Neither makes what the other does, and both find all of it."""
    processes = [start(make_in_turn, tmp_path / "store", *names) for names in (("a", "b"), ("b", "a"))]
    assert [finish(process) for process in processes] == [0, 0]
    notes = [(tmp_path / name).read_text().split() for name in "ab"]
    assert sorted(map(int, notes[0] + notes[1])) == [5 + SHARD_SIZE * index for index in range(4)]
    assert contents(tmp_path / "store") == contents(whole.folder)


@needs_fork
def test_a_claim_ends_with_the_process_that_is_killed(tmp_path: Path, whole: SampleStore):
    def never_ready(seeds: list[int]) -> None:
        (tmp_path / "begun").touch()
        time.sleep(60)

    def on_wait() -> None:
        waited.append(killed_after(0, other))
    waited: list[bool] = []
    store = SampleStore(tmp_path / "store", MANIFEST)
    other = start(store.fill, SHARD_SIZE, never_ready)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    store.fill(4 * SHARD_SIZE, made, on_wait=on_wait)
    assert waited == [True] and contents(store.folder) == contents(whole.folder)
    assert not [file for file in store.folder.iterdir() if file.suffix == ".lock"]


def test_waiting_for_another_process_can_be_stopped(tmp_path: Path, caplog):
    def cancel() -> None:
        raise InterruptedError
    store = SampleStore(tmp_path, MANIFEST)
    with claim(store.shards.file(0)), pytest.raises(InterruptedError):
        store.fill(SHARD_SIZE, made, on_wait=cancel)
    assert "another process makes 1 files" in caplog.text


@needs_fork
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_filled_all_the_same(tmp_path: Path, monkeypatch, caplog, code: int):
    """As some shared folders are; that is said."""
    def refuse(*_) -> None:
        raise OSError(code, "no locks")
    monkeypatch.setattr("fcntl.flock", refuse)
    assert len(filled(tmp_path, SHARD_SIZE)) == SHARD_SIZE and "without locks" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "shard_00000.safetensors"]


@needs_fork
def test_what_a_killed_process_left_of_a_shard_is_deleted(tmp_path: Path):
    store = SampleStore(tmp_path, MANIFEST)
    for name in ("shard_00000.safetensors.123.part", "shard_00000.safetensors.lock"):
        (tmp_path / name).write_bytes(b"left")
    store.fill(SHARD_SIZE, made)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "shard_00000.safetensors"]


@needs_fork
def test_killed_fills_lose_no_shard(tmp_path: Path, whole: SampleStore):
    """A few of the kills of `make test-faults`."""
    folder, sizes = tmp_path / "store", [0]
    for delay in (0.0, 0.01, 0.02, 0.04, 0.08):
        killed_after(delay, start(filled, folder, 4 * SHARD_SIZE))
        sizes.append(len(Shards(folder)))
    assert sizes == sorted(sizes)
    filled(folder, 4 * SHARD_SIZE)
    assert contents(folder) == contents(whole.folder)


@needs_fork
def test_a_folder_that_may_only_be_read_is_read():
    """More images are refused in words."""
    def read_only(folder: Path) -> None:
        store = filled(folder, SHARD_SIZE)
        assert store.random_images(BatchSpec(0, 4)).shape == (4, *SHAPE)
        assert "64 images" in describe_store(open_store(folder)) and not list(verify_store(store))
        with says(OSError, "could not write shard_00001.safetensors", "can be written"):
            store.fill(2 * SHARD_SIZE, made)
        with says(OSError, "could not write manifest.json", "can be written"):
            SampleStore(folder / HELD_OUT, MANIFEST)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        filled(folder, SHARD_SIZE)
        folder.chmod(0o555)
        assert finish(start(as_nobody, read_only, folder)) == 0
        folder.chmod(0o755)


@pytest.mark.parametrize("year", [1, 130])
def test_a_clock_that_is_set_changes_nothing(copied: SampleStore, whole: SampleStore, year: int):
    """Files of 1971, and of 2100, which are of the future after a clock was set back."""
    copied.shards.file(3).unlink()
    for file in copied.folder.iterdir():
        os.utime(file, (year * 31_557_600,) * 2)
    copied.fill(4 * SHARD_SIZE, made)
    assert contents(copied.folder) == contents(whole.folder)


# Merging

def test_a_store_takes_over_what_it_lacks(tmp_path: Path, copied: SampleStore, whole: SampleStore, capsys):
    """From one of the same seed, of later seeds, and not what is damaged."""
    store, same = copied, SampleStore(shutil.copytree(whole.folder, tmp_path / "same"), MANIFEST)
    later = filled(tmp_path / "later", 2 * SHARD_SIZE, MANIFEST | {"seed": 5 + 2 * SHARD_SIZE})
    for each, missing in ((store, (1, 2, 3)), (same, (2, 3))):
        for index in missing:
            each.shards.file(index).unlink()
    same.shards.file(0).write_bytes(b"")
    main(["samples", "merge", *(str(each.folder) for each in (store, later, same))])
    assert "2 files from" in (said := capsys.readouterr().out) and "1 files from" in said and "256 images" in said
    assert contents(store.folder) == contents(whole.folder)
    assert merge_stores(store, same) == 0, "it is there already"


def test_held_out_images_are_merged_too(tmp_path: Path):
    store, other = filled(tmp_path / "a", SHARD_SIZE), filled(tmp_path / "b", SHARD_SIZE)
    other.hold_out().fill(SHARD_SIZE, made)
    assert merge_stores(store, other) == 1 and store.held_out and len(store.held_out) == SHARD_SIZE


@pytest.mark.parametrize("other, words", [
    ({"model": "another"}, ["they differ in model"]),
    ({"seed": 5 + 7}, ["seed is 12", "multiple of 64"]),
    ({"seed": 5 - SHARD_SIZE}, ["seed is -59", "expected 5"]),
])
def test_images_that_do_not_belong_together_stay_apart(tmp_path: Path, other: dict, words: list[str]):
    with says(ValueError, *words, "keep them apart"):
        merge_stores(SampleStore(tmp_path / "a", MANIFEST), SampleStore(tmp_path / "b", MANIFEST | other))


def test_the_command_tells_what_a_folder_holds(whole: SampleStore, capsys):
    main(["samples", "inspect", str(whole.folder)])
    said = capsys.readouterr().out
    assert '"model": "made up"' in said and "256 images from seed 5 on" in said and "images: 3 x 5 x 7 for each" in said
