"""Particles: how they are drawn, and that what is sampled with them is what it should be on an exact mixture."""
import math
from dataclasses import replace

import pytest
import torch
from helpers import images, randn, says
from helpers.gaussian import GaussianMixture
from torch import Tensor

from ppap_core import Guider, Prediction, Term, guided, karras_sigmas, sample_euler
from ppap_core.guidance.choice import Choice, standings
from ppap_core.guidance.particles import (
    Resampling,
    best_rows,
    draw,
    effective_number,
    first_noise,
    renew_noise,
    sample_particles,
    split_copies,
    systematic,
    tempered,
)
from ppap_core.guiders.guider import clean
from ppap_core.rng import seeded

WORLD = GaussianMixture.of_shape((3, 2, 2), classes=8, width=0.5)
SIGMAS = karras_sigmas(12, 0.05, 20.0).double()
SEEDS = (7, 8, 9)


def classifier(label: int = 2) -> Guider:
    return Guider("classes", WORLD.log_likelihood, lambda image: image, "class", target=torch.tensor([label]))


def sampled(resampling: Resampling, count: int, terms: list[Term] | None = None, **guidance: float) -> Tensor:
    terms = terms or [Term(classifier())]
    noise = randn(count, 3, 2, 2, seed=3, dtype=torch.float64)
    return sample_particles(guided(WORLD, [Term(classifier(), **guidance)] if guidance else []),
                            Choice(terms, resampling.count), noise, SIGMAS, resampling, range(count))


def share(images: Tensor, label: int = 2) -> float:
    return float((WORLD.log_likelihood(images, clean(images)).argmax(1) == label).double().mean())


# Weights

@pytest.mark.parametrize("number", [1.0, 1.7, 2.5, 4.0])
def test_weights_have_the_effective_number_that_is_asked_for(number: float):
    standing = torch.tensor([[0.3, -1.0, 1.2, 0.1], [1e-3, 2e-3, 0.0, -1e-3], [40.0, -70.0, 35.0, 1.0]])
    weights = tempered(standing, number)
    torch.testing.assert_close(effective_number(weights), torch.full((3,), number).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    assert number == 4 or (weights.argsort(1) == standing.argsort(1)).all()
    torch.testing.assert_close(tempered(1000 * standing - 3, number), weights, rtol=1e-4, atol=1e-6)


def test_weights_are_those_of_the_tilted_distribution():
    """Drawn by exp(-sharpness * E), samples of a Gaussian are samples of the narrower Gaussian that it is tilted to."""
    x = randn(20000, seed=1, dtype=torch.float64)
    weights = tempered(-(x - 1).square(), 8000)
    sharpness = float(torch.log(weights[0] / weights[1]) / ((x[1] - 1).square() - (x[0] - 1).square()))
    mean, variance = 2 * sharpness / (1 + 2 * sharpness), 1 / (1 + 2 * sharpness)
    drawn = x[systematic(weights, seeded(0))]
    assert abs(float(drawn.mean()) - mean) < 0.02 and abs(float(drawn.var()) / variance - 1) < 0.05


def test_equal_standings_and_failures_keep_their_chance():
    assert tempered(torch.zeros(4), 1.0).tolist() == [0.25] * 4
    assert tempered(torch.tensor([1.0, 1.0, 0.0, 0.0]), 1.0).tolist() == pytest.approx([0.5, 0.5, 0, 0])
    assert tempered(torch.tensor([1.0, -math.inf, 1.0, 0.0]), 3.0).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert tempered(torch.full((2,), -math.inf), 1.0).tolist() == [0.5, 0.5]


def test_draws_follow_the_weights():
    """Each particle is drawn floor(N w) or ceil(N w) times, and N w times in the mean; equal weights keep everyone."""
    weights = torch.tensor([0.1, 0.0, 0.65, 0.25])
    counts = torch.stack([systematic(weights, seeded(seed)).bincount(minlength=4) for seed in range(400)]).double()
    assert ((counts - 4 * weights).abs() < 1).all() and (counts.mean(0) - 4 * weights).abs().max() < 0.1
    assert systematic(torch.full((4,), 0.25), seeded(0)).tolist() == [0, 1, 2, 3]


def test_rows_of_a_draw_stay_within_their_image():
    standing = randn(3, 4)
    drawn = draw(Resampling(4, 0.8), standing, SEEDS, 5)
    assert (drawn.rows % 3 == torch.arange(12) % 3).all()
    chosen = (drawn.rows // 3).unflatten(0, (4, 3)).T
    copied = drawn.copied.unflatten(0, (4, 3)).T
    for image in range(3):
        alone = draw(Resampling(4, 0.8), standing[image:image + 1], SEEDS[image:image + 1], 5)
        assert alone.rows.tolist() == chosen[image].tolist() and alone.copied.tolist() == copied[image].tolist()
        assert int((~copied[image]).sum()) == len(set(chosen[image].tolist()))
        assert int(standing[image].argmax()) in chosen[image]
    assert bool(copied.any()) and ((drawn.number - 1.6).abs() < 1e-3).all()
    assert best_rows(standing).tolist() == [int(row.argmax()) * 3 + index for index, row in enumerate(standing)]


KARRAS, FLOW = karras_sigmas(16, 0.02, 80.0).tolist(), [1e4, 9.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize(("resampling", "sigmas", "places"), [
    (Resampling(4), KARRAS, [7, 8, 9, 11]), (Resampling(4, times=1), KARRAS, [7]), (Resampling(4), FLOW, [1, 2]),
    (Resampling(4), FLOW[1:], [1]), (Resampling(4), FLOW[2:], []), (Resampling(4, times=0), KARRAS, []),
    (Resampling(4, 0.0), KARRAS, []), (Resampling(1), KARRAS, [])], ids=str)
def test_particles_are_drawn_where_an_image_is_decided(resampling: Resampling, sigmas: list, places: list):
    """From 15 to 2 standard deviations of the data, and never when a single step is left."""
    assert resampling.turns(sigmas, 0.5 if sigmas is KARRAS else 1.0) == places


@pytest.mark.parametrize("wrong", [{"count": 0}, {"strength": -0.1}, {"strength": 1.1}, {"times": -1}])
def test_values_out_of_range_are_refused(wrong: dict):
    with says(ValueError, "at least 1 particle", "from 0 to 1"):
        Resampling(**wrong)


# Copies

def test_a_share_of_the_noise_is_renewed_at_the_same_level():
    denoised, noise = images(200), randn(200, 3, 20, 28, seed=1)
    x = denoised + 2.0 * noise
    assert renew_noise(x, denoised, 0.0, 2.0, randn(*x.shape, seed=2)) is x
    for share_ in (0.3, 1.0):
        renewed = (renew_noise(x, denoised, share_, 2.0, randn(*x.shape, seed=2)) - denoised) / 2.0
        assert abs(float(renewed.std()) - 1) < 0.01
        assert abs(float((renewed * noise).mean()) - math.sqrt(1 - share_)) < 0.01


def test_only_copies_part():
    """The first of those that were drawn alike goes on as it was."""
    x, denoised = randn(12, 3, 4, 4), randn(12, 3, 4, 4, seed=1)
    drawn = draw(Resampling(4, 1.0), torch.tensor([[0.0, 1, 0, 0]] * 3), SEEDS, 2)
    parted = split_copies(x[drawn.rows], denoised[drawn.rows], drawn, (2.0, 1.0), SEEDS, 2)
    assert torch.equal(parted[:3], x[3:6]) and drawn.copied.tolist() == [False] * 3 + [True] * 9
    assert len({float(each.sum()) for each in parted}) == 12
    again = split_copies(x[drawn.rows][1::3], denoised[drawn.rows][1::3], replace(drawn, copied=drawn.copied[1::3]),
                         (2.0, 1.0), SEEDS[1:2], 2)
    assert torch.equal(again, parted[1::3])
    from_pure_noise = split_copies(x[drawn.rows], denoised[drawn.rows], drawn, (1e4, 1.0), SEEDS, 2)
    assert from_pure_noise.isfinite().all()


# Sampling

def test_one_particle_is_plain_sampling():
    noise = randn(5, 3, 2, 2, seed=3, dtype=torch.float64)
    assert torch.equal(sampled(Resampling(1, 1.0), 5), sample_euler(WORLD, noise * float(SIGMAS[0]), SIGMAS))


def test_without_strength_the_best_of_several_is_taken():
    noise = randn(5, 3, 2, 2, seed=3, dtype=torch.float64)
    every = sample_euler(WORLD, first_noise(noise, 3, range(5)) * float(SIGMAS[0]), SIGMAS).unflatten(0, (3, 5))
    energies = torch.stack([classifier().energy(each, clean(each)) for each in every])
    best = torch.stack([every[place, image] for image, place in enumerate(energies.argmin(0).tolist())])
    assert torch.equal(sampled(Resampling(3, 0.0), 5), best) and len(set(energies.argmin(0).tolist())) > 1


@pytest.mark.parametrize("guidance", [{}, {"weight": 0.3}])
def test_an_image_does_not_depend_on_its_batch(guidance: dict):
    resampling = Resampling(4, 0.8)
    together = sampled(resampling, 4, **guidance)
    noise = randn(4, 3, 2, 2, seed=3, dtype=torch.float64)
    terms, denoise = [Term(classifier())], guided(WORLD, [Term(classifier(), **guidance)] if guidance else [])
    alone = sample_particles(denoise, Choice(terms, 4), noise[2:3], SIGMAS, resampling, [2])
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=1e-9)


def test_particles_find_a_class_more_often_than_the_best_of():
    """Of eight equally likely classes four independent samples hold the wanted one in 1 - (7/8)^4 = 41 %."""
    best, drawn = share(sampled(Resampling(4, 0.0), 160)), share(sampled(Resampling(4), 160))
    assert 0.3 < best < 0.52 and drawn > best + 0.2


def test_no_gradient_is_needed():
    """The logits of this scorer are whole numbers, flat between."""
    terms = [Term(replace(classifier(), net=lambda image, sigma: WORLD.log_likelihood(image, sigma).round()))]
    assert share(sampled(Resampling(4), 160, terms)) > share(sampled(Resampling(4, 0.0), 160, terms)) + 0.1


def test_particles_are_images_of_the_mixture():
    """Chosen ones of a class keep its width: copies are renewed as ancestral steps renew, and none is pushed."""
    images = sampled(Resampling(4), 160)
    nearest = WORLD.log_likelihood(images, clean(images)).argmax(1)
    widths = (images - WORLD.means[nearest]).std()
    plain = sampled(Resampling(1), 160)
    expected = (plain - WORLD.means[WORLD.log_likelihood(plain, clean(plain)).argmax(1)]).std()
    assert abs(float(widths / expected) - 1) < 0.15


def test_each_image_has_its_own_target():
    noise, targets = randn(64, 3, 2, 2, seed=3, dtype=torch.float64), torch.arange(64) % 8
    made = sample_particles(WORLD, Choice([Term(classifier().aim(targets))], 4), noise, SIGMAS, Resampling(4), range(64))
    right = WORLD.log_likelihood(made, clean(made)).argmax(1) == targets
    assert float(right.double().mean()) > 0.5


def test_a_noisy_view_judges_the_noisy_state():
    guider = WORLD.guider().aim(torch.tensor([2]))
    assert share(sampled(Resampling(4), 96, [Term(guider)])) > share(sampled(Resampling(4, 0.0), 96, [Term(guider)])) + 0.1


def test_several_terms_choose_together():
    """The standing of particles is that of their energies within each image."""
    x = randn(12, 3, 2, 2, dtype=torch.float64)
    terms = [Term(classifier(1), 2.0), Term(classifier(5), -1.0)]
    energies = torch.stack([term.guider.energy(x, clean(x)) for term in terms]).unflatten(1, (4, 3)).transpose(1, 2)
    found = Choice(terms, 4)(Prediction(x, clean(x), x))
    torch.testing.assert_close(found, standings(energies, [2.0, -1.0]))
