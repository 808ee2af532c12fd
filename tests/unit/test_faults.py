"""Kills at random moments, full disks and losses of power: nothing is lost, and what goes on ends as if nothing had been.

`make test-faults` runs it alone: processes are forked off one that has trained nothing, since torch wants that.
"""
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import SmallNet, disturb, fixed_weights, images, made_up_trajectories, randn, small_guider
from helpers.faults import contents, finish, killed_after, needs_fork, start
from helpers.gaussian import GaussianMixture

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.experts.checkpoint import save_bank
from ppap_core.experts.lesson import DistillConfig, distill_expert
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.trajectories import Trajectories
from ppap_core.guidance.prior import PriorConfig, PriorObjective, run_prior
from ppap_core.guidance.terms import Term
from ppap_core.io.files import DamagedFileError, read_header, save_tensors
from ppap_core.noise import expand
from ppap_core.schedules import ExpertSchedule
from ppap_core.training.finetune import FineTune, as_lora, fine_tune
from ppap_core.training.loop import RunOptions

pytestmark = [pytest.mark.faults, needs_fork]

KILLS = 44        # of each job
SMALL = 8192      # bytes of a file that is read after every cut
CUTS = 500        # of a larger one
RESUMED_CUTS = 5  # of a file after which the job goes on

FORMER_SHARDS = {f"store/shard_{index:05d}.safetensors" for index in range(5)}  # not the last file that is written

Job = Callable[[Path], None]
"""Makes files in a folder, from where it was stopped."""


# Jobs

def generate(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    made = randn(len(seeds), 3, 5, 7, seed=seeds[0] % 2**32).tanh()
    return made, made_up_trajectories(made, seeds[0] % 2**32)


def fill_store(folder: Path) -> None:
    store = SampleStore(folder / "store", {"model": "made up", "seed": 3})
    store.fill(6 * SHARD_SIZE, generate)
    store.hold_out().fill(SHARD_SIZE, generate)


def new_bank(seed: int = 0) -> ExpertBank:
    return ExpertBank(base_network(small_guider()), ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(2), "denoised", seed=seed)


def distil(folder: Path) -> None:
    store, guider, bank = SampleStore(folder / "store", {"seed": 0}), small_guider(), new_bank()
    store.fill(SHARD_SIZE, generate)
    for index in range(2):
        distill_expert(guider, bank, index, store, DistillConfig(steps=20, batch=3, lr=1e-2),
                       RunOptions(state_file=folder / f"expert_{index}.state.safetensors", save_every=1))
    save_bank(folder / "bank.safetensors", bank, guider)


def tune(folder: Path) -> None:
    net = fixed_weights(SmallNet((3,), dense=True)).requires_grad_(False)

    def predict(chosen: torch.Tensor, noise: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = 0.1 * 20**share
        small = net(chosen + expand(sigma, chosen) * noise)
        return torch.nn.functional.interpolate(small, chosen.shape[-2:]), sigma
    changes, _ = fine_tune(net, predict, images(5), FineTune(40, 2, 3, 0.01), 1.0, RunOptions(
        {"model": "net"}, folder / "lora.state.safetensors", save_every=1))
    save_tensors(folder / "lora.safetensors", as_lora(changes, "net."), {})


def search(folder: Path) -> None:
    mixture = GaussianMixture.of_shape((3, 5, 4))
    term, begun = Term(mixture.guider().aim(torch.tensor([1]))), randn(2, 3, 5, 4, dtype=torch.float64)
    points, _ = run_prior(PriorObjective(mixture, [term]), begun, PriorConfig(60, 0.5), [5, 6], options=RunOptions(
        {"model": "mixture"}, folder / "prior.state.safetensors", save_every=1))
    save_tensors(folder / "points.safetensors", {"points": points}, {})


def save_often(folder: Path) -> None:
    """Write over experts time and again; the last ones are always the same."""
    for seed in range(20):
        bank = new_bank(seed)
        disturb(bank, 0, seed)
        save_bank(folder / "bank.safetensors", bank, small_guider())


JOBS: dict[str, Job] = {"store": fill_store, "distillation": distil, "lora": tune, "prior": search, "save": save_often}


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def straight(job: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a job that nothing stopped, and its seconds."""
    new_bank()  # imports what the processes need
    folder, begun = tmp_path_factory.mktemp(job), time.monotonic()
    assert finish(start(JOBS[job], folder)) == 0
    return folder, time.monotonic() - begun


def reached(folder: Path) -> dict[str, int]:
    """Files, all of them whole, and the steps of those that are states of trainings."""
    for manifest in folder.rglob("*.json"):
        json.loads(manifest.read_text())
    return {str(file): len(json.loads(read_header(file)[1]["ppap"]).get("losses", []))
            for file in folder.rglob("*.safetensors")}


# Faults

def test_kills_lose_nothing(job: str, straight: tuple[Path, float], tmp_path: Path):
    """After each of them all files are whole and no step is lost; what goes on ends with the same bytes."""
    (expected, seconds), draws, kills, folder = straight, random.Random(job), 0, tmp_path / "0"
    while kills < KILLS:
        folder.mkdir(exist_ok=True)
        before = reached(folder)
        was_killed = killed_after(draws.uniform(0, seconds), start(JOBS[job], folder))
        after = reached(folder)
        assert all(after[name] >= steps for name, steps in before.items())
        kills += was_killed
        if not was_killed or kills == KILLS:
            assert finish(start(JOBS[job], folder)) == 0
            assert contents(folder) == contents(expected)
            folder = tmp_path / str(len([*tmp_path.iterdir()]))


def test_two_processes_on_one_folder_end_alike(job: str, straight: tuple[Path, float], tmp_path: Path):
    processes = [start(JOBS[job], tmp_path) for _ in range(2)]
    assert [finish(process) for process in processes] == [0, 0]
    assert contents(tmp_path) == contents(straight[0])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, of one page."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={max(size, 4096)}", disk], check=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_full_disk_is_said_and_with_room_it_goes_on(job: str, straight: tuple[Path, float], disk: Path, share: float):
    expected = contents(straight[0])
    errors = disk.parent / "said.error"
    resize(disk, int(share * sum(map(len, expected.values()))))
    assert finish(start(JOBS[job], disk, errors=errors)) == 1
    assert "could not write" in errors.read_text() and "No space left" in errors.read_text()
    reached(disk)
    resize(disk, 2**26)
    assert finish(start(JOBS[job], disk)) == 0
    assert contents(disk) == expected


def test_a_file_that_is_cut_off_is_made_again(job: str, straight: tuple[Path, float], tmp_path: Path):
    """A loss of power may cut the last file that was written at any place: that is found, and the job ends as ever."""
    expected = contents(straight[0])
    for name in (name for name in expected if name.endswith(".safetensors") and name not in FORMER_SHARDS):
        data, folder = expected[name], Path(shutil.copytree(straight[0], tmp_path / name.replace("/", " ")))
        for size in range(len(data) - 1, -1, -1 if len(data) <= SMALL else -(len(data) // CUTS)):
            os.truncate(folder / name, size)
            with pytest.raises(DamagedFileError):
                read_header(folder / name)
        for size in random.Random(name).sample(range(1, len(data)), RESUMED_CUTS - 2) + [0, len(data) - 1]:
            (folder / name).write_bytes(data[:size])
            assert finish(start(JOBS[job], folder)) == 0
            assert contents(folder) == expected
