"""Particles, changed steps, repeated steps and readout heads of the benchmark, on distributions that are known exactly."""
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from helpers import randn
from helpers.gaussian import GaussianMixture
from torch import Tensor

from benchmarks.guided import Batch, schedule_of
from benchmarks.methods import METHODS
from benchmarks.particles import Particles, Steering, energy_of, repeat_guider, sample_particles
from benchmarks.readout import ReadoutNetworks
from benchmarks.steps import STEPS, DampedStep, Damping, MomentStep, SubStep, sample_repeating
from benchmarks.tables import Row, read_training
from benchmarks.tiny_world import NOISE, generate_store, load_world
from benchmarks.training import Workspace
from ppap_core import (
    TASKS,
    Denoiser,
    ExpertSchedule,
    GuidanceSettings,
    Guider,
    Moments,
    NoiseInterval,
    Schedule,
    Term,
    TrainingFree,
    guided,
    karras_sigmas,
    sample_euler,
    sample_training_free,
)
from ppap_core.experts.pairs import trajectory_pairs
from ppap_core.experts.samples import BatchSpec
from ppap_core.guiders.guider import clean
from ppap_core.rng import seeded
from ppap_core.tinyworld.loaders import load_denoiser, load_guider
from ppap_core.tinyworld.scenes import draw

B, SHAPE, WIDTH = 3, (3, 5, 7), 0.4
SEEDS = [11, 7, 2**40]
SIGMAS = karras_sigmas(6, 0.05, 10.0).double()
ONE = GaussianMixture.of_shape(SHAPE, classes=1, width=WIDTH)
SETTINGS = GuidanceSettings(sigma_data=WIDTH)


@dataclass(frozen=True)
class Quadratic(Guider):
    """|image - target|^2 / 2, whatever the noise."""

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        assert self.target is not None
        return (image - self.target).square().flatten(1).sum(1) / 2


def quadratic(seed: int = 5, count: int = B) -> Guider:
    return Quadratic("quadratic", lambda image, sigma: image, lambda image: image, "number",
                     target=randn(count, *SHAPE, seed=seed, dtype=torch.float64))


def start(count: int = B) -> Tensor:
    return SIGMAS[0] * randn(count, *SHAPE, seed=3, dtype=torch.float64)


def tilted(weight: float, target: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Denoiser of N(mean, WIDTH^2) times exp(-weight |image - target|^2 / 2), which is a Gaussian again."""
    variance = 1 / (WIDTH**-2 + weight)
    mean = variance * (ONE.means[0] / WIDTH**2 + weight * target)
    share = variance / (variance + float(sigma[0]) ** 2)
    return mean + share * (x - mean)


# Steps

@pytest.mark.parametrize("name", STEPS)
def test_without_weight_a_changed_step_is_the_plain_one(name):
    outside = Term(quadratic(), 1.0, Schedule(NoiseInterval(20.0, 30.0)), normalized=True)
    for term in (Term(quadratic(), 0.0, normalized=True), outside):
        assert torch.equal(sample_euler(STEPS[name](ONE, term), start(), SIGMAS), sample_euler(ONE, start(), SIGMAS))


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_changed_step_guides(name, through):
    guider = quadratic()
    term = Term(guider, 0.5, normalized=True, backprop_through_model=through)
    plain, changed = (guider.energy(sample_euler(denoise, start(), SIGMAS), SIGMAS[:1]) for denoise in
                      (ONE, STEPS[name](ONE, term)))
    assert (changed < 0.8 * plain).all()


def test_damping_samples_the_tilted_gaussian():
    """Without damping the prediction passes the target where weight * posterior_std^2 is more than 1."""
    guider, weight = quadratic(), 30.0
    damped, plain = (guided(ONE, [Term(guider, weight, Schedule(ramp=Damping(strength, WIDTH)))], SETTINGS)
                     for strength in (weight, 0.0))
    exact = partial(tilted, weight, guider.target)
    for sigma in (10.0, 1.0, 0.1):
        x, level = start(), torch.full((B,), sigma, dtype=torch.float64)
        torch.testing.assert_close(damped(x, level), exact(x, level), rtol=1e-10, atol=1e-10)
        assert sigma < 1 or (plain(x, level) - exact(x, level)).abs().max() > 1
    torch.testing.assert_close(sample_euler(damped, start(), SIGMAS), sample_euler(exact, start(), SIGMAS))


def test_damping_by_the_energy_is_exact_for_gaussians():
    """A normalized weight is some raw weight in each image, for which the damped step is the mean of the tilted density."""
    guider, sigma = quadratic(), 2.0
    term = Term(guider, 1.5, normalized=True)
    x, level = start(), torch.full((B,), sigma, dtype=torch.float64)
    plain, damped = ONE(x, level), DampedStep(ONE, term, SETTINGS)(x, level)
    gap, std = plain - guider.target, sigma * WIDTH / (sigma**2 + WIDTH**2) ** 0.5
    for index in range(B):
        raw = 1.5 * std / (std**2 * gap[index].square().mean().sqrt())  # of the same undamped shift
        torch.testing.assert_close(damped[index], tilted(float(raw), guider.target[index], x[index], level))


def test_damping_keeps_the_spread_of_the_tilted_mixture():
    """Each mode tilted by exp(-20 |image - y|^2 / 2) has variance 1 / (1 / width^2 + 20); without damping it has less."""
    world = GaussianMixture.of_shape((3, 2, 2), classes=4, width=0.3)
    guider = replace(quadratic(), target=world.means[:2].mean(0, keepdim=True))
    sigmas, settings = karras_sigmas(24, 0.02, 20.0).double(), GuidanceSettings(sigma_data=0.3)
    x, exact = 20.0 * randn(160, 3, 2, 2, seed=1, dtype=torch.float64), (1 / 0.3**2 + 20.0) ** -0.5
    def spread(denoise: Denoiser) -> float:
        images = sample_euler(denoise, x, sigmas)
        nearest = world.log_likelihood(images, clean(images)).argmax(1)
        return sum(float(images[nearest == k].var(0).mean()) * int((nearest == k).sum()) for k in (0, 1)) ** 0.5 \
            / int((nearest < 2).sum()) ** 0.5
    raw, damped = (guided(world, [Term(guider, 20.0, Schedule(ramp=Damping(strength, 0.3)))], settings)
                   for strength in (0.0, 20.0))
    assert spread(raw) < 0.7 * exact and spread(damped) > 0.9 * exact
    strong = Term(guider, 3.0, normalized=True)
    assert spread(guided(world, [strong], settings)) < 0.2 * exact
    assert spread(DampedStep(world, strong, settings)) > 0.7 * exact


@pytest.mark.parametrize("weight", [1.0, 1e6])
def test_damping_by_the_energy_never_passes_the_target(weight):
    guider, level = quadratic(), torch.full((B,), 5.0, dtype=torch.float64)
    gap = DampedStep(ONE, Term(guider, weight, normalized=True))(start(), level) - guider.target
    assert (gap * (ONE(start(), level) - guider.target) >= 0).all()


def test_no_damping_is_a_factor_of_one():
    assert [Damping()(sigma) for sigma in (0.0, 0.3, 80.0)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("through", [False, True])
def test_one_sub_step_is_the_guidance_of_the_core(through):
    term = Term(quadratic(), 0.4, normalized=True, backprop_through_model=through)
    expected = sample_euler(guided(ONE, [term]), start(), SIGMAS)
    assert torch.equal(sample_euler(SubStep(ONE, term, parts=1), start(), SIGMAS), expected)
    assert not torch.equal(sample_euler(SubStep(ONE, term, parts=3), start(), SIGMAS), expected)


def test_many_raw_sub_steps_descend_without_passing_the_target():
    """One step of raw weight w goes w r^2 of the way, n steps 1 - (1 - w r^2 / n)^n of it; without a pass of the model."""
    guider, passes = quadratic(), []
    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        passes.append(1)
        return ONE(x, sigma)
    level, std2 = torch.full((B,), 1.0, dtype=torch.float64), WIDTH**2 / (1 + WIDTH**2)
    out = SubStep(counted, Term(guider, 2.0 / std2), SETTINGS, parts=8)(start(), level)
    expected = (1 - 2.0 / 8) ** 8 * (ONE(start(), level) - guider.target)
    torch.testing.assert_close(out - guider.target, expected)
    assert len(passes) == 1


def test_moments_shift_every_value_by_the_weight_at_first():
    level = torch.full((B,), 2.0, dtype=torch.float64)
    step = MomentStep(ONE, Term(quadratic(), 0.5, normalized=True), moments=Moments(0.0, 0.9))
    shift = step(start(), level) - ONE(start(), level)
    std = 2.0 * 0.5 / (4 + 0.25) ** 0.5
    torch.testing.assert_close(shift.abs(), torch.full_like(shift, 0.5 * std), rtol=1e-5, atol=0)


# Repeated steps

def test_steps_that_are_not_repeated_are_eulers():
    expected = sample_euler(ONE, start(), SIGMAS)
    for repeat in ((NoiseInterval(), 1), (NoiseInterval(20.0, 30.0), 4)):
        assert torch.equal(sample_repeating(ONE, start(), SIGMAS, repeat, SEEDS), expected)


def test_steps_are_repeated_as_by_the_training_free_family():
    """A shift of the prediction that keeps the state is Universal Guidance's backward part."""
    guider, where = quadratic(), NoiseInterval(0.2, 4.0)
    def shifted(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = ONE(x, sigma)
        return denoised - 0.1 * (denoised - guider.target)
    method = TrainingFree(mu=0.1, mu_rule="backward", recurrences=3, repeat=where)
    expected = sample_training_free(ONE, guider, start(), SIGMAS, method, SEEDS)
    torch.testing.assert_close(sample_repeating(shifted, start(), SIGMAS, (where, 3), SEEDS), expected)


# Particles

def steering(guider: Guider, count: int, weight: float = 0.0) -> Steering:
    guider = repeat_guider(guider, count)
    return Steering(guided(ONE, [Term(guider, weight, normalized=True)]), partial(energy_of, guider))


def swarm(particles: Particles, guider: Guider, x: Tensor, seeds: list[int], weight: float = 0.0) -> Tensor:
    return sample_particles(lambda count: steering(guider, count, weight), x, SIGMAS, particles, seeds)


def test_one_particle_is_plain_sampling():
    out = swarm(Particles(1, gain=2.0, select=1.0), quadratic(), start(), SEEDS)
    assert torch.equal(out, sample_euler(ONE, start(), SIGMAS))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_without_gain_the_best_of_all_is_taken(weight):
    """Each particle is what its noise leads to; the first starts where plain sampling does."""
    guider = quadratic()
    noise = [start()] + [torch.stack([torch.randn(SHAPE, generator=seeded(seed, p)).double() * SIGMAS[0] for seed in SEEDS])
                         for p in (1, 2)]
    images = [sample_euler(steering(guider, 1, weight).denoise, x, SIGMAS) for x in noise]
    energies = torch.stack([guider.energy(image, clean(image)) for image in images])
    best = torch.stack([images[place][index] for index, place in enumerate(energies.argmin(0).tolist())])
    torch.testing.assert_close(swarm(Particles(3), guider, start(), SEEDS, weight), best)
    assert len(set(energies.argmin(0).tolist())) > 1, "another than the first had to be chosen"


@pytest.mark.parametrize("particles", [Particles(3), Particles(4, gain=0.1), Particles(4, gain=0.1, select=0.5)], ids=str)
def test_an_image_and_its_particles_do_not_depend_on_the_batch(particles):
    guider = quadratic()
    together = swarm(particles, guider, start(), SEEDS, 0.2)
    assert torch.equal(together, swarm(particles, guider, start(), SEEDS, 0.2))
    for index in range(B):
        alone = swarm(particles, guider.aim(guider.target[index:index + 1]), start()[index:index + 1],
                      SEEDS[index:index + 1], 0.2)
        torch.testing.assert_close(alone, together[index:index + 1], rtol=0, atol=1e-10)
    assert not torch.equal(together, swarm(particles, guider, start(), [1, 2, 3], 0.2))


def test_steering_finds_a_class_more_often_than_the_best_of():
    """Of eight equally likely classes four independent samples hold the wanted one in 1 - (7/8)^4 = 41 %."""
    world, count = GaussianMixture.of_shape((3, 2, 2), classes=8, width=0.5), 96
    guider = Guider("classes", world.log_likelihood, lambda image: image, "class", target=torch.tensor([2]))
    x, sigmas = 20.0 * randn(count, 3, 2, 2, seed=3, dtype=torch.float64), karras_sigmas(12, 0.05, 20.0).double()
    def share(gain: float) -> float:
        images = sample_particles(lambda count: Steering(world, partial(energy_of, guider)), x, sigmas, Particles(4, gain),
                                  range(count))
        return float((world.log_likelihood(images, clean(images)).argmax(1) == 2).double().mean())
    assert 0.25 < share(0.0) < 0.5 and share(1.0) > share(0.0) + 0.1


def test_copies_part_by_fresh_noise():
    """Where one particle is far the best all are drawn from it, and only the copies take another step than Euler's."""
    kept: list[Tensor] = []
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(x.clone())
        return ONE(x, sigma)
    first = Steering(denoise, lambda prediction: torch.arange(4.0).repeat(B))
    sample_particles(lambda count: first, start(), SIGMAS, Particles(4, gain=1e6, resample=NoiseInterval(5.0)), SEEDS)
    before, after = kept[0].unflatten(0, (B, 4)), kept[1].unflatten(0, (B, 4))
    sigma, next_sigma = SIGMAS[:2].tolist()
    denoised = ONE(before[:, 0], torch.full((B,), sigma, dtype=torch.float64))
    torch.testing.assert_close(after[:, 0], denoised + (before[:, 0] - denoised) * (next_sigma / sigma))
    up = next_sigma * (1 - (next_sigma / sigma) ** 2) ** 0.5
    spread = (after[:, 1:] - after[:, 1:].mean(1, keepdim=True)).std() * 1.5**0.5
    assert 0.85 < float(spread) / up < 1.15


def test_selection_leaves_one_particle_to_go_on_with():
    sizes: list[int] = []
    def counted(count: int) -> Steering:
        sizes.append(count)
        return steering(quadratic(), count)
    sample_particles(counted, start(), SIGMAS, Particles(4, select=float(SIGMAS[2])), SEEDS)
    assert sizes == [4, 4, 4, 1, 1, 1]


# On the tiny world

def test_the_rows_sample_images_of_their_scenes(tmp_path):
    world, numbers = load_world(), [3, 8]
    batch = Batch(draw(numbers), [NOISE + number for number in numbers], *world.start(numbers, 2))
    workspace = Workspace(world, tmp_path, 2, print)
    def sample(method: str, settings: dict, setting: dict) -> Tensor:
        return METHODS[method](Row("row", method, settings=settings), workspace).sample(batch, setting)
    plain, point = sample("nothing", {}, {}), {"weight": 0.5, "balanced": True}
    for method, settings, setting in (("adam", {}, point), ("damped", {}, point), ("sub-steps", {"parts": 2}, point),
                                      ("guidance", {}, {**point, "damping": 4.0}),
                                      ("time travel", {"rounds": 2}, {**point, "low": 1, "high": 100}),
                                      ("particles", {"count": 2, "resample": [1, 9]}, {**point, "gain": 1.0})):
        out = sample(method, settings, setting)
        assert out.shape == plain.shape and out.isfinite().all() and not torch.equal(out, plain)
    assert torch.equal(sample("particles", {"count": 1}, {"weight": 0.0}), plain)


@pytest.mark.parametrize("task, shape", [("class", (8,)), ("depth", (1, 32, 32)), ("segmentation", (9, 32, 32))])
def test_a_readout_has_the_outputs_of_its_guider(task, shape):
    guider, x = load_guider(task), randn(2, 3, 32, 32)
    denoiser, schedule = load_denoiser(), ExpertSchedule((0.02, 1.0, 80.0))
    readout, again = (replace(guider, view="noisy", net=ReadoutNetworks(guider, denoiser, schedule)) for _ in range(2))
    for sigma in (0.0, 0.5, 20.0):
        output = readout.predict(x, x.new_full((2,), sigma))
        assert output.shape == (2, *shape) == guider.predict(x, clean(x)).shape and output.isfinite().all()
        assert torch.equal(output, again.predict(x, x.new_full((2,), sigma))), "heads begin alike"
    assert 0 < readout.net.trainable_share() < 1


def test_a_readout_has_a_gradient_in_the_noisy_state():
    guider = load_guider("class")
    readout = replace(guider, view="noisy", net=ReadoutNetworks(guider, load_denoiser(), ExpertSchedule((0.02, 80.0))))
    denoise: Denoiser = guided(load_denoiser(), [Term(readout.aim(torch.tensor([2])), 0.3, normalized=True)])
    x, sigma = 3 * randn(2, 3, 32, 32), torch.full((2,), 3.0)
    with torch.no_grad():
        shift = denoise(x, sigma) - load_denoiser()(x, sigma)
    std = 3.0 * 0.5 / (9 + 0.25) ** 0.5
    torch.testing.assert_close(shift.square().flatten(1).mean(1).sqrt(), torch.full((2,), 0.3 * std), rtol=1e-4, atol=0)


@pytest.mark.slow  # trains
def test_readout_heads_learn_from_generated_images(tmp_path):
    """Their outputs come nearer to the teacher's on finished images; a finished training is only read."""
    workspace = Workspace(load_world(), tmp_path, 4, print)
    training = read_training({"readout": True, "edges": [0.02, 1.0, 80.0], "images": 64, "steps": 30, "batch": 16})
    first, again = (training.make(workspace) for _ in range(2))
    store = generate_store(workspace.world, tmp_path / "samples_4_64", 64, 4, print)
    pairs = trajectory_pairs(store, training.schedule, 0, BatchSpec(0, 64), "noisy")
    wanted = workspace.world.plain_output(pairs.images)
    untrained = replace(first.guider, net=training.network_for(workspace.world))
    with torch.no_grad():
        before, after, same = (guider.predict(pairs.inputs, pairs.sigma)
                               for guider in (untrained, first.guider, again.guider))
    assert torch.equal(after, same) and first.costs == again.costs
    assert TASKS["class"].distance(after, wanted).mean() < 0.8 * TASKS["class"].distance(before, wanted).mean()


@pytest.mark.parametrize("sigma, factor", [(80.0, 2.0), (0.02, 0.0), ((80 * 0.02)**0.5, 1.0)])
def test_a_falling_weight_is_the_weight_itself_on_average(sigma, factor):
    assert schedule_of(falls_from=80, falls_to=0.02).factor_at(sigma) == pytest.approx(factor, abs=1e-9)
    assert schedule_of().factor_at(sigma) == 1.0
