"""Readouts: heads on a denoiser's features say what the plain guider says, resumable to the bit, with the exact gradient."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CLASSES, H, SmallNet, W, images, level, made_up_trajectories, randn, same, says, small_guider, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from ppap_core.experts.knowledge import describe_knowledge, knowledge_of, remember
from ppap_core.experts.lesson import DistillConfig
from ppap_core.experts.readout import (
    ReadoutHead,
    ReadoutNetwork,
    ReadoutSpec,
    new_readout,
    reading,
    reads_features,
    require_readable,
    with_readout,
)
from ppap_core.experts.readout_distill import FeatureSamples, distill_readout
from ppap_core.experts.readout_file import is_readout_file, load_readout, save_readout
from ppap_core.experts.readout_knowledge import measure_readout
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.guidance.gradients import Prediction, energy_gradient
from ppap_core.guidance.shift import guidance_shift
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import clean
from ppap_core.guiders.rules import rule_guider
from ppap_core.noise import expand
from ppap_core.schedules import ExpertSchedule

SCHEDULE = ExpertSchedule((0.04, 1.0, 30.0))
CONFIG = DistillConfig(steps=6, batch=4, lr=1e-2, seed=3)
CHANNELS = 12


class Inner(nn.Module):
    """Inner features of a made-up denoiser, a map or tokens."""

    def __init__(self, tokens: bool = False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv = nn.Conv2d(3, CHANNELS, 5, stride=4, padding=2).requires_grad_(False)
        self.tokens = tokens

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x / (1 + expand(sigma, x) ** 2).sqrt()))
        return h.flatten(2).mT if self.tokens else h


def new(guider, inner: nn.Module | None = None, seed: int = 0) -> ReadoutNetwork:
    """An untrained readout of a guider."""
    x = images(2, dtype=next(guider.net.parameters()).dtype)
    return new_readout(guider, SCHEDULE, "blocks.1", (inner or Inner())(x, clean(x)), guider.predict(x, clean(x)), seed)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SampleStore:
    store = SampleStore(tmp_path_factory.mktemp("store"), {"model": "made up"})
    ends = images(SHARD_SIZE)
    store.fill(SHARD_SIZE, lambda seeds: (ends, made_up_trajectories(ends)))
    return store


@pytest.mark.parametrize("task, tokens", [("class", False), ("class", True), ("segmentation", False), ("number", True)])
def test_its_gradient_is_that_of_what_it_says(task: str, tokens: bool):
    """In the noisy state, through the features: by finite differences in double precision."""
    guider, inner = small_guider(task, dtype=torch.float64), Inner(tokens).double()
    connected = reading(with_readout(guider, new(guider, inner).double()), inner)
    x, along = 2 * randn(3, 3, H, W, dtype=torch.float64), randn(3, 3, H, W, seed=1, dtype=torch.float64)
    sigma, step = level(2.0, x), 1e-5
    energy, gradient = energy_gradient(connected, x, sigma)
    ahead, behind = (energy_gradient(connected, x + sign * step * along, sigma)[0] for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    assert torch.allclose((gradient * along).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-9) and bool(slope.abs().min() > 0)


def test_each_head_serves_its_own_noise_levels():
    guider, inner = small_guider("class"), Inner()
    readout = new(guider)
    features = inner(images(), level(0.5, images()))
    low, high = (readout.read(features, torch.full((3,), sigma)) for sigma in (0.5, 2.0))
    assert torch.equal(low, readout.heads[0](features)) and torch.equal(high, readout.heads[1](features))
    assert not torch.equal(low, high)


def test_on_clean_images_it_is_the_plain_guider():
    """Aim and preview look at images without noise; with noise there is nothing to look at but features."""
    guider = small_guider("class")
    aimed = with_readout(guider, new(guider))
    assert torch.equal(aimed.predict(images(), clean(images())), guider.predict(images(), clean(images())))
    with says(ValueError, "not at noisy images"):
        aimed.predict(images(), level(0.5, images()))


def test_it_learns_what_the_plain_guider_says(store: SampleStore):
    guider, inner = small_guider("class"), Inner()
    readout = new(guider)
    before = snapshot(readout.plain)
    losses = distill_readout(guider, readout, FeatureSamples(store, inner), replace(CONFIG, steps=30, batch=8))
    assert all(sum(head[-10:]) < 0.8 * sum(head[:10]) for head in losses)
    assert same(before, snapshot(readout.plain))
    assert not any(parameter.requires_grad for parameter in readout.parameters())


def test_a_dense_head_follows_the_image(store: SampleStore):
    guider, inner = small_guider("depth"), Inner()
    readout = new(guider)
    losses = distill_readout(guider, readout, FeatureSamples(store, inner), replace(CONFIG, steps=16, batch=8))
    assert all(sum(head[-4:]) < sum(head[:4]) for head in losses)
    x = images()
    output = readout.read(inner(x, level(0.5, x)), level(0.5, x))
    assert output.shape == (3, 1, 4 * (H // 4), 4 * (W // 4))


class Stopped(Exception):
    """Cancel was pressed."""


def test_a_stopped_distillation_resumes_to_the_bit(store: SampleStore, tmp_path: Path):
    guider, inner = small_guider("class"), Inner()
    whole, resumed = new(guider), new(guider)
    samples = FeatureSamples(store, inner, model={"model": "of the test"})
    losses = distill_readout(guider, whole, samples, CONFIG)

    def stop(index: int, step: int, loss: float) -> None:
        if (index, step) == (1, 2):
            raise Stopped
    with pytest.raises(Stopped):
        distill_readout(guider, resumed, samples, CONFIG, tmp_path, stop)
    resumed = new(guider)
    assert distill_readout(guider, resumed, samples, CONFIG, tmp_path) == losses
    assert same(whole.state_dict(), resumed.state_dict())
    asked = []
    finished = new(guider)
    counting = FeatureSamples(store, lambda x, sigma: asked.append(1) or inner(x, sigma), samples.model)
    assert distill_readout(guider, finished, counting, CONFIG, tmp_path) == losses and not asked
    assert same(whole.state_dict(), finished.state_dict())
    other = replace(samples, model={"model": "another"})
    with says(ValueError, "another training"):
        distill_readout(guider, new(guider), other, CONFIG, tmp_path)


def test_what_the_heads_know_is_measured_and_kept(store: SampleStore, tmp_path: Path):
    guider, inner = small_guider("class"), Inner()
    readout, samples = new(guider), FeatureSamples(store, inner)
    untrained = measure_readout(guider, readout, samples)
    distill_readout(guider, readout, samples, replace(CONFIG, steps=40, batch=8))
    known = measure_readout(guider, readout, samples)
    assert all(after.expert > before.expert for after, before in zip(known, untrained, strict=True))
    assert all(after.plain == before.plain and not after.held_out for after, before in zip(known, untrained, strict=True))
    remember(readout, known)
    save_readout(tmp_path / "a.safetensors", readout, guider)
    loaded = load_readout(tmp_path / "a.safetensors", guider)
    assert knowledge_of(loaded) == known
    text = describe_knowledge(loaded)
    assert "head" in text and "expert" not in text and text.endswith("on the model's prediction.")


def test_the_features_are_asked_for_once_for_each_step(store: SampleStore):
    guider, inner = small_guider("class"), Inner()
    asked: list[int] = []
    distill_readout(guider, new(guider), FeatureSamples(store, lambda x, s: asked.append(len(x)) or inner(x, s)), CONFIG)
    assert sum(asked) == store.sigmas.numel() and max(asked) == CONFIG.batch


def test_wide_channels_are_tamed(store: SampleStore):
    """The spread of each channel in training is divided out: a scaled denoiser gives the same readout."""
    guider, inner = small_guider("class"), Inner()
    scale = torch.linspace(1, 4096, CHANNELS).exp2().clamp_max(4096).round()[:, None, None]
    plain, scaled = new(guider), new(guider)
    distill_readout(guider, plain, FeatureSamples(store, inner), CONFIG)
    distill_readout(guider, scaled, FeatureSamples(store, lambda x, sigma: scale * inner(x, sigma)), CONFIG)
    x = images()
    features = inner(x, level(0.5, x))
    assert torch.allclose(plain.read(features, level(0.5, x)), scaled.read(scale * features, level(0.5, x)), atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_a_head_learns_from_maps_with_channels_last(size: tuple[int, int]):
    """Tokens that were made a map have such strides, of which torch's own norm of maps crashes in the gradient."""
    head = ReadoutHead(ReadoutSpec("a", 64, (8,)))
    tokens = randn(4, size[0] * size[1], 64).requires_grad_(True)
    head(tokens.mT.unflatten(2, size)).sum().backward()
    assert tokens.grad.isfinite().all() and head.norm.weight.grad.any()


def test_an_interval_without_steps_is_refused_before_training(store: SampleStore):
    guider = small_guider("class")
    x = images(2)
    readout = new_readout(guider, ExpertSchedule((0.001, 0.002, 0.003)), "a", Inner()(x, clean(x)), torch.zeros(2, CLASSES))
    with says(ValueError, "use fewer heads"):
        distill_readout(guider, readout, FeatureSamples(store, Inner()), CONFIG)


@pytest.mark.parametrize("task", ["class", "depth"])
def test_a_file_gives_the_same_readout(task: str, tmp_path: Path):
    guider, inner = small_guider(task), Inner()
    readout = new(guider, seed=5)
    readout.head(1).mean.fill_(0.25)
    readout.training_info = {"samples": {"seed": 3}}
    save_readout(tmp_path / "a.safetensors", readout, with_readout(guider, readout))
    assert is_readout_file(tmp_path / "a.safetensors")
    loaded = load_readout(tmp_path / "a.safetensors", guider)
    assert same(loaded.state_dict(), readout.state_dict()) and loaded.training_info == readout.training_info
    assert (loaded.spec, loaded.schedule) == (readout.spec, readout.schedule)
    features, sigma = inner(images(), level(2.0, images())), level(2.0, images())
    assert torch.equal(loaded.read(features, sigma), readout.read(features, sigma))


def test_a_file_of_another_guider_is_refused(tmp_path: Path):
    guider = small_guider("class")
    save_readout(tmp_path / "a.safetensors", new(guider), guider)
    other = replace(guider, net=type(guider.net)(SmallNet(width=16)))
    with says(ValueError, "its fingerprint is"):
        load_readout(tmp_path / "a.safetensors", other)
    with says(ValueError, "its task is"):
        load_readout(tmp_path / "a.safetensors", small_guider("depth"))


def test_what_cannot_be_read_is_refused():
    guider, x = small_guider("class"), images()
    readout = new(guider)
    connected = reading(with_readout(guider, readout), lambda x, sigma: F.pad(Inner()(x, sigma), (0, 0, 0, 0, 0, 4)))
    with says(ValueError, "12 features at blocks.1, but this one has 16"):
        connected.predict(x, level(0.5, x))
    with says(ValueError, "tokens and no map"):
        new(small_guider("depth"), Inner(tokens=True))
    with says(ValueError, "without cut-outs"):
        reading(replace(with_readout(guider, readout), cutouts=2), Inner())
    with says(ValueError, "has no readout"):
        reading(guider, Inner())
    with says(ValueError, "is a rule"):
        require_readable(rule_guider("brightness"))
    with says(ValueError, "marks what a text asks for"):
        require_readable(small_guider("mask"))
    with says(ValueError, "three dimensions"):
        ReadoutNetwork(readout.plain, SCHEDULE, ReadoutSpec("a", 4, (8, 8), dense=True))
    assert reads_features(with_readout(guider, readout)) and not reads_features(guider)


def test_a_term_of_a_readout_guides_in_the_noisy_state():
    """Ahead of no guidance by its own energy, without a vjp of the prediction."""
    guider, inner = small_guider("class"), Inner()
    connected = reading(with_readout(guider, new(guider)).aim(torch.tensor([2])), inner)
    x = 2 * randn(3, 3, H, W)
    sigma = level(2.0, x)
    term = Term(connected, 0.5, normalized=True, backprop_through_model=True)
    guidance = guidance_shift([term], Prediction(x, sigma, x / 5))
    before, after = (connected.energy(state / 5**0.5, sigma) for state in (x, x + 0.1 * guidance.delta))
    assert bool((after < before).all())
