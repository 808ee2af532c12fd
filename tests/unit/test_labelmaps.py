"""Label maps found for pictures: what clusters say is exact, and the prior of label maps knows shapes."""
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import randn
from torch import Tensor
from torch.nn import functional as F

from benchmarks.label_maps import Method, best_label, biggest_is_wall, measures, most_probable, segment
from examples.priors.label_maps import (
    LABELS,
    cluster_guider,
    cluster_nll,
    color_clusters,
    entropy,
    joint,
    label_map,
    nll_bound,
    presence,
    relabelled,
    soft_labels,
    soft_wall,
    to_points,
    wall_divergence,
    wall_guider,
)
from examples.priors.networks import load_label_prior
from ppap_core.guidance.gradients import energy_gradient
from ppap_core.guiders.guider import Guider, clean
from ppap_core.noise import PIXEL_SIGMA_DATA
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.scenes import CLASSES, draw


@pytest.fixture(scope="module")
def maps() -> Tensor:
    return draw(range(400, 432)).segmentation


@pytest.fixture(scope="module")
def prior():
    return load_label_prior()


def one_hot(labels: Tensor, count: int = len(LABELS)) -> Tensor:
    return F.one_hot(labels, count).movedim(-1, 1).double()


def mutual_information(labels: Tensor, clusters: Tensor) -> Tensor:
    """Nats that a pixel's label tells of its cluster, probabilities (B, L, H, W) and long (B, H, W) -> (B,)."""
    fractions = joint(labels, clusters)
    return entropy(fractions.sum(1)) + entropy(fractions.sum(2)) - entropy(fractions)


def noisy_points(count: int = 3) -> Tensor:
    """Some made-up points on an odd grid."""
    return randn(count, len(LABELS), 6, 10, seed=2, dtype=torch.float64)


# Label maps as points

def test_a_label_map_comes_back_from_its_points(maps):
    assert torch.equal(label_map(to_points(maps)), maps)
    assert torch.allclose(presence(to_points(maps)), one_hot(maps).float(), atol=1e-6)


def test_label_maps_have_the_denoiser_s_data_scale(maps):
    assert math.isclose(to_points(maps).square().mean().sqrt(), PIXEL_SIGMA_DATA, rel_tol=0.1)


# Clusters and what they tell

def test_flat_colours_are_cut_exactly_where_they_meet(maps):
    colours = torch.tensor([[0.9, -0.2, 0.1], [-0.5, -0.6, 0.3]])
    pictures = colours[(maps > 0).long()].movedim(-1, 1)
    found = color_clusters(pictures, 2)
    for clusters, wanted in zip(found, maps > 0, strict=True):
        assert torch.equal(clusters == clusters[wanted][0], wanted)
    assert torch.equal(color_clusters(pictures[5:6], 2), found[5:6])


def test_surplus_clusters_are_empty_and_none_is_mixed(maps):
    pictures = torch.tensor([[0.9] * 3, [-0.5] * 3])[(maps > 0).long()].movedim(-1, 1)
    told = mutual_information(one_hot((maps > 0).long(), 2), color_clusters(pictures, 4))
    assert torch.allclose(told, entropy(joint(one_hot((maps > 0).long(), 2), maps * 0)))


def test_mutual_information_of_partitions():
    """A partition tells all of itself and nothing of an independent one."""
    rows, columns = torch.meshgrid(torch.arange(8) // 2, torch.arange(12) // 4, indexing="ij")
    rows, columns = rows[None], columns[None]
    assert math.isclose(mutual_information(one_hot(rows, 4), rows).item(), math.log(4), rel_tol=1e-9)
    assert abs(mutual_information(one_hot(rows, 4), columns).item()) < 1e-12
    swapped = mutual_information(one_hot(3 - rows, 4), rows)
    assert math.isclose(swapped.item(), math.log(4), rel_tol=1e-9)  # names do not matter
    assert abs(cluster_nll(one_hot(rows, 4), rows).item()) < 1e-9
    assert math.isclose(cluster_nll(one_hot(rows, 4), columns).item(), 96 * math.log(3), rel_tol=1e-9)


def test_unexplained_is_the_best_likelihood_of_clusters():
    """-log p(clusters | labels) with the shares of the clusters within each label as probabilities."""
    labels, clusters = (torch.randint(k, (1, 9, 7), generator=torch.Generator().manual_seed(k)) for k in (3, 4))
    shares = joint(one_hot(labels, 3), clusters)
    given = shares / shares.sum(2, keepdim=True)
    assert math.isclose(cluster_nll(one_hot(labels, 3), clusters).item(), -given[0, labels, clusters].log().sum().item())


def test_the_mean_share_of_the_wall_has_no_penalty():
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[0].view(-1)[:16] = 3
    assert wall_divergence(one_hot(labels)).item() < 1e-9
    wanted = 100 * math.log(1 / 0.84)
    assert math.isclose(wall_divergence(one_hot(labels * 0)).item(), wanted, rel_tol=1e-2)


# As guiders

def guiders(count: int) -> list[tuple[Guider, Callable[[Tensor], Tensor]]]:
    """Guiders, and what they measure."""
    clusters = torch.randint(4, (count, 6, 10), generator=torch.Generator().manual_seed(1))
    found = [(cluster_guider(clusters, soft), lambda points, soft=soft: cluster_nll(soft(points), clusters))
             for soft in (soft_wall, soft_labels)]
    return [*found, (wall_guider(), lambda points: wall_divergence(soft_wall(points)))]


def test_the_energy_of_a_guider_is_its_measure_in_nats():
    points = noisy_points()
    for guider, measure in guiders(3):
        assert torch.allclose(guider.energy(points, clean(points)), measure(points), atol=2e-3)


def test_the_gradient_is_the_slope_of_the_measure():
    points, along, step = noisy_points(1), randn(1, len(LABELS), 6, 10, seed=9, dtype=torch.float64), 1e-5
    for guider, measure in guiders(1):
        gradient = energy_gradient(guider, points, clean(points))[1]
        ahead, behind = (measure(points + sign * step * along).item() for sign in (1, -1))
        assert math.isclose((gradient * along).sum().item(), (ahead - behind) / (2 * step), rel_tol=1e-5)


def test_clusters_may_say_nothing_of_which_shape_it_is():
    points = noisy_points(1)
    said = energy_gradient(guiders(1)[0][0], points, clean(points))[1]
    assert said[:, 0].abs().max() > 0
    assert said[:, 1:].abs().max() == 0


def test_each_map_is_judged_by_the_clusters_of_its_own_picture():
    points = noisy_points()
    together = guiders(3)[0][0]
    energies = together.energy(points, clean(points))
    for index in range(3):
        alone = replace(together, prompt=together.prompt[index:index + 1])
        assert torch.allclose(alone.energy(points[index:index + 1], torch.zeros(1)), energies[index:index + 1])


# The prior of label maps

def test_the_prior_denoises_unseen_label_maps(prior, maps):
    for sigma, floor in ((0.5, 0.99), (2.0, 0.97)):
        points = to_points(maps) + sigma * seeded_noise(range(len(maps)), (len(LABELS), 32, 32))
        found = label_map(prior(points, torch.full((len(maps),), sigma)))
        assert (found == maps).float().mean() > floor


@pytest.mark.slow
def test_most_label_maps_are_the_most_probable_by_their_own_name(prior, maps):
    few, seeds = maps[:5], range(5)
    every = torch.stack([nll_bound(prior, relabelled(few, shape), seeds, levels=8) for shape in range(len(CLASSES))], 1)
    assert (every.argmin(1) + 1 == few.flatten(1).max(1).values).float().mean() >= 0.8


def test_the_measures_are_one_for_exact_maps_only(maps):
    assert set(measures(maps, maps).values()) == {1.0}
    other = measures(relabelled(maps, 0), maps)
    assert other["object and wall"] == 1.0
    assert math.isclose(other["shape"], (maps.flatten(1).max(1).values == 1).float().mean())
    nothing = measures(maps * 0, maps)
    assert math.isclose(nothing["pixels"], (maps == 0).float().mean(), rel_tol=1e-6)


@pytest.mark.slow
def test_a_shape_found_in_a_picture_gets_its_name_from_the_prior(prior):
    scenes = draw(range(400, 404))
    found = best_label(prior, biggest_is_wall(scenes.image, 2))
    assert measures(found, scenes.segmentation)["shape"] >= 0.5  # by chance one in eight


@pytest.mark.slow
def test_a_map_is_found_without_labelled_pictures(prior):
    scenes, way = draw(range(404, 406)), Method(prior=replace(Method.prior, steps=20))
    found = segment(prior, scenes.image, range(2), way)
    assert measures(found, scenes.segmentation)["object and wall"] > 0.8
    alone = segment(prior, scenes.image[1:], [1], way)
    assert (alone == found[1:]).float().mean() > 0.99
    assert found.dtype == torch.long


def test_the_most_probable_map_of_a_picture_is_kept(prior, maps):
    exact = maps[:2]
    clusters = (exact > 0).long()
    wrong = torch.randint(9, exact.shape, generator=torch.Generator().manual_seed(0))
    both = torch.cat([torch.stack([wrong[0], exact[1]]), torch.stack([exact[0], wrong[1]])])
    assert torch.equal(most_probable(prior, both, clusters.repeat(2, 1, 1), 2), exact)
