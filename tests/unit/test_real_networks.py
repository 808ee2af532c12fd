"""Real pretrained networks on real photographs: they see, they have gradients, they learn, and they steer a real model."""
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import level, randn
from helpers.real import NETWORKS, face, guider_folder, guider_of, imagenet_folder, networks, photograph
from torch import Tensor
from torch.nn import functional as F

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.guidance.gradients import HALF, energy_gradient
from ppap_core.guidance.memory import gradient_bytes
from ppap_core.guidance.shift import GuidanceSettings, guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.rules import rule_guider
from ppap_core.guiders.targets import class_target, image_target, mask_target
from ppap_core.guiders.visualize import visualize
from ppap_core.schedules import ExpertSchedule

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Guider:
    """EfficientNet-Lite0, through Load Guider's own path."""
    return load_guider(imagenet_folder(tmp_path_factory.mktemp("lite0")))


def seen(name: str, imagenet: Guider) -> tuple[Guider, Tensor]:
    """A real guider that is aimed at what it sees in another picture, and an image (1, 3, 64, 64) for it."""
    guider = imagenet if name == "imagenet" else style() if name == "style" else guider_of(name)
    small = F.interpolate(face(), (64, 64), mode="bilinear", antialias=True)
    return guider.aim(image_target(guider, small.flip(-1).roll(9, -2))), small


def style() -> Guider:
    return load_guider(guider_folder("hed_vgg16"), "style")


ALL = (*NETWORKS, "imagenet", "style")


@pytest.mark.parametrize("name, animal", [("chelsea", "cat"), ("coffee", "espresso")])
def test_a_photograph_is_recognised(imagenet: Guider, name: str, animal: str):
    picture = photograph(name)
    best = imagenet.predict(picture, clean(picture))[0].topk(5).indices
    assert any(animal in imagenet.labels[index] for index in best)


@pytest.mark.slow
@pytest.mark.parametrize("name, best", [("tf_efficientnet_lite0", (0.74, 0.95)), ("tf_efficientnet_lite1", (0.745, 0.942))])
def test_the_accuracy_is_that_of_the_network(name: str, best: tuple[float, float]):
    """The accuracy of timm's own preprocessing on 400 photographs of ten classes, as measured beside the weights."""
    guider = load_guider(guider_folder(name))
    pictures, classes = networks().imagenette(each=20)
    logits = torch.cat([guider.predict(part, clean(part)) for part in pictures.split(20)])
    right = logits.topk(5).indices == classes[:, None]
    top_1, top_5 = right[:, 0].float().mean(), right.any(1).float().mean()
    assert top_1 > best[0] - 0.04 and top_5 > best[1] - 0.02  # two standard errors of 200 photographs


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_that_of_finite_differences(name: str, imagenet: Guider):
    guider, small = seen(name, imagenet)
    guider = replace(guider, net=copy.deepcopy(guider.net).double())
    x, sigma = small.double(), clean(small).double()
    _, gradient = energy_gradient(guider, x, sigma)
    away = randn(*x.shape, seed=2, dtype=torch.float64)
    step = 1e-8  # a longer one passes kinks of the rectifiers
    change = (guider.energy(x + step * away, sigma) - guider.energy(x - step * away, sigma)) / (2 * step)
    assert gradient.abs().max() > 0
    torch.testing.assert_close((gradient * away).sum()[None], change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name != "style"])  # which takes a CPU too long
def test_half_precision_points_the_same_way(name: str, imagenet: Guider):
    guider, small = seen(name, imagenet)
    exact = energy_gradient(guider, small, clean(small))[1]
    for compute in HALF:
        rough = energy_gradient(guider, small, clean(small), compute)[1]
        assert F.cosine_similarity(rough.flatten(), exact.flatten(), 0) > 0.6


BANKS = ("expression", "identity", "person", "cifar10", "imagenet", "style")


def bank_of(guider: Guider) -> ExpertBank:
    """Two experts that have moved far from the network."""
    bank = ExpertBank(base_network(guider), ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(4, 4.0), view="denoised")
    for index in range(2):
        bank.load(index, {name: weight + 0.02 * randn(*weight.shape, seed=100 * index + place)
                          for place, (name, weight) in enumerate(bank.weights(index).items())})
    return bank


@pytest.mark.parametrize("name", BANKS)
def test_experts_merged_equal_experts_beside(name: str, imagenet: Guider):
    guider, small = seen(name, imagenet)
    bank = bank_of(guider)
    for sigma in (0.5, 3.0):
        merged = with_experts(guider, bank).predict(small, level(sigma, small))
        with bank.trainable(bank.schedule.index(sigma)):
            beside = with_experts(guider, bank).predict(small, level(sigma, small)).detach()
        effect = (beside - guider.predict(small, clean(small))).abs().max()
        assert effect > 0 and (merged - beside).abs().max() < 1e-3 * effect


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_of_a_real_network_comes_back(name: str, imagenet: Guider, tmp_path: Path):
    guider, small = seen(name, imagenet)
    bank = bank_of(guider)
    save_bank(tmp_path / "bank.safetensors", bank, guider)
    again = load_bank(tmp_path / "bank.safetensors", guider)
    for sigma in (0.5, 3.0):
        assert torch.equal(bank(guider.preprocess(small), level(sigma, small)),
                           again(guider.preprocess(small), level(sigma, small)))


@pytest.mark.parametrize("name", ALL)
def test_memory_of_a_real_network_is_foreseen(name: str, imagenet: Guider):
    guider, small = seen(name, imagenet)
    point, kept = small.clone().requires_grad_(), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*guider.net.parameters(), *guider.net.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        guider.energy(point, clean(small))
    really = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    assert gradient_bytes(guider, tuple(small.shape)) == pytest.approx(really, rel=0.05)


def test_the_mask_of_a_person_is_seen_and_aimed_at():
    guider, picture = guider_of("person"), photograph("astronaut")
    assert 0.45 < (guider.predict(picture, clean(picture)) > 0).float().mean() < 0.65
    mask = torch.zeros(1, *picture.shape[-2:])
    mask[:, :, :256] = 1
    aimed = guider.aim(mask_target(guider, mask, ""))
    assert closer(aimed, picture)


def test_the_palette_of_a_photograph_is_aimed_at():
    rule = rule_guider("colours")
    assert closer(rule.aim(image_target(rule, photograph("coffee"))), photograph("astronaut"))


def test_the_style_of_a_photograph_is_aimed_at():
    guider = style()
    assert closer(guider.aim(image_target(guider, photograph("coffee"))), face())


def closer(guider: Guider, picture: Tensor) -> bool:
    """Whether a step along the gradient, a hundredth of the range of colours, brings a picture nearer to the target."""
    energy, gradient = energy_gradient(guider, picture, clean(picture))
    moved = picture - 0.01 * gradient / gradient.square().mean().sqrt()
    return bool(guider.energy(moved, clean(picture)) < 0.98 * energy)


@pytest.mark.parametrize("name", ["expression", "person", "imagenet"])
def test_an_answer_of_a_real_network_can_be_looked_at(name: str, imagenet: Guider):
    guider = imagenet if name == "imagenet" else guider_of(name)
    picture = visualize(guider, face())
    assert picture.shape[:2] == (1, 3) and picture.isfinite().all() and picture.std() > 0.01


@pytest.mark.slow
def test_real_faces_smile_for_another_network():
    """Faces of a real diffusion model, guided by one author's network and judged by another's."""
    real = networks()
    faces, judge = real.faces(), guider_of("emotion")
    guide = replace(guider_of("expression"), decode=lambda x, sigma: real.face_view(x))
    term = Term(guide.aim(class_target(guide, "happy")), weight=0.2, normalized=True)

    def happy(denoise) -> float:
        images = real.sample(lambda x, sigma: denoise(x, level(sigma, x)), seeds=range(10), steps=25)
        logits = judge.predict(real.face_view(images), clean(images))
        return float(logits.softmax(1)[:, judge.labels.index("happy")].mean())

    assert happy(guided(faces, [term], GuidanceSettings(0.5))) > happy(faces) + 0.1
