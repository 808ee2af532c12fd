"""Work that version 0.1.0 saved still loads, and what it left half-done goes on to the result it would have had."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank
from ppap_core.experts.distill import distill
from ppap_core.experts.lesson import DistillConfig
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.trajectories import TrajectoryRecorder
from ppap_core.guidance.prior import PriorConfig, PriorObjective, run_prior
from ppap_core.guidance.terms import Term
from ppap_core.noise import expand
from ppap_core.rng import seeded_noise
from ppap_core.sampling import karras_sigmas, sample_heun
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.loaders import load_denoiser, load_guider, load_sibling
from ppap_core.training.finetune import FineTune, as_lora, fine_tune
from ppap_core.training.loop import RunOptions

SAVED = Path(__file__).parents[1] / "fixtures" / "core"
BANKS = {"noisy_pixel": "class", "denoised_pixel": "depth", "noisy_latent": "segmentation", "denoised_latent": "class"}
LEVELS = (0.3, 1.7, 30.0)  # one for each of two experts, and one above both
SHAPE = (3, 4, 12)
MANIFEST = {"model": "tiny world", "shape": SHAPE, "cfg": 1.0, "steps": 4, "sampler": "heun", "seed": 11}
DISTILLATION = DistillConfig(steps=7, batch=3, lr=1e-2, seed=4, temperature=0.5, warm_start=True)
FINE_TUNING = FineTune(steps=9, rank=1, batch=2, lr=0.01, seed=3)
PRIOR = PriorConfig(steps=11, learning_rate=0.5)
TUNED = ("diffusion_model.net.stem.lora_down.weight", "diffusion_model.net.head.lora_up.weight")  # two of them are compared


def generate(seeds: list[int]) -> tuple:
    """Images of the tiny world, small ones, and the steps that led to them."""
    recorder = TrajectoryRecorder()
    denoise = recorder.wrap(load_denoiser())
    with torch.no_grad():
        images = sample_heun(denoise, seeded_noise(seeds, SHAPE) * 20.0, karras_sigmas(4, 0.1, 20.0))
    return images, recorder.trajectories(seeds)


def distill_all(folder: Path, on_step) -> tuple[ExpertBank, list]:
    """Two experts of the noisy view."""
    store, guider = SampleStore(folder / "store", MANIFEST), load_guider("class")
    bank = ExpertBank(base_network(guider), ExpertSchedule((0.1, 1.0, 20.0)), LoraSpec(1, 2.0), "noisy", seed=5)
    return bank, distill(guider, bank, store, DISTILLATION, folder / "distillation", on_step)


def tune(folder: Path, on_step) -> tuple[dict[str, Tensor], list]:
    """A LoRA of the small denoiser for four pictures."""
    net = load_sibling()

    def predict(images: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        sigma = 0.1 * 100**share
        return net(images + expand(sigma, images) * noise, sigma), sigma
    changes, losses = fine_tune(net, predict, result("pictures"), FINE_TUNING, 0.5,
                                RunOptions({"model": "tiny world", "data": "pictures"}, folder / "lora.state.safetensors",
                                           on_step=on_step))
    return as_lora(changes, "diffusion_model."), losses


def search(folder: Path, on_step) -> tuple[Tensor, list]:
    """Pictures of stars."""
    term = Term(load_guider("class").aim(torch.tensor([3])), 0.5, normalized=True)
    options = RunOptions({"model": "tiny world"}, folder / "prior.state.safetensors", on_step=on_step)
    return run_prior(PriorObjective(load_denoiser(), [term]), result("pictures"), PRIOR, range(70, 74), options=options)


def result(name: str) -> Tensor:
    """Outputs that were recorded beside the saved work."""
    with safe_open(SAVED / "results.safetensors", "pt") as file:
        return file.get_tensor(name)


def alike(found: Tensor, name: str, atol: float) -> None:
    """To rounding: processors and numbers of threads differ in the last bits."""
    torch.testing.assert_close(found.detach().float(), result(name).float(), rtol=0, atol=atol,
                               msg=lambda text: f"{name}: {text}")


def answer(guider, x: Tensor, sigma: float) -> Tensor:
    """The output of a guider at one noise level; for maps, at some places."""
    level = torch.full((len(x),), sigma)
    with torch.no_grad():
        found = guider.predict(guider.to_image(x, level), level)
    return found[..., ::5, ::7] if found.ndim == 4 else found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A copy of all that was left half-done."""
    return Path(shutil.copytree(SAVED, tmp_path / "saved"))


@pytest.mark.parametrize("name", BANKS)
def test_a_saved_bank_answers_as_it_did(name: str):
    """Both views, of pixels and of latents, where each expert has a stem."""
    view, space = name.split("_")
    plain = load_guider(BANKS[name])
    bank = load_bank(SAVED / f"{name}.safetensors", plain)
    assert bank.view == view and bank.space_name == {"pixel": "pixel", "latent": "SD3"}[space] and len(bank.schedule) == 2
    assert bank.training_info == {"samples": {"model": "tiny world", "seed": 3}, "images": 64, "steps": 5,
                           "final_losses": [0.5, 0.25]}
    guider, x = with_experts(plain, bank), result(f"{space}_input")
    for sigma in LEVELS:
        alike(answer(guider, x, sigma), f"{name}.{sigma}", 1e-4)


def test_a_half_filled_store_goes_on(saved: Path):
    shard, manifest = ((saved / "store" / name).read_bytes() for name in ("shard_00000.safetensors", "manifest.json"))
    store, asked = SampleStore(saved / "store", MANIFEST), []
    assert len(store) == SHARD_SIZE
    store.fill(2 * SHARD_SIZE, lambda seeds: asked.extend(seeds) or generate(seeds))
    assert asked == list(range(11 + SHARD_SIZE, 11 + 2 * SHARD_SIZE)), "the images that were there are not made again"
    assert shard == (saved / "store" / "shard_00000.safetensors").read_bytes()
    assert manifest == (saved / "store" / "manifest.json").read_bytes()
    assert (store.images[::9].int() - result("store.images").int()).abs().max() <= 1
    alike(store.sigmas, "store.sigmas", 1e-5)
    for name, states in (("noisy", store.noisy_vp), ("denoised", store.denoised)):
        alike(states[::9], f"store.{name}", 4e-3)  # rounding of halves


def test_a_half_done_distillation_goes_on(saved: Path):
    """It stopped in the second expert, which had started as the first one ended."""
    steps = []
    bank, losses = distill_all(saved, lambda index, step, loss: steps.append((index, step)))
    assert steps == [(1, 4), (1, 5), (1, 6)]
    alike(torch.tensor(losses), "distillation.losses", 1e-3)
    for index in range(2):
        for name, weight in bank.weights(index).items():
            alike(weight, f"distillation.{index}.{name}", 1e-3)


def test_half_done_fine_tuning_goes_on(saved: Path):
    steps = []
    lora, losses = tune(saved, lambda step, loss, changes: steps.append(step))
    assert steps == [5, 6, 7, 8]
    alike(torch.tensor(losses), "lora.losses", 1e-3)
    assert len(lora) == 3 * 51 and lora["diffusion_model.net.stem.alpha"] == 1
    for name in TUNED:
        alike(lora[name], f"lora.{name}", 1e-3)


def test_a_half_done_search_goes_on(saved: Path):
    steps = []
    points, losses = search(saved, lambda step, loss, points: steps.append(step))
    assert steps == [6, 7, 8, 9, 10]
    alike(torch.tensor(losses), "prior.losses", 1e-3)
    alike(points, "prior.points", 1e-3)


STATES = {"distillation/expert_0": distill_all, "distillation/expert_1": distill_all, "lora": tune, "prior": search}


@pytest.mark.parametrize("name", STATES)
def test_a_state_keeps_the_names_of_its_description(saved: Path, name: str):
    """A training is told from another by names and values, so that a new name refuses an old state."""
    def about() -> tuple[set, dict]:
        with safe_open(saved / f"{name}.state.safetensors", "pt") as file:
            return set(file.keys()), json.loads(file.metadata()["ppap"])
    tensors, before = about()
    STATES[name](saved, None)
    found, after = about()
    assert found == tensors and {**after, "losses": 0} == {**before, "losses": 0}
    assert len(after["losses"]) == {"lora": 9, "prior": 11}.get(name, 7)
