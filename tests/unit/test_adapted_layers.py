"""An adapter is a change of its layer's weight: what an expert learns beside the network is what it does once merged."""
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import disturb, level, randn
from helpers.guider_families import FAMILIES, aimed, photographs, random_weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from ppap_core.experts import adapters
from ppap_core.experts.adapters import LoraSpec, default_targets, left_out
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.guiders.guider import clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.transformers_outputs import ForwardNet
from ppap_core.schedules import ExpertSchedule

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

SCHEDULE = ExpertSchedule((0.1, 1.0, 10.0))
CLOSE = 1e-4  # of an adapter's effect


class StandardizedConv2d(nn.Conv2d):
    """A convolution that computes with another weight than it keeps, as those of BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class SamePaddedConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        lost = [(-side % stride) + kernel - stride for side, stride, kernel in zip(
            x.shape[-2:], self.stride, self.kernel_size, strict=True)]
        return super().forward(F.pad(x, [lost[1] // 2, lost[1] - lost[1] // 2, lost[0] // 2, lost[0] - lost[0] // 2]))


class ScaledLinear(nn.Linear):
    """A linear layer that multiplies what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class ForeignLinear(nn.Module):
    """A linear layer of another library, which shares no class with torch's."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 8
        self.weight, self.bias = nn.Parameter(torch.empty(8, 6)), nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Transposed(nn.Module):
    """A linear layer that keeps its matrix the other way round, as transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 8))


class ReadLinear(nn.Module):
    """A layer that is never called, only its weight is read, as that of BEiT, EVA and Swin 2."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class ListedLinear(nn.Module):
    """Layers that are called by a list which is no module, as those of Mask2Former."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 8), nn.ReLU()]
        for number, layer in enumerate(self.layers):
            self.add_module(str(number), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OtherArguments(nn.Conv2d):
    """A convolution whose class takes other arguments than torch's."""

    def __init__(self, width: int, multiplier: int):
        super().__init__(width, multiplier * width, 3)


class Between(nn.Module):
    """A layer between two others, of which the last is a head."""

    def __init__(self, layer: nn.Module, flat: bool):
        super().__init__()
        self.first, self.layer, self.head, self.flat = nn.Conv2d(3, 6, 1), layer, nn.Conv2d(8, 4, 1), flat

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        x = self.layer(x.movedim(1, -1)).movedim(-1, 1) if self.flat else self.layer(x)
        return self.head(torch.relu(x))


TAKEN = {
    "plain": nn.Conv2d(6, 8, 3, padding=1), "point": nn.Conv2d(6, 8, 1), "even": nn.Conv2d(6, 8, 4, 2, 1),
    "wide": nn.Conv2d(6, 8, (1, 5), (2, 1), (0, 2)), "no bias": nn.Conv2d(6, 8, 3, bias=False),
    "dilated": nn.Conv2d(6, 8, 3, dilation=2), "dilated one way": nn.Conv2d(6, 8, (3, 2), padding=1, dilation=(1, 3)),
    "dilated with stride": nn.Conv2d(6, 8, 3, 2, 2, 2), "same": nn.Conv2d(6, 8, 3, padding="same"),
    "same, even": nn.Conv2d(6, 8, 4, padding="same"), "same, dilated": nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    "valid": nn.Conv2d(6, 8, 3, padding="valid", dilation=2),
    "reflect": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 8, 5, 2, 2, padding_mode="circular"),
    "replicate": nn.Conv2d(6, 8, 3, padding=(2, 1), dilation=2, padding_mode="replicate"),
    "same, reflect": nn.Conv2d(6, 8, 4, padding="same", padding_mode="reflect"),
    "standardised": StandardizedConv2d(6, 8, 3, padding=1), "TensorFlow's": SamePaddedConv2d(6, 8, 3, 2, dilation=1),
    "linear": nn.Linear(6, 8), "linear without bias": nn.Linear(6, 8, bias=False), "scaled": ScaledLinear(6, 8),
    "read": ReadLinear(), "listed": ListedLinear(), "of another library": ForeignLinear()}
NOT_TAKEN = {
    "grouped": nn.Conv2d(6, 8, 3, groups=2), "transposed": nn.ConvTranspose2d(6, 8, 2),
    "weight norm": parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), "weight norm by a hook": weight_norm(nn.Linear(6, 8)),
    "spectral norm": parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)),
    "spectral norm by a hook": spectral_norm(nn.Conv2d(6, 8, 3)), "other arguments": OtherArguments(6, 2),
    "the other way round": Transposed()}


def between(layer: nn.Module) -> nn.Module:
    flat = isinstance(layer, (nn.Linear, ReadLinear, ListedLinear, ForeignLinear))
    return random_weights(Between(layer, flat)).requires_grad_(False)


def trained(base: nn.Module) -> ExpertBank:
    """A bank as if each of its experts was trained."""
    bank = ExpertBank(base, SCHEDULE, LoraSpec(rank=2))
    for index in range(2):
        disturb(bank, index, seed=index)
    return bank


def answers(bank: ExpertBank, image: Tensor) -> Tensor:
    with torch.no_grad():
        found = [bank(image, level(sigma, image)) for sigma in (0.3, 3.0)]
    return torch.stack([part if isinstance(part, Tensor) else part[-1] for part in found])


def gap(base: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest difference between merged experts and experts beside the weights, relative to their effect."""
    merged = trained(base)
    monkeypatch.setattr(adapters, "SPARE_SHARE", 0.0)
    monkeypatch.setattr(adapters, "SPARE_BYTES", 0)
    beside = trained(base)
    assert merged.adapted.merged and not beside.adapted.merged
    with torch.no_grad():
        plain = base(image)
    effect = answers(merged, image) - plain
    assert effect.abs().max() > 0
    return float((answers(beside, image) - plain - effect).abs().max() / effect.abs().max())


def test_an_adapted_layer_shows_its_settings_and_no_marks():
    """A network reads its stride; what others put on the layer within, and delete again, is theirs."""
    base = between(TAKEN["even"])
    base.layer.marked_by_others = True
    layer = trained(base).net.layer
    assert layer.stride == (2, 2) and layer.padding == (1, 1)
    assert layer.base_layer.marked_by_others and not hasattr(layer, "marked_by_others")


@pytest.mark.parametrize("name", TAKEN)
def test_merged_equals_beside_for_each_kind_of_layer(name: str, monkeypatch: pytest.MonkeyPatch):
    base = between(TAKEN[name])
    assert any(target.startswith("layer") for target in default_targets(base))
    assert gap(base, randn(2, 3, 13, 18), monkeypatch) < CLOSE


@pytest.mark.parametrize("name", TAKEN)
def test_each_kind_of_layer_learns_what_it_does_when_merged(name: str):
    """The gradient of a trained expert is that of the network with its weights changed."""
    base, image = between(TAKEN[name]), randn(2, 3, 13, 18)
    bank = trained(base)
    merged = answers(bank, image)[1]
    with bank.trainable(1) as parameters:
        output = bank(image, level(3.0, image))
        output.square().sum().backward()
    torch.testing.assert_close(output.detach(), merged, rtol=1e-4, atol=1e-4 * float(merged.abs().max()))
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_layer_that_takes_no_adapter_is_left_out(name: str):
    base = between(NOT_TAKEN[name].eval())
    targets = default_targets(nn.Sequential(base, nn.Linear(4, 4)))
    assert targets == ("0.first", "0.head")
    assert left_out(nn.Sequential(base, nn.Linear(4, 4))) == ("0.layer",)


def test_a_bank_says_which_layers_it_leaves_out():
    bank = ExpertBank(between(nn.Conv2d(6, 8, 3, groups=2)), SCHEDULE, LoraSpec(rank=2))
    assert bank.left_out == ("layer",) and bank.describe_left_out().startswith("1 of 2 layers take no adapter")
    assert bank.describe_left_out().endswith(": layer")
    assert ExpertBank(between(nn.Conv2d(6, 8, 3)), SCHEDULE, LoraSpec(rank=2)).describe_left_out() == ""


def timm_network(name: str, **settings: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, num_classes=5, **settings)


def timm_class(file: str, name: str, **settings: object) -> Any:
    return getattr(pytest.importorskip(f"timm.models.{file}"), name)(**settings)


def transformers_network(head: str, kind: str, **settings: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, head)(getattr(transformers, kind)(**settings))
    return ForwardNet(model, lambda model, image: model(image)[0])


BIT = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_groups": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NETWORKS = {
    "timm BiT": lambda: timm_class("resnetv2", "ResNetV2", layers=[1] * 4, channels=(128,) * 4, num_classes=5),
    "timm NFNet": lambda: timm_class("nfnet", "NormFreeNet", cfg=timm_class(
        "nfnet", "NfCfg", depths=(1,) * 4, channels=(16, 24, 24, 32), group_size=8, attn_layer="se", attn_kwargs={},
        stem_type="3x3")),
    "timm SKNet": lambda: timm_network("skresnet18", output_stride=8),
    "timm dilated ResNet": lambda: timm_network("resnet10t", output_stride=8),
    "timm MobileViT": lambda: timm_network("mobilevit_xxs"),
    "timm EfficientNet": lambda: timm_network("tf_efficientnet_lite0"),
    "timm ConvNeXt": lambda: timm_network("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "timm BEiT": lambda: timm_network("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=2, img_size=64),
    "timm EVA": lambda: timm_network("eva02_tiny_patch14_224", depth=2, img_size=64, patch_size=8),
    "timm Swin 2": lambda: timm_network("swinv2_tiny_window8_256", img_size=64, window_size=2, embed_dim=24,
                                        depths=(1, 1, 1, 1)),
    "BiT": lambda: transformers_network("BitForImageClassification", "BitConfig", **BIT),
    "BiT, padded as TensorFlow does": lambda: transformers_network(
        "BitForImageClassification", "BitConfig", **BIT, layer_type="preactivation", global_padding="SAME"),
    "hybrid DPT": lambda: transformers_network(
        "DPTForDepthEstimation", "DPTConfig", is_hybrid=True, **VIT, image_size=64, patch_size=16,
        neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=8, backbone_out_indices=[0, 1, 0, 1], readout_type="project",
        backbone_featmap_shape=[1, 16, 4, 4], neck_ignore_stages=[0, 1],
        backbone_config={"model_type": "bit", **BIT, "layer_type": "bottleneck",
                         "out_features": ["stage1", "stage2", "stage3"], "global_padding": "same",
                         "embedding_dynamic_padding": True}),
    "MobileViT segmentation": lambda: transformers_network(
        "MobileViTForSemanticSegmentation", "MobileViTConfig", hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 8, 8, 8, 8, 16, 16], num_attention_heads=2, aspp_out_channels=8, image_size=64),
    "DeepLab on MobileNet": lambda: transformers_network("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config",
                                                         depth_multiplier=0.25, image_size=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_equals_beside_for_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every kind of network that docs/guiders.md lists, as its guider asks it."""
    FAMILIES[name].write(tmp_path / "net")
    guider = aimed(load_guider(tmp_path / "net", FAMILIES[name].output), FAMILIES[name])
    image = photographs()
    plain = guider.predict(image, clean(image))
    found = []
    for spare in (adapters.SPARE_BYTES, -1):
        monkeypatch.setattr(adapters, "SPARE_BYTES", spare)
        monkeypatch.setattr(adapters, "SPARE_SHARE", 0.0)
        bank = trained(base_network(guider))
        found.append(with_experts(guider, bank).predict(image, level(0.3, image)) - plain)
        assert bool(bank.adapted.merged) == (spare > 0)
    assert found[0].abs().max() > 0
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[0].abs().max()  # softmaxes and logarithms follow


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_equals_beside_for_whole_networks(name: str, monkeypatch: pytest.MonkeyPatch):
    base = random_weights(NETWORKS[name]()).requires_grad_(False)
    assert gap(base, randn(2, 3, 64, 64), monkeypatch) < CLOSE
