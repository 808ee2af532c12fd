"""Guiders in half precision: each in the type that holds its numbers, and what fails is counted."""
import logging
from dataclasses import replace

import pytest
import torch
from helpers import VIEWS, B, H, W, gaussian_denoise, images, level, randn, small_guider
from torch import nn

from ppap_core.experts.bank import base_network
from ppap_core.guidance import precision
from ppap_core.guidance.gradients import HALF, Prediction, energy_gradient
from ppap_core.guidance.precision import RunState, wider_types
from ppap_core.guidance.prior import PriorConfig, PriorObjective, run_prior
from ppap_core.guidance.shift import GuidanceSettings, guidance_shift, guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.sampling import karras_sigmas, sample_euler

HOT = 3e5  # such values stand before the last norm of the decoder of SDXL; float16 ends at 65504


class HotDecoder(nn.Module):
    """A decoder whose activations are large before a norm: (latent, sigma) -> image."""

    def __init__(self, dtype=torch.float32, size=HOT):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            for place, weight in enumerate(self.parameters()):
                weight.copy_(0.3 * randn(*weight.shape, seed=place))
        self.size = size
        self.to(dtype).requires_grad_(False)
        self.types = []

    def forward(self, latent, sigma):
        self.types.append(self.enter.weight.dtype)
        return self.leave(self.norm(self.size * self.enter(latent.to(self.enter.weight.dtype)))).float()


class Hot(nn.Module):
    """A network that is as it was, but has values of this size on the way; keeps the types that it computed in."""

    def __init__(self, net, size=1e6):
        super().__init__()
        self.net, self.size, self.types = net, size, []

    def forward(self, image, sigma):
        out = self.net(image, sigma)
        self.types.append(out.dtype)
        return out * self.size / self.size


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, image, sigma):
        return self.net(image, sigma) * self.factor


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (nn.functional.normalize(tensor.flatten(1).double(), eps=1e-30) for tensor in (a, b))
    return float((a * b).sum(1).min())


def assert_close(rough: torch.Tensor, exact: torch.Tensor) -> None:
    assert rough.isfinite().all() and alike(rough, exact) > 0.98
    torch.testing.assert_close(rough.norm(), exact.norm(), rtol=0.1, atol=0)


def shifts(terms: list[Term], compute, steps: int = 3, denoise=gaussian_denoise):
    """What guidance did in a sampling: the records of all steps by term, and the samples."""
    records = []
    guidance = guided(denoise, terms, GuidanceSettings(compute_dtype=compute), lambda done: records.extend(done.records))
    samples = sample_euler(guidance, 5 * images(), karras_sigmas(steps, 0.1, 5.0))
    return [[record for record in records if record.term == term] for term in range(len(terms))], samples


# Decoders

@pytest.mark.parametrize("compute", HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_computes_in_its_own_type(dtype, compute):
    decoder, x = HotDecoder(dtype), images()
    guider = replace(small_guider(), decode=decoder)
    exact = energy_gradient(replace(guider, decode=HotDecoder()), x, level(0.5, x))[1]
    result = RunState().energy_gradient(0, guider, x, level(0.5, x), compute)
    assert_close(result.gradient, exact)
    assert decoder.types == [dtype] and result.fallback is None


@pytest.mark.parametrize("compute", [None, torch.float32, *HALF])
def test_a_decoder_of_float16_that_overflows_is_widened(compute, caplog):
    decoder, x = HotDecoder(torch.float16), images()
    guider = replace(small_guider(), decode=decoder)
    exact = energy_gradient(replace(guider, decode=HotDecoder()), x, level(0.5, x))[1]
    with caplog.at_level(logging.WARNING):
        [records], _ = shifts([Term(guider)], compute)
    assert decoder.types[-3:] == [torch.float32] * 3 and decoder.enter.weight.dtype == torch.float16
    assert [record.fallback for record in records] == [torch.float32] * 3 and not sum(record.unguided for record in records)
    assert "float32 for the rest of the run" in caplog.text
    assert_close(RunState().energy_gradient(0, guider, x, level(0.5, x), compute).gradient, exact)


# Loss scales

@pytest.mark.parametrize("task", ["class", "number", "embedding", "features", "segmentation"])
@pytest.mark.parametrize("factor", [1e3, 100.0, 1e-3, 1e-5])
def test_large_and_small_gradients_fit_into_float16(factor, task):
    """Of a network whose outputs span that much; without another type where the outputs themselves fit."""
    guider, x = small_guider(task), images()
    guider = replace(guider, net=Scaled(guider.net, factor), target=torch.tensor([0]) if task == "class" else guider.target)
    exact = energy_gradient(guider, x, level(0.5, x))[1]
    result = RunState().energy_gradient(0, guider, x, level(0.5, x), torch.float16)
    undecided = exact.flatten(1).norm(dim=1) > 1e-9  # where a class is certain there is no gradient
    assert_close(result.gradient[undecided], exact[undecided])
    assert result.fallback is None and undecided.any()


def test_each_image_has_a_scale_of_its_own():
    guider, x = small_guider("number"), images()
    guider = guider.aim(torch.tensor([[0.8], [-2e4], [1e-3]]))
    exact = energy_gradient(guider, x, level(0.5, x))[1]
    rough = energy_gradient(guider, x, level(0.5, x), torch.float16)[1]
    assert alike(rough, exact) > 0.99
    torch.testing.assert_close(rough.flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1), rtol=0.05, atol=0)


# Fallbacks

@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("compute", "size", "types"), [
    (torch.float16, 1e6, [torch.float16] + 3 * [torch.bfloat16]), (torch.bfloat16, 1e6, 3 * [torch.bfloat16]),
    (torch.float32, 1e6, 3 * [torch.float32])])
def test_a_network_that_overflows_is_widened_once(view, compute, size, types, caplog):
    """For the rest of the run, for its term only, and it is said once."""
    guider, other = small_guider(view=view), small_guider("depth")
    net, calm = Hot(guider.net, size), Hot(other.net, 1.0)
    terms = [Term(replace(guider, net=net)), Term(replace(other, net=calm))]
    with caplog.at_level(logging.WARNING):
        (hot, cool), samples = shifts(terms, compute)
    assert net.types == types and calm.types == 3 * [compute]
    fell = torch.bfloat16 if len(types) > 3 else None
    assert [record.fallback for record in hot] == 3 * [fell] and [record.fallback for record in cool] == 3 * [None]
    assert sum(record.unguided for record in hot) == 0 and samples.isfinite().all()
    assert len(caplog.records) == (fell is not None)
    assert not fell or all(word in caplog.text for word in (guider.name, "float16", "bfloat16", "rest of the run"))


def test_another_run_begins_in_the_type_of_the_model():
    net = Hot(small_guider().net)
    for _ in range(2):
        shifts([Term(replace(small_guider(), net=net))], torch.float16)
    assert net.types == 2 * ([torch.float16] + 3 * [torch.bfloat16])


def test_a_device_without_bfloat16_goes_on_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16", lambda device: False)
    net = Hot(small_guider().net)
    [records], _ = shifts([Term(replace(small_guider(), net=net))], torch.float16)
    assert net.types == [torch.float16] + 3 * [torch.float32]
    assert [record.fallback for record in records] == 3 * [torch.float32]


def test_what_fails_in_bfloat16_too_goes_on_in_float32():
    assert wider_types(torch.float16, small_guider(), torch.device("cpu")) == [torch.bfloat16, torch.float32]
    assert wider_types(torch.bfloat16, small_guider(), torch.device("cpu")) == [torch.float32]
    assert wider_types(torch.float32, small_guider(), torch.device("cpu")) == []

    class Picky(Hot):
        def forward(self, image, sigma):
            out = super().forward(image, sigma)
            return out if out.dtype == torch.float32 else out / 0

    net = Picky(small_guider().net)
    [records], _ = shifts([Term(replace(small_guider(), net=net))], torch.float16)
    assert net.types == [torch.float16, torch.bfloat16, *3 * [torch.float32]]
    assert [record.fallback for record in records] == 3 * [torch.float32]


class Moody(nn.Module):
    """A network whose output is no number in one of its calls, and those that repeat it."""

    def __init__(self, net, bad):
        super().__init__()
        self.net, self.bad, self.types = net, bad, []

    def forward(self, image, sigma):
        out = self.net(image, sigma)
        self.types.append(out.dtype)
        return out * float("nan") if float(sigma[0]) in self.bad else out


@pytest.mark.parametrize("compute", [None, *HALF])
def test_one_bad_step_is_counted_and_changes_no_type(compute, caplog):
    """Where no type helps, the next step is computed in the type that was asked for."""
    sigmas = karras_sigmas(4, 0.1, 5.0)
    net = Moody(small_guider().net, [float(sigmas[1])])
    with caplog.at_level(logging.WARNING):
        [records], samples = shifts([Term(replace(small_guider(), net=net))], compute, steps=4)
    assert [record.unguided for record in records] == [0, B, 0, 0] and samples.isfinite().all()
    assert {record.fallback for record in records} == {None} and net.types[-2:] == 2 * [compute or torch.float32]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("compute", [None, *HALF])
def test_an_image_that_is_no_number_changes_no_type(compute, view):
    """It is unguided; the others are guided as without it."""
    net, x = Hot(small_guider(view=view).net, 1.0), images()
    x[1, 0, 0, 0] = float("nan")
    settings = GuidanceSettings(compute_dtype=compute, run=RunState())
    [term] = [Term(replace(small_guider(view=view), net=net))]
    for _ in range(2):
        guidance = guidance_shift([term], Prediction(x, level(0.5, x), x), settings)
    alone = guidance_shift([term], Prediction(x[::2], level(0.5, x[::2]), x[::2]), settings)
    assert not guidance.delta[1].any() and guidance.records[0].unguided == 1 and not settings.run.fallbacks
    torch.testing.assert_close(guidance.delta[::2], alone.delta, rtol=1e-2, atol=1e-3 * float(alone.delta.abs().max()))
    assert len(net.types) == 3  # no type was tried beside


def test_a_single_bad_image_of_many_widens_the_term():
    """The others lose nothing by it."""
    net, x = Scaled(small_guider("number").net, 1.0), images()
    guider = replace(small_guider("number"), net=net).aim(torch.tensor([[0.8], [0.5], [1e25]]))
    result = RunState().energy_gradient(0, guider, x, level(0.5, x), torch.float16)
    assert result.gradient[:2].isfinite().all()


# Through the model

def test_a_gradient_that_overflows_in_the_model_is_scaled_down():
    def vjp(gradient):
        return (gradient.half() * 6e4 * 100 / 100).float() / 6e4  # float16 ends at 65504, and a gradient has values beyond 1

    x, guider = images(), small_guider()
    term = Term(guider, backprop_through_model=True)
    found, plain = (guidance_shift([term], Prediction(x, level(0.5, x), x, back)) for back in (vjp, torch.clone))
    assert found.records[0].unguided == 0
    assert_close(found.delta, plain.delta)


def test_a_model_without_a_finite_gradient_is_counted():
    x = images()
    prediction = Prediction(x, level(0.5, x), x, lambda gradient: gradient * float("nan"))
    guidance = guidance_shift([Term(small_guider(), backprop_through_model=True)], prediction)
    assert guidance.records[0].unguided == B and not guidance.delta.any()


# Everything else

def test_loss_target_and_preprocessing_have_their_own_type():
    """Only the network computes in half precision."""
    types = []

    class Watching(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, image, sigma):
            types.append((image.dtype, torch.is_autocast_enabled("cpu")))
            return self.net(image, sigma)

    guider = small_guider("features")
    watched: Guider = replace(guider, net=Watching(guider.net), cutouts=2)
    x = images()
    energy_gradient(watched, x, level(0.5, x), torch.float16)
    assert types == 3 * [(torch.float32, True)] and not torch.is_autocast_enabled("cpu")


def test_a_guider_of_half_weights_is_widened_in_a_search():
    """A search asks for no type; weights of half precision that overflow are read as float32."""
    decoder = HotDecoder(torch.float16)
    term = Term(replace(small_guider(), decode=decoder))
    points, losses = run_prior(PriorObjective(gaussian_denoise, [term]), images(), PriorConfig(steps=3), [0] * B)
    assert points.isfinite().all() and decoder.types[-2:] == 2 * [torch.float32]


@pytest.mark.parametrize("compute", [None, torch.float32])
def test_full_precision_asks_once_and_scales_nothing(compute):
    net, x = Hot(IgnoreSigma(base_network(small_guider())), 1.0), images()
    guider = replace(small_guider(), net=net)
    result = RunState().energy_gradient(0, guider, x, level(0.5, x), compute)
    assert torch.equal(result.gradient, energy_gradient(small_guider(), x, level(0.5, x))[1]) and len(net.types) == 1
    assert result.gradient.shape == (B, 3, H, W)
