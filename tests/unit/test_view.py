"""Images of latents: linear colours, and stems that start as them and learn."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import level, randn, same, says, small_guider

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.lesson import DistillConfig, distill_expert, sample_batch
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.trajectories import Trajectories, TrajectoryRecorder
from ppap_core.guidance.gradients import Prediction, energy_gradient
from ppap_core.guidance.memory import gradient_bytes
from ppap_core.guidance.shift import GuidanceSettings, guidance_shift
from ppap_core.guidance.terms import Term
from ppap_core.guiders.latents import STEM_SCALE, LatentSpace, Stem
from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.noise import to_vp
from ppap_core.rng import seeded
from ppap_core.schedules import ExpertSchedule
from ppap_core.training.loop import RunOptions

B, C, H, W = 3, 5, 6, 7
SCHEDULE = ExpertSchedule((0.1, 1.0, 10.0))


def space(shuffle: int = 1) -> LatentSpace:
    return LatentSpace("Test", 0.4 * randn(C, 3, seed=1), 0.1 * randn(3, seed=2), shuffle)


def latents(shuffle: int = 1, seed: int = 3) -> torch.Tensor:
    return randn(B, C * shuffle**2, H, W, seed=seed)


def bank_of(view: str = "denoised", shuffle: int = 1) -> ExpertBank:
    return ExpertBank(base_network(small_guider()), SCHEDULE, LoraSpec(2, 2.0), view, space=space(shuffle))


def train_a_little(bank: ExpertBank, index: int) -> None:
    """Gives the stem of one expert weights as if it had been trained."""
    bank.load(index, {name: weight + 0.05 * randn(*weight.shape, seed=place)
                      for place, (name, weight) in enumerate(sorted(bank.weights(index).items()))})


def test_colours_are_what_each_channel_adds():
    found, latent, here = space().colors(latents()), latents(), space()
    assert found.shape == (B, 3, H, W)
    one = here.factors.T @ latent[1, :, 4, 5] + here.bias
    torch.testing.assert_close(found[1, :, 4, 5], one)


def test_places_that_hold_several_pixels_are_unfolded_first():
    """Reshape of packed formats: channel, then row, then column within the place."""
    packed = latents(shuffle=2)
    unfolded = packed.reshape(B, C, 2, 2, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C, 2 * H, 2 * W)
    assert torch.equal(space(2).colors(packed), space().colors(unfolded))


@pytest.mark.parametrize("shuffle", [1, 2])
def test_a_stem_starts_as_the_enlarged_colours(shuffle: int):
    seen = Stem(space(shuffle), seeded(0))(latents(shuffle))
    colors = space(shuffle).colors(latents(shuffle))
    plain = torch.nn.functional.interpolate(colors, scale_factor=STEM_SCALE, mode="bilinear")
    assert seen.shape == (B, 3, STEM_SCALE * shuffle * H, STEM_SCALE * shuffle * W)
    assert torch.equal(seen, plain)


def test_each_expert_sees_with_its_own_stem():
    bank, x = bank_of(), latents()
    before = [bank.decode(x, level(sigma, x)) for sigma in (0.5, 5.0)]
    assert torch.equal(*before)
    train_a_little(bank, 1)
    after = [bank.decode(x, level(sigma, x)) for sigma in (0.5, 5.0)]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    with says(ValueError, "experts 0 and 1"):
        bank.decode(x, torch.tensor([0.5, 0.5, 5.0]))


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_the_gradient_reaches_the_latent(view: str):
    bank = bank_of(view)
    train_a_little(bank, 0)
    guider = with_experts(small_guider(), bank)
    x, denoised, sigma = latents(), 0.5 * latents(seed=4), level(0.4, latents())
    energy, gradient = energy_gradient(guider, x if view == "noisy" else denoised, sigma)
    assert gradient.shape == x.shape

    def energy_along(step: float) -> torch.Tensor:
        point = (x if view == "noisy" else denoised) + step * direction
        seen = to_vp(point, sigma) if view == "noisy" else point
        return guider.energy(bank.decode(seen, sigma), sigma).detach()

    direction, step = randn(*x.shape, seed=9), 1e-2
    torch.testing.assert_close(energy_along(0.0), energy)
    slope = (energy_along(step) - energy_along(-step)) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).flatten(1).sum(1), rtol=0.02, atol=2e-3)


def test_a_plain_guider_guides_latents_by_their_colours():
    here, x = space(), latents()
    guider = replace(small_guider(), decode=here.colors)
    found = guidance_shift([Term(guider)], Prediction(x, level(0.7, x), x), GuidanceSettings(sigma_data=1.0))
    assert found.delta.shape == x.shape and found.delta.abs().max() > 0
    moved = guider.energy(here.colors(x + 0.01 * found.delta / found.delta.std()), level(0.7, x))
    assert (moved < found.records[0].energy).all()


def latent_store(folder: Path) -> SampleStore:
    """Trajectories of a model that knows the latent from the start, and pictures of it at another size."""
    store = SampleStore(folder, {"model": "test", "seed": 0})

    def generate(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
        recorder, made = TrajectoryRecorder(), torch.stack([randn(C, H, W, seed=seed) for seed in seeds])
        for place, sigma in enumerate((20.0, 5.0, 2.0, 0.8, 0.4, 0.05)):
            x = made + sigma * randn(*made.shape, seed=place)
            recorder.record(x, level(sigma, x), made)
        return picture(made), recorder.trajectories(seeds)
    store.fill(SHARD_SIZE, generate)
    return store


def picture(latent: torch.Tensor) -> torch.Tensor:
    return (3 * space().colors(latent)).tanh().repeat_interleave(2, 3)


def test_a_store_keeps_what_was_diffused_beside_the_images(tmp_path: Path):
    store = latent_store(tmp_path)
    assert store.images.shape == (SHARD_SIZE, 3, H, 2 * W)
    assert store.noisy_vp.shape == store.denoised.shape == (SHARD_SIZE, 6, C, H, W)
    predicted = sample_batch(bank_of("denoised"), 1, store, 5, DistillConfig(batch=6))
    noisy = sample_batch(bank_of("noisy"), 1, store, 5, DistillConfig(batch=6))
    assert predicted.inputs.shape == noisy.inputs.shape == (6, C, H, W) and predicted.images.shape == (6, 3, H, 2 * W)
    torch.testing.assert_close(predicted.images, picture(predicted.inputs), rtol=0, atol=0.02)
    assert torch.equal(noisy.images, predicted.images) and torch.equal(noisy.sigma, predicted.sigma)
    scale = (1 + noisy.sigma**2).sqrt()[:, None, None, None]
    noise = (noisy.inputs * scale - predicted.inputs) / noisy.sigma[:, None, None, None]
    assert abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_stem_and_adapter_learn_together(tmp_path: Path, view: str):
    """A resumed run is the same."""
    store, guider = latent_store(tmp_path / "store"), small_guider()
    config = DistillConfig(steps=6, batch=8, lr=3e-3)
    straight, stopped = bank_of(view), bank_of(view)
    start = {name: weight.clone() for name, weight in straight.weights(1).items()}
    other = {name: weight.clone() for name, weight in straight.weights(0).items()}
    distill_expert(guider, straight, 1, store, config)
    moved = {name for name, weight in straight.weights(1).items() if not torch.equal(weight, start[name])}
    assert {name for name in start if name.startswith("stem")} <= moved and len(moved) > 8
    assert same(other, straight.weights(0)), "the other expert and its stem stay as they were"
    assert not any(parameter.requires_grad for parameter in straight.parameters())

    def stop(step: int, loss: float, weights: dict) -> None:
        if step == 2:
            raise KeyboardInterrupt
    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        distill_expert(guider, stopped, 1, store, config, RunOptions(state_file=file, on_step=stop))
    distill_expert(guider, stopped, 1, store, config, RunOptions(state_file=file))
    assert same(straight.weights(1), stopped.weights(1))


def test_a_bank_of_latents_is_saved_with_stems_and_space(tmp_path: Path):
    guider, bank, x = small_guider(), bank_of(shuffle=2), latents(2)
    train_a_little(bank, 1)
    save_bank(tmp_path / "bank.safetensors", bank, guider)
    tensors, about = load_tensors(tmp_path / "bank.safetensors")
    assert about["space"] == "Test" and about["shuffle"] == 2
    assert "expert_1.stem.body.0.weight" in tensors
    loaded = load_bank(tmp_path / "bank.safetensors", guider)
    assert loaded.space_name == "Test" and loaded.space.shuffle == 2
    for sigma in (0.5, 5.0):
        assert torch.equal(loaded.decode(x, level(sigma, x)), bank.decode(x, level(sigma, x)))


@pytest.mark.parametrize("name, shape", [("space.factors", (5, 4)), ("space.factors", (3,)), ("space.bias", (1,))])
def test_a_bank_whose_colours_have_another_shape_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]):
    file, guider = tmp_path / "bank.safetensors", small_guider()
    save_bank(file, bank_of(), guider)
    tensors, about = load_tensors(file)
    save_tensors(file, tensors | {name: torch.zeros(shape)}, about)
    with says(ValueError, "damaged", "colours of its latents", shape):
        load_bank(file, guider)


def test_stems_count_among_what_is_trained():
    images = ExpertBank(base_network(small_guider()), SCHEDULE, LoraSpec(2, 2.0))
    stem = sum(parameter.numel() for parameter in bank_of().stems[0].parameters())
    base = sum(parameter.numel() for parameter in base_network(small_guider()).parameters())
    assert bank_of().trainable_share() == pytest.approx(images.trainable_share() + stem / base)


def test_the_memory_of_seeing_is_counted():
    guider = small_guider()
    here = space()
    by_colours = replace(guider, decode=here.colors)
    by_stem = with_experts(guider, bank_of())
    shape = (2, C, 24, 28)
    assert gradient_bytes(by_stem, shape) > gradient_bytes(by_colours, shape) > 0


def test_a_decoded_half_image_is_resized_in_full_precision():
    """An antialiased resize knows no halves on a CPU, and what comes after it is as coarse as they are elsewhere."""
    decoder = torch.nn.Conv2d(C, 3, 3, padding=1)
    torch.nn.init.normal_(decoder.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    guider = replace(small_guider(), decode=lambda diffused, sigma: decoder(diffused))
    x = latents()
    exact, half = (energy_gradient(guider, x, level(0.7, x), compute)[1] for compute in (None, torch.bfloat16))
    assert torch.nn.functional.cosine_similarity(exact.flatten(1), half.flatten(1)).min() > 0.98
