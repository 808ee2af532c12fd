"""The bundled priors over label maps and pictures of tours."""
from pathlib import Path

from ppap_core.tinyworld.loaders import LABELS, load_weights
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser

WEIGHTS = Path(__file__).parent / "weights"


def label_map_denoiser() -> TinyDenoiser:
    """A small denoiser of label maps, before its training."""
    return TinyDenoiser(width=32, blocks=2, channels=len(LABELS["segmentation"]))


def load_label_prior() -> TinyDenoiser:
    """The trained denoiser of label maps, (B, 9, 32, 32) as `labelmaps.as_points` writes them; it never saw an image."""
    return load_weights(label_map_denoiser(), "labelmaps", WEIGHTS)


def tour_denoiser() -> TinyDenoiser:
    """A small denoiser of pictures of tours, before its training."""
    return TinyDenoiser(width=32, blocks=2, channels=1)


def load_tour_prior() -> TinyDenoiser:
    """The trained denoiser of pictures of short tours, (B, 1, 64, 64) as `tours.picture` draws them."""
    return load_weights(tour_denoiser(), "tours", WEIGHTS)
