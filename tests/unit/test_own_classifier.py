"""The example that makes a folder for Load Guider, and the folder that it made."""
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from examples.own_classifier import COLORS, SIDE, labelled, new_network, save  # noqa: E402
from ppap_core.guiders.guider import clean  # noqa: E402
from ppap_core.guiders.loaders import load_guider  # noqa: E402
from ppap_core.tinyworld.loaders import GUIDERS  # noqa: E402


def test_the_bundled_folder_knows_colours_of_unseen_things():
    images, labels = labelled(range(3_000_000, 3_000_200))
    guider = load_guider(GUIDERS / "tinyworld-colours")
    found = guider.predict(images, clean(images)).argmax(1)
    assert guider.labels == COLORS and labels.bincount(minlength=len(COLORS)).min() > 10
    assert (found == labels).float().mean() > 0.95


def test_a_folder_that_the_example_saves_is_its_network(tmp_path: Path):
    network, images = new_network().eval(), torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    save(network, tmp_path)
    guider = load_guider(tmp_path)
    torch.testing.assert_close(guider.predict(images, clean(images)), network(images).logits)
    assert guider.task == "class" and guider.labels == COLORS
