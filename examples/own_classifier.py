"""A classifier of your own as a folder that Load Guider reads: transformers' ResNet, trained on pictures with labels.

    python -m examples.own_classifier FOLDER

Here the pictures are scenes of the tiny world, and the label is the colour of the thing, whatever is behind it. With
pictures of your own, `labelled` is all that changes. `ppap_core/tinyworld/guiders/tinyworld-colours` was made so, in a
minute on one core.
"""
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from ppap_core.tinyworld.scenes import draw

SIDE = 64  # pixels
COLORS = ("red", "yellow", "green", "turquoise", "blue", "pink")
TRAINING, STEPS, BATCH, LEARNING_RATE = range(1_000_000, 1_006_000), 1500, 64, 3e-3
VALIDATION = range(2_000_000, 2_001_000)


def labelled(seeds: range) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, SIDE, SIDE) in [-1, 1] and labels (B,): the nearest of six hues to the mean colour of the thing."""
    scenes = draw(seeds, SIDE)
    thing = (scenes.segmentation > 0)[:, None]
    red, green, blue = ((scenes.image * thing).sum((2, 3)) / thing.sum((2, 3))).unbind(1)
    hue = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)
    return scenes.image, (hue / torch.pi * len(COLORS) / 2).round().long() % len(COLORS)


def new_network() -> ResNetForImageClassification:
    """A small network that knows the names of its classes; a large one from the hub is made alike, by `from_pretrained`."""
    return ResNetForImageClassification(ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        id2label=dict(enumerate(COLORS)), label2id={name: index for index, name in enumerate(COLORS)}))


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures as coarse as a preview of latents is, and a little noise on all: guidance shows such ones too."""
    coarse = F.interpolate(F.interpolate(images, scale_factor=0.25, mode="area"), size=images.shape[2:], mode="bilinear")
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, coarse, images) + 0.1 * torch.randn(images.shape, generator=generator)


def train(network: ResNetForImageClassification, images: Tensor, labels: Tensor, report: Callable[[str], None]) -> None:
    """Fit a network to pictures and their labels."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(blurred(images[index], generator)).logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            report(f"step {step}: {loss.item():.3f}")


def accuracy(network: ResNetForImageClassification, images: Tensor, labels: Tensor) -> float:
    """The share of pictures whose label is the network's first choice."""
    with torch.no_grad():
        return (network.eval()(images).logits.argmax(1) == labels).float().mean().item()


def save(network: ResNetForImageClassification, folder: Path) -> None:
    """Write the three files of the folder: config.json, model.safetensors and preprocessor_config.json."""
    network.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def main() -> None:
    torch.manual_seed(0)
    network = new_network()
    train(network.train(), *labelled(TRAINING), report=print)
    print(f"{accuracy(network, *labelled(VALIDATION)):.1%} of {len(VALIDATION)} other pictures")
    save(network, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
