"""Experts that several processes distill together are those of a single process, from the command line as from a graph."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import images, made_up_trajectories, randn, says

from ppap_core.cli import main
from ppap_core.experts.bank import ExpertBank
from ppap_core.experts.checkpoint import load_bank
from ppap_core.experts.origin import Origin, origin_of
from ppap_core.experts.processes import assign
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.source import FILE, Source, load_source, save_source, schedule_for
from ppap_core.experts.trajectories import Trajectories
from ppap_core.guiders.latents import LatentSpace
from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.tinyworld.loaders import load_guider

SIDE = 32
ORIGIN = Origin("Tiny", "tiny.safetensors", 0.5, 0.02, 80.0)
SPACE = LatentSpace("Test", randn(5, 3), randn(3))
SHORT = ["--steps", "5", "--batch", "9", "--rank", "2", "--experts", "3", "--device", "cpu", "--seed", "3"]
LAUNCHERS = {"torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
             "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
                            "--dynamo_backend", "no", "--num_processes"]}


def of_latents(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    """Images of 3 x H x W, of latents of 5 channels."""
    return images(len(seeds), seeds[0]), made_up_trajectories(randn(len(seeds), 5, 5, 7, seed=seeds[0]), seeds[0])


def of_pixels(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    made = randn(len(seeds), 3, SIDE, SIDE, seed=seeds[0]).tanh()
    return made, made_up_trajectories(made, seeds[0], (20.0, 1.5, 0.3))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    store = SampleStore(tmp_path_factory.mktemp("output") / "ppap_samples" / "made", {"seed": 0})
    store.fill(SHARD_SIZE, of_pixels)
    save_source(store, Source(None, ORIGIN))
    return store


def distil(store: SampleStore, out: Path, *more: str) -> ExpertBank:
    main(["distill", str(store.folder), "tinyworld/class", str(out), "--states", str(out.parent / out.stem), *SHORT, *more])
    return load_bank(out, load_guider("class"))


# Who trains what

@pytest.mark.parametrize("experts, processes, ranks", [
    (3, 1, [(0,), (0,), (0,)]),
    (5, 2, [(0,), (1,), (0,), (1,), (0, 1)]),
    (5, 4, [(0,), (1,), (2,), (3,), (0, 1, 2, 3)]),
    (2, 5, [(0, 2, 4), (1, 3)]),
    (1, 40, [tuple(range(32))])])
def test_experts_are_spread_first_and_then_shared(experts: int, processes: int, ranks: list):
    assert assign(experts, processes, 32) == list(enumerate(ranks))


def test_experts_that_begin_at_their_neighbour_are_shared_by_all():
    assert assign(3, 2, 32, in_order=True) == [(0, (0, 1)), (1, (0, 1)), (2, (0, 1))]


# What a store says of itself

def test_a_store_of_latents_says_which(tmp_path: Path):
    store = SampleStore(tmp_path / "store", {"seed": 0})
    store.fill(SHARD_SIZE, of_latents)
    with says(ValueError, "store", FILE, "generate these samples once more"):
        load_source(store)
    for space in (SPACE, LatentSpace("Later", SPACE.factors, SPACE.bias)):  # the first one stays
        save_source(store, Source(space, ORIGIN))
    source = load_source(store)
    assert source.space and source.space.name == "Test" and source.origin == ORIGIN
    assert torch.equal(source.space.factors, SPACE.factors) and torch.equal(source.space.bias, SPACE.bias)


@pytest.mark.parametrize("header, tensors", [
    ({"space": 3}, {}), ({"space": "Test", "shuffle": 1}, {}),
    ({"space": "Test", "shuffle": 0}, {"factors": SPACE.factors, "bias": SPACE.bias}),
    ({"space": "Test", "shuffle": 1}, {"factors": torch.zeros(3, 5), "bias": SPACE.bias}),
    ({"space": "Test", "shuffle": 1}, {"factors": SPACE.factors / 0, "bias": SPACE.bias})], ids=range(5))
def test_a_strange_source_is_refused(tmp_path: Path, header: dict, tensors: dict):
    store = SampleStore(tmp_path / "store", {"seed": 0})
    save_tensors(store.folder / FILE, tensors, header)
    with says(ValueError, FILE, "delete it"):
        load_source(store)


def test_images_without_a_source_are_those_of_pixels(store: SampleStore, tmp_path: Path):
    plain = SampleStore(tmp_path / "store", {"seed": 0})
    plain.fill(SHARD_SIZE, of_pixels)
    assert load_source(plain) == Source() and load_source(store) == Source(None, ORIGIN)


# The command

def test_the_command_distills_and_saves(store: SampleStore, tmp_path: Path, capsys: pytest.CaptureFixture):
    bank = distil(store, tmp_path / "bank.safetensors")
    assert bank.schedule == schedule_for(store, 3) and bank.view == "denoised" and origin_of(bank) == ORIGIN
    assert "expert 3 of 3, step 5 of 5" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["nowhere", "tinyworld/class"], "manifest.json"),
    (["{store}", "tinyworld/tags"], "tinyworld/depth"),
    (["{store}", "nowhere"], "nowhere"),
    (["{store}", "tinyworld/class", "--experts", "100"], "fewer experts")], ids=range(4))
def test_what_cannot_be_is_one_sentence(store: SampleStore, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list,
                                        words: str):
    folder, guider, *more = (each.format(store=store.folder) for each in arguments)
    with pytest.raises(SystemExit) as exit:
        main(["distill", folder, guider, str(tmp_path / "x.safetensors"), *more])
    assert exit.value.code == 1 and words in capsys.readouterr().err


# Several processes

def launched(launcher: str, processes: int, store: SampleStore, out: Path, *more: str) -> str:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(processes), "-m", "ppap_core.cli", "distill",
               str(store.folder), "tinyworld/class", str(out), "--states", str(out.parent / out.stem), *SHORT, *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2],
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.wide
@pytest.mark.parametrize("launcher, processes, more", [
    ("torchrun", 2, []), ("accelerate", 2, []), ("torchrun", 5, []), ("torchrun", 2, ["--view", "noisy"]),
    ("torchrun", 2, ["--preset", "as set, fast"])], ids=range(5))
def test_processes_end_as_a_single_one(store: SampleStore, tmp_path: Path, launcher: str, processes: int, more: list):
    """Experts of a process alone are the same to the bit, and shared ones but for rounding."""
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    distil(store, alone, *more)
    launched(launcher, processes, store, together, *more)
    (expected, header), (found, other) = load_tensors(alone), load_tensors(together)
    losses = header["recipe"].pop("final_losses"), other["recipe"].pop("final_losses")
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    header["recipe"].pop("knowledge"), other["recipe"].pop("knowledge")
    assert header == other and found.keys() == expected.keys()
    shared = {expert for expert, ranks in assign(3, processes, 9, "noisy" in more) if len(ranks) > 1}
    for name, tensor in expected.items():
        expert = int(name.partition(".")[0].removeprefix("expert_"))
        distance = float((found[name] - tensor).norm() / tensor.norm())
        assert distance < 0.02 if expert in shared else distance == 0, name


@pytest.mark.wide
def test_a_stopped_crew_goes_on_alone_and_the_other_way_round(store: SampleStore, tmp_path: Path):
    out, half = tmp_path / "x.safetensors", tmp_path / "x"
    launched("torchrun", 2, store, out)
    whole = out.read_bytes()
    next(half.rglob("expert_1.state.safetensors")).unlink()
    distil(store, out)
    assert out.read_bytes() == whole
    next(half.rglob("expert_0.state.safetensors")).unlink()
    assert "expert 1 of 3, step 5" in launched("torchrun", 2, store, out)
    assert out.read_bytes() == whole
