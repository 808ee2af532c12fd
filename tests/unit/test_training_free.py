"""The training-free family. The central test writes every published algorithm in its own notation, and finds the same."""
import logging
import math
from dataclasses import replace

import pytest
import torch
from helpers import randn, says
from helpers.gaussian import GaussianMixture
from torch import Tensor, nn

from ppap_core.guidance.moments import Moments, MomentState
from ppap_core.guidance.training_free import METHODS, TrainingFree, sample_training_free
from ppap_core.guiders.guider import Guider
from ppap_core.noise import NoiseInterval, expand
from ppap_core.rng import seeded, seeded_noise
from ppap_core.sampling import karras_sigmas, sample_euler

B, SHAPE = 3, (3, 5, 7)
LEVELS = [10.0, 4.0, 1.5, 0.5, 0.1, 0.0]
SEEDS = [11, 7, 2**40]
LABELS = torch.tensor([2, 0, 3])  # each image has a target of its own
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
THROUGH = [name for name, method in METHODS.items() if method.rho]  # those that ask the denoiser for gradients
# as in the table, but with everything in use that a method has
SETTINGS = {
    "dps": replace(METHODS["dps"], rho=0.02),
    "lgd": replace(METHODS["lgd"], rho=0.3, samples=3, spread=0.8),
    "freedom": replace(METHODS["freedom"], rho=0.2, recurrences=3, repeat=NoiseInterval(0.5, 4.0)),
    "mpgd": replace(METHODS["mpgd"], mu=0.03),
    "ugd": replace(METHODS["ugd"], rho=0.4, mu=0.02, iterations=3, recurrences=2),
    "tfg": replace(METHODS["tfg"], rho=0.3, mu=0.02, spread=0.6, samples=3, iterations=2, recurrences=2),
    "adam_dps": replace(METHODS["adam_dps"], rho=0.05, moments=Moments(0.4, 0.7)),
    "adam_mpgd": replace(METHODS["adam_mpgd"], mu=0.05, moments=Moments(0.4, 0.7)),
}


def mixture() -> GaussianMixture:
    """Classes near enough for a clean classifier to be unsure of predictions."""
    whole = GaussianMixture.of_shape(SHAPE)
    return GaussianMixture(0.1 * whole.means, whole.width)


def judge(world: GaussianMixture, labels: Tensor = LABELS) -> Guider:
    """The exact classifier of clean images, as an off-the-shelf network: it cannot know about noise."""
    def net(image: Tensor, sigma: Tensor) -> Tensor:
        assert not sigma.any(), "an off-the-shelf network judges predictions as clean images"
        return world.log_likelihood(image, sigma)
    return Guider("mixture", net, lambda image: image, "class", target=labels)


def start(levels: list[float] = LEVELS, count: int = B) -> tuple[Tensor, Tensor]:
    sigmas = torch.tensor(levels, dtype=torch.float64)
    return randn(count, *SHAPE, seed=3, dtype=torch.float64) * sigmas[0], sigmas


def run(method: TrainingFree, levels: list[float] = LEVELS, **changes) -> Tensor:
    x, sigmas = start(levels)
    given = {"denoise": mixture(), "guider": judge(mixture()), "x": x, "sigmas": sigmas, "seeds": SEEDS} | changes
    return sample_training_free(method=method, **given)


# The published algorithms, in their own notation: alpha-bar, eps, and states of the variance-preserving scale

class Published:
    """Setting of all papers. a is alpha-bar of this step and b of the next, which has less noise; log p is (B,)."""

    def __init__(self, settings: TrainingFree, a: float, b: float, place: int, mean_ratio: float, past: list[Tensor]):
        self.set, self.a, self.b, self.place, self.mean_ratio, self.world = settings, a, b, place, mean_ratio, mixture()
        self.past = past  # gradients of the steps so far, for Adam

    def eps(self, x: Tensor) -> Tensor:
        sigma = x.new_full((len(x),), math.sqrt(1 / self.a - 1))
        return (x - math.sqrt(self.a) * self.world(x / math.sqrt(self.a), sigma)) / math.sqrt(1 - self.a)

    def x0(self, x: Tensor, eps: Tensor) -> Tensor:
        return (x - math.sqrt(1 - self.a) * eps) / math.sqrt(self.a)

    def ddim(self, x0: Tensor, eps: Tensor) -> Tensor:
        return math.sqrt(self.b) * x0 + math.sqrt(1 - self.b) * eps

    def log_p(self, x0: Tensor) -> Tensor:
        log_p = self.world.log_likelihood(x0, x0.new_zeros(len(x0))).log_softmax(1)
        return log_p[torch.arange(len(x0)), LABELS]

    def grad(self, f, point: Tensor) -> tuple[Tensor, Tensor]:
        point = point.detach().requires_grad_()
        value = f(point)
        return value.detach(), torch.autograd.grad(value.sum(), point)[0]

    def grad_x(self, x: Tensor, log_p) -> tuple[Tensor, Tensor]:
        return self.grad(lambda x: log_p(self.x0(x, self.eps(x))), x)

    def noise(self, again: int, kind: int, count: int) -> list[Tensor]:
        rows = [torch.randn(count, *SHAPE, generator=seeded(seed, self.place, again, kind)) for seed in SEEDS]
        return list(torch.stack(rows, dim=1).double())

    def smoothed(self, again: int, std: float):
        draws = self.noise(again, 0, self.set.samples)
        return lambda x0: torch.stack([self.log_p(x0 + std * draw) for draw in draws]).exp().mean(0).log()

    def renoise(self, x: Tensor, again: int) -> Tensor:
        """x_t from q(x_t | x_(t-1))."""
        ratio = self.a / self.b
        return math.sqrt(ratio) * x + math.sqrt(1 - ratio) * self.noise(again, 1, 1)[0]


def dps(step: Published, x: Tensor) -> Tensor:
    eps = step.eps(x)
    value, gradient = step.grad_x(x, step.log_p)
    assert value.max() < -1e-5, "where the published quotient is still one of numbers"
    return step.ddim(step.x0(x, eps), eps) + step.set.rho * gradient / expand(value.abs(), x)


def lgd(step: Published, x: Tensor) -> Tensor:
    eps = step.eps(x)
    _, gradient = step.grad_x(x, step.smoothed(0, step.set.spread * math.sqrt(1 - step.a)))
    return step.ddim(step.x0(x, eps), eps) + step.set.rho * gradient


def freedom(step: Published, x: Tensor) -> Tensor:
    a, b = step.a, step.b
    repeated = step.set.repeat.lo <= math.sqrt(1 / a - 1) < step.set.repeat.hi
    for again in range(step.set.recurrences if repeated else 1):
        x = step.renoise(x, again) if again else x
        eps = step.eps(x)
        _, gradient = step.grad_x(x, step.log_p)
        c1 = math.sqrt(b) * (1 - a / b) / (1 - a)
        length = eps.square().mean((1, 2, 3)).sqrt() * math.sqrt(1 - a) / math.sqrt(a) * c1
        rho = step.set.rho * length / gradient.square().mean((1, 2, 3)).sqrt()
        x = step.ddim(step.x0(x, eps), eps) + expand(rho, x) * gradient
    return x


def mpgd(step: Published, x: Tensor) -> Tensor:
    eps = step.eps(x)
    x0 = step.x0(x, eps)
    return step.ddim(x0 + step.set.mu * step.grad(step.log_p, x0)[1], eps)


def ugd(step: Published, x: Tensor) -> Tensor:
    for again in range(step.set.recurrences):
        x = step.renoise(x, again) if again else x
        eps = step.eps(x)
        x0 = moved = step.x0(x, eps)
        eps = eps - step.set.rho * math.sqrt(1 - step.a) * step.grad_x(x, step.log_p)[1]
        for _ in range(step.set.iterations):
            moved = moved + step.set.mu * step.grad(step.log_p, moved)[1]
        eps = eps - math.sqrt(step.a / (1 - step.a)) * (moved - x0)
        x = step.ddim(step.x0(x, eps), eps)
    return x


def tfg(step: Published, x: Tensor) -> Tensor:
    ratio = step.a / step.b
    for again in range(step.set.recurrences):
        x = step.renoise(x, again) if again else x
        log_p = step.smoothed(again, step.set.spread * math.sqrt(1 - step.a))
        eps = step.eps(x)
        x0 = moved = step.x0(x, eps)
        variance = step.set.rho * ratio / step.mean_ratio * step.grad_x(x, log_p)[1]
        for _ in range(step.set.iterations):
            moved = moved + step.set.mu * ratio / step.mean_ratio * step.grad(log_p, moved)[1]
        x = step.ddim(x0, eps) + variance / math.sqrt(ratio) + math.sqrt(step.b) * (moved - x0)
    return x


def adam(step: Published, gradient: Tensor) -> Tensor:
    step.past.append(gradient)
    first = second = torch.zeros_like(gradient)
    beta1, beta2 = step.set.moments.beta1, step.set.moments.beta2
    for part in step.past:
        first, second = beta1 * first + (1 - beta1) * part, beta2 * second + (1 - beta2) * part**2
    first, second = first / (1 - beta1 ** len(step.past)), second / (1 - beta2 ** len(step.past))
    return first / (second.sqrt() + 1e-8)


def adam_dps(step: Published, x: Tensor) -> Tensor:
    eps = step.eps(x)
    move = adam(step, step.grad_x(x, step.log_p)[1])
    return step.ddim(step.x0(x, eps), eps) + step.set.rho * move / math.sqrt(step.a / step.b)


def adam_mpgd(step: Published, x: Tensor) -> Tensor:
    eps = step.eps(x)
    x0 = step.x0(x, eps)
    return step.ddim(x0 + step.set.mu * adam(step, step.grad(step.log_p, x0)[1]), eps)


PUBLISHED = {"dps": dps, "lgd": lgd, "freedom": freedom, "mpgd": mpgd, "ugd": ugd, "tfg": tfg, "adam_dps": adam_dps,
             "adam_mpgd": adam_mpgd}


def test_every_method_of_the_table_is_held_against_its_paper():
    assert PUBLISHED.keys() == METHODS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_published_algorithm(name):
    """Each method is the published algorithm on the other scale of noise."""
    x, _ = start()
    bars = [1 / (1 + sigma**2) for sigma in LEVELS]
    ratios = [a / b for a, b in zip(bars[:-1], bars[1:], strict=True)]
    state, past = x * math.sqrt(bars[0]), []
    for place, (a, b) in enumerate(zip(bars[:-1], bars[1:], strict=True)):
        state = PUBLISHED[name](Published(SETTINGS[name], a, b, place, sum(ratios) / len(ratios), past), state)
    out = run(SETTINGS[name])
    torch.testing.assert_close(out, state, **CLOSE)
    assert (out - sample_euler(mixture(), *start())).abs().amax((1, 2, 3)).min() > 1e-2, "guidance had something to do"


def test_smoothing_keeps_the_gradient_of_linear_energies():
    """log mean_k exp(l(z) + l(xi_k)) differs from l(z) by what does not depend on z."""
    world = mixture()
    flat = replace(judge(world), net=lambda image, sigma: image.flatten(1)[:, :4], task="number", target=torch.zeros(1, 4))
    linear = replace(METHODS["lgd"], samples=5, spread=0.9, rho=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        from ppap_core.guiders.tasks import TASKS
        task = replace(TASKS["number"], loss=lambda output, target: output.sum(1), sum_over_pixels=False)
        patch.setattr("ppap_core.guiders.guider.TASKS", TASKS | {"number": task})
        smooth, plain = run(linear, guider=flat), run(replace(linear, spread=0.0), guider=flat)
    torch.testing.assert_close(smooth, plain, rtol=0, atol=1e-12)


def test_the_rule_of_dps_divides_by_the_smoothed_energy():
    world, (x, _), levels = mixture(), start([1.5]), [1.5, 0.0]
    method = TrainingFree(rho=1.0, rho_rule="state", spread=0.7, samples=4)
    plain = world(x, x.new_full((B,), 1.5))
    ratio = (run(method, levels, x=x) - plain) / (run(replace(method, rho_rule="energy"), levels, x=x) - plain)
    std = 0.7 * 1.5 / math.sqrt(1 + 1.5**2)
    draws = torch.stack([torch.randn(4, *SHAPE, generator=seeded(seed, 0, 0, 0)) for seed in SEEDS], dim=1).double()
    chances = torch.stack([judge(world).energy(plain + std * draw, x.new_zeros(B)) for draw in draws]).neg().exp()
    torch.testing.assert_close(ratio, expand(-chances.mean(0).log(), x).expand_as(x), rtol=1e-9, atol=0)


def test_without_memory_the_moments_are_the_sign():
    state, gradient = MomentState(Moments(0.0, 0.0)), randn(2, 3, 4, 5)
    for scale in (1.0, 100.0):
        torch.testing.assert_close(state.direction(scale * gradient), gradient.sign(), rtol=0, atol=1e-3)
    assert torch.equal(state.direction(0 * gradient), torch.zeros_like(gradient))


def test_a_constant_gradient_has_a_direction_of_ones():
    """The moments are corrected for their start at zero."""
    state = MomentState(Moments(0.9, 0.99))
    for _ in range(3):
        torch.testing.assert_close(state.direction(torch.full((1, 2), -3.0)), torch.full((1, 2), -1.0))


@pytest.mark.parametrize("beta1, beta2", [(1.0, 0.5), (0.5, -0.1), (0.5, math.nan)])
def test_moments_that_cannot_be_are_refused_in_words(beta1, beta2):
    with says(ValueError, "0 <= beta < 1", str(beta1), str(beta2)):
        Moments(beta1, beta2)


# What holds for all of them

@pytest.mark.parametrize("name", METHODS)
def test_without_strength_it_is_the_plain_sampler(name):
    """The samples are the plain sampler's bit for bit, and the guider is never asked."""
    def refuse(image: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("asked")
    passes = []
    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        passes.append(float(sigma[0]))
        return mixture()(x, sigma)
    method = replace(METHODS[name], rho=0.0, mu=0.0, recurrences=3, spread=1.0, repeat=NoiseInterval())
    out = run(method, denoise=counted, guider=replace(judge(mixture()), net=refuse))
    assert torch.equal(out, sample_euler(mixture(), *start())) and passes == LEVELS[:-1]


@pytest.mark.parametrize("name", METHODS)
def test_an_image_does_not_depend_on_the_batch_it_is_in(name):
    together, (x, _) = run(SETTINGS[name]), start()
    for i in range(B):
        alone = run(SETTINGS[name], x=x[i:i + 1], seeds=SEEDS[i:i + 1], guider=judge(mixture(), LABELS[i:i + 1]))
        torch.testing.assert_close(alone, together[i:i + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_matters_only_where_there_is_noise(name):
    method = SETTINGS[name]
    other = run(method, seeds=[SEEDS[0], 8, SEEDS[2]])
    changed = [not torch.equal(a, b) for a, b in zip(other, run(method), strict=True)]
    assert changed == [False, bool(method.spread or method.recurrences > 1), False]


def test_every_round_and_every_step_draws_noise_of_its_own(monkeypatch):
    places = []
    monkeypatch.setattr("ppap_core.guidance.training_free.seeded", lambda *place: places.append(place) or seeded(*place))
    run(SETTINGS["tfg"])
    steps, kinds = range(len(LEVELS) - 1), [(0, 0), (1, 1), (1, 0)]
    assert sorted(places) == sorted((seed, step, *kind) for seed in SEEDS for step in steps for kind in kinds)


@pytest.mark.parametrize("name", METHODS)
def test_guidance_brings_more_images_of_the_wanted_class(name):
    world, count, label = mixture(), 24, 2
    sigmas = karras_sigmas(10, 0.05, 20.0).double()
    x = seeded_noise(range(count), SHAPE).double() * sigmas[0]
    def share(images: Tensor) -> float:
        return (world.log_likelihood(images, images.new_zeros(count)).argmax(1) == label).double().mean().item()
    guided = sample_training_free(world, judge(world, torch.tensor([label])), x, sigmas, METHODS[name], range(count))
    assert share(guided) > share(sample_euler(world, x, sigmas)) + 0.4


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_gradients_through_the_denoiser_are_differences(spread):
    """The gradient through the denoiser is a finite difference of the energy."""
    world, sigma, (x, _), step = mixture(), 1.5, start([1.5]), 1e-5
    method = TrainingFree(rho=0.3, rho_rule="forward", spread=spread, samples=4)
    out = run(method, [sigma, 0.0], x=x)
    level, direction = x.new_full((B,), sigma), randn(B, *SHAPE, seed=4, dtype=torch.float64)
    slope = (((world(x, level) - out) / (0.3 * sigma**2)) * direction).flatten(1).sum(1)
    std = spread * sigma / math.sqrt(1 + sigma**2)
    draws = torch.stack([torch.randn(4, *SHAPE, generator=seeded(seed, 0, 0, 0)) for seed in SEEDS], dim=1).double()
    def energy(by: float) -> Tensor:
        image, clean = world(x + by * direction, level), x.new_zeros(B)
        return -torch.stack([-judge(world).energy(image + std * draw, clean) for draw in draws]).exp().mean(0).log()
    torch.testing.assert_close(slope, (energy(step) - energy(-step)) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_an_image_without_a_finite_gradient_is_unguided(name, fault, caplog):
    """An image whose gradient is not finite is left unguided; the others are guided."""
    world, method = mixture(), replace(SETTINGS[name], recurrences=1)
    broken = torch.tensor([[1.0], [fault], [1.0]], dtype=torch.float64)
    faulty = replace(judge(world), net=lambda image, sigma: world.log_likelihood(image, sigma) * broken)
    with caplog.at_level(logging.WARNING):
        out = run(method, guider=faulty)
    healthy = run(method)
    assert torch.equal(out[1], sample_euler(world, *start())[1])
    assert torch.equal(out[0], healthy[0]) and torch.equal(out[2], healthy[2])
    assert "mixture" in caplog.text and "1 of 3" in caplog.text and "unguided" in caplog.text


@pytest.mark.parametrize("name", METHODS)
def test_the_last_step_to_an_image_is_finite_and_guided(name):
    out = run(SETTINGS[name], [0.1, 0.0])
    assert out.isfinite().all() and not torch.equal(out, sample_euler(mixture(), *start([0.1, 0.0])))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("logit", [0.0, 12.0, 16.0, 17.0, 60.0, 87.0, 200.0])
def test_a_network_sure_of_its_target_does_no_harm(name, logit, caplog):
    """-log p is then 0 or a rounding, and its gradient nothing, a rounding or so small that its square is nothing."""
    def net(image: Tensor, sigma: Tensor) -> Tensor:
        tail = 1e-3 * image.flatten(1).sum(1)
        return torch.stack([logit + tail, -tail], dim=1)
    sure = replace(judge(mixture()), net=net, target=torch.tensor([0]))
    x, sigmas = (part.float() for part in start())
    method = replace(SETTINGS[name], recurrences=1)
    given = {"denoise": lambda x, sigma: mixture()(x, sigma).float(), "guider": sure, "x": x, "sigmas": sigmas}
    out = run(method, **given)
    plain = sample_euler(given["denoise"], x, sigmas)
    assert out.isfinite().all() and (out - plain).square().mean().sqrt() < 2 and not caplog.records


# Cost

@pytest.mark.parametrize("name", METHODS)
def test_the_denoiser_runs_once_for_each_repeated_step(name):
    passes = []
    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        passes.append(float(sigma[0]))
        assert x.requires_grad == torch.is_grad_enabled() == (name in THROUGH)
        return mixture()(x, sigma)
    out = run(SETTINGS[name], denoise=counted)
    repeats = SETTINGS[name].recurrences
    assert passes == [level for level in LEVELS[:-1] for _ in range(repeats if level in SETTINGS[name].repeat else 1)]
    assert not out.requires_grad


@pytest.mark.parametrize("spread, asked", [(0.0, 1), (0.5, 4)])
def test_without_spread_one_evaluation_is_enough(spread, asked):
    calls = []
    world = mixture()
    counted = replace(judge(world), net=lambda image, sigma: calls.append(0) or world.log_likelihood(image, sigma))
    run(TrainingFree(rho=0.1, mu=0.01, iterations=2, samples=4, spread=spread), guider=counted)
    assert len(calls) == asked * 3 * (len(LEVELS) - 1)


def test_repetitions_stay_inside_their_window():
    method = replace(SETTINGS["freedom"], repeat=NoiseInterval(0.0, 0.0))
    assert torch.equal(run(method), run(replace(method, recurrences=1)))


# What it is given

@pytest.mark.parametrize("name", METHODS)
def test_of_latents_the_guider_judges_the_image_that_it_sees(name):
    world = mixture()
    seeing = replace(judge(world), decode=lambda latent, sigma: 1.5 * latent + 0.1)
    equivalent = replace(judge(world), net=lambda image, sigma: world.log_likelihood(1.5 * image + 0.1, sigma))
    torch.testing.assert_close(run(SETTINGS[name], guider=seeing), run(SETTINGS[name], guider=equivalent), **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_it_works_in_inference_mode_and_keeps_its_inputs(name):
    torch.manual_seed(0)
    expected = run(SETTINGS[name])
    before = torch.get_rng_state()
    with torch.inference_mode():
        x, sigmas = start()
        kept = x.clone()
        guider = judge(mixture(), LABELS.clone())
        assert x.is_inference() and guider.target.is_inference()
        denoise = mixture_made_outside
        out = run(SETTINGS[name], x=x, sigmas=sigmas, guider=replace(guider, net=judge(denoise).net), denoise=denoise)
        assert torch.equal(out, expected) and torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


mixture_made_outside = mixture()


@pytest.mark.parametrize("name", THROUGH)
def test_a_denoiser_with_weights_of_its_own_keeps_no_gradient(name):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.scale * mixture()(x, sigma)
    net = Scaled()
    assert torch.equal(run(SETTINGS[name], denoise=net), run(SETTINGS[name])) and net.scale.grad is None


@pytest.mark.parametrize("name", THROUGH)
def test_a_denoiser_that_lets_no_gradient_through_is_refused(name):
    with says(ValueError, "denoiser", "no gradient", "rho"):
        run(SETTINGS[name], denoise=torch.no_grad()(mixture().__call__))


def test_methods_without_rho_need_no_gradients():
    """They take a denoiser that passes none."""
    out = run(SETTINGS["mpgd"], denoise=torch.no_grad()(mixture().__call__))
    assert torch.equal(out, run(SETTINGS["mpgd"]))


@pytest.mark.parametrize("wrong, words", [
    ({"rho_rule": "decrease"}, ("rho_rule", "'decrease'", "energy", "forward")),
    ({"mu_rule": "forward"}, ("mu_rule", "'forward'", "constant", "backward")),
    ({"samples": 0}, ("samples", "at least 1")), ({"iterations": 0}, ("iterations", "at least 1")),
    ({"recurrences": 0}, ("recurrences", "at least 1")), ({"spread": -0.1}, ("spread", "-0.1")),
    ({"spread": math.nan}, ("spread", "nan"))])
def test_settings_that_cannot_be_are_refused_in_words(wrong, words):
    with says(ValueError, *words):
        TrainingFree(**wrong)


def test_each_image_needs_a_seed():
    with says(ValueError, "2 seeds", "3 images"):
        run(METHODS["dps"], seeds=[1, 2])


def test_a_guider_without_a_target_is_refused():
    with says(ValueError, "mixture", "no target"):
        run(METHODS["dps"], guider=replace(judge(mixture()), target=None))
