"""The denoisers of label maps and of pictures of tours, and their bundled weights."""
from pathlib import Path

from ppap_core.tinyworld.loaders import LABELS, load_weights
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser

WEIGHTS = Path(__file__).parent / "weights"


def label_map_denoiser() -> TinyDenoiser:
    """An untrained small denoiser of label maps."""
    return TinyDenoiser(width=32, blocks=2, channels=len(LABELS["segmentation"]))


def load_label_prior() -> TinyDenoiser:
    """The trained denoiser of label maps, (B, 9, 32, 32) as `label_maps.to_points` makes them; it never saw an image."""
    return load_weights(label_map_denoiser(), "labelmaps", WEIGHTS)


def tour_denoiser() -> TinyDenoiser:
    """An untrained small denoiser of pictures of tours."""
    return TinyDenoiser(width=32, blocks=2, channels=1)


def load_tour_prior() -> TinyDenoiser:
    """The trained denoiser of pictures of short tours, (B, 1, 64, 64) as `tours.picture` draws them."""
    return load_weights(tour_denoiser(), "tours", WEIGHTS)
