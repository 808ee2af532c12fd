"""The Frechet distance against closed forms, precision and recall against sets whose neighbours are known."""
import pytest
import torch
from helpers import randn, says

from benchmarks import metrics
from benchmarks.metrics import FeatureStats, frechet_distance, precision_recall


def stats(features: torch.Tensor) -> FeatureStats:
    return FeatureStats(features.shape[1]).update(features)


def standardised(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Features whose sample mean is exactly 0 and whose sample covariance is exactly 1."""
    x = randn(n, d, seed=seed, dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (n - 1))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


def test_mean_and_covariance_are_those_of_the_features():
    features = randn(40, 6) * 3 + 5
    torch.testing.assert_close(stats(features).mean, features.double().mean(0))
    torch.testing.assert_close(stats(features).covariance, torch.cov(features.double().T))


def test_statistics_in_parts_are_the_statistics_of_all():
    features = randn(41, 6)
    parts = FeatureStats(6)
    for part in features.split(7):
        parts.update(part)
    assert parts.count == 41
    torch.testing.assert_close(parts.mean, stats(features).mean)
    torch.testing.assert_close(parts.covariance, stats(features).covariance)


def test_the_frechet_distance_is_zero_and_symmetric():
    """A set is at distance zero from itself."""
    a, b = stats(randn(50, 6)), stats(randn(60, 6, seed=1) @ randn(6, 6, seed=2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9) and frechet_distance(a, b) > 1


def test_a_shifted_set_is_as_far_as_the_square_of_the_shift():
    features, shift = randn(50, 4, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.0, 3.0])
    assert frechet_distance(stats(features), stats(features + shift)) == pytest.approx(14.0, rel=1e-9)


def test_the_distance_of_gaussians_with_shared_axes():
    """|mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    a, b = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 0.1, 0.5], dtype=torch.float64)
    first = standardised(50, 3) * a + 1
    second = standardised(70, 3, seed=1) * b
    turn = torch.linalg.qr(randn(3, 3, seed=5, dtype=torch.float64))[0]
    expected = 3 + float((a - b).square().sum())
    assert frechet_distance(stats(first), stats(second)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(stats(first @ turn), stats(second @ turn)) == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_gaussians_with_other_axes():
    """The general formula."""
    a = torch.cov(randn(4, 30, seed=1, dtype=torch.float64))
    b = torch.cov(randn(4, 30, seed=2, dtype=torch.float64) * 2)
    first = standardised(50, 4) @ torch.linalg.cholesky(a).T
    second = standardised(60, 4, seed=3) @ torch.linalg.cholesky(b).T
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()  # Tr (A B)^1/2 by the eigenvalues of the product
    expected = float(torch.trace(a) + torch.trace(b) - 2 * cross)
    assert frechet_distance(stats(first), stats(second)) == pytest.approx(expected, rel=1e-8)


def test_fewer_images_than_features_give_a_finite_distance():
    value = frechet_distance(stats(randn(5, 20)), stats(randn(6, 20, seed=1)))
    assert value > 0


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_of_less_than_two_features_is_refused(count):
    with says(ValueError, "at least two", f"got {count}"):
        stats(randn(count, 3)).covariance  # noqa: B018


# Precision and recall

def test_a_set_lies_among_itself_and_not_among_one_far_away():
    a, b = randn(60, 7), randn(50, 7, seed=1)
    assert precision_recall(a, a) == (1, 1) and precision_recall(a, a.flip(0)) == (1, 1)
    assert precision_recall(a, b + 100) == (0, 0)


def test_images_of_one_kind_have_precision_and_no_recall():
    """One of four distant clusters is generated: precision is one, recall a quarter."""
    near = randn(4 * 40, 5) * 0.1
    real = near + 50 * torch.eye(5)[torch.arange(4).repeat_interleave(40)]
    assert precision_recall(real[40:80], real) == (1, 0.25)
    assert precision_recall(real, real[40:80]) == (0.25, 1)


@pytest.mark.parametrize("k, inside", [(1, 2), (2, 4), (3, 6)])
def test_a_point_counts_up_to_the_kth_neighbour_s_distance(k, inside):
    """On a line: the k-th neighbour of the member at 0 is the one at -k, and nothing else reaches beyond k."""
    cloud = torch.cat([-torch.arange(20.0), torch.full((5,), 1e6)])[:, None]
    points = torch.tensor([[0.5], [1.0], [1.001], [2.0], [2.001], [3.0], [3.001]])
    assert precision_recall(points, cloud, k)[0] == pytest.approx(inside / 7)
    assert precision_recall(-19 - points, cloud, k)[0] == pytest.approx(inside / 7)


def test_precision_and_recall_equal_a_loop_over_all_pairs():
    """Precision and recall agree with a loop over all pairs, and change places with their sets."""
    found, real = randn(30, 4) * 1.5, randn(45, 4, seed=1) + 0.5

    def share(points, cloud):
        reach = [sorted(float((a - b).norm()) for b in cloud)[3] for a in cloud]  # the smallest is that to itself
        return sum(any(float((p - c).norm()) <= r for c, r in zip(cloud, reach, strict=True)) for p in points) / len(points)
    expected = (share(found, real), share(real, found))
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]
    assert precision_recall(found, real) == pytest.approx(expected)
    assert precision_recall(real, found) == pytest.approx(expected[::-1])


def test_the_size_of_the_blocks_does_not_matter(monkeypatch):
    found, real = randn(60, 6), randn(70, 6, seed=1)
    values = {metrics._share_among(found, real, 3, block) for block in (1, 7, 30, 69, 1024)}
    assert len(values) == 1 and 0 < values.pop() < 1


def test_precision_and_recall_ignore_a_common_offset():
    """Features of real networks are all positive, far from zero compared with what tells them apart."""
    found, real = randn(60, 6), randn(70, 6, seed=1)
    away = [(part.double() + 3000).float() for part in (found, real)]
    assert precision_recall(*away) == precision_recall(*((part.double() - 3000).float() for part in away))


@pytest.mark.parametrize("found, real, k", [(3, 50, 3), (50, 3, 3), (5, 50, 5), (0, 50, 3)])
def test_precision_and_recall_of_too_few_features_are_refused(found, real, k):
    with says(ValueError, f"{k}-th", f"got {min(found, real)}"):
        precision_recall(randn(found, 4), randn(real, 4), k)
    assert precision_recall(randn(k + 1, 4), randn(k + 1, 4), k) == (1, 1)
