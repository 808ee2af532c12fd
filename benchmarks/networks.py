"""The networks that only the benchmarks need: judges that never guide, and the conditional denoiser."""
from pathlib import Path

from ppap_core.guiders.guider import Guider
from ppap_core.tinyworld.loaders import CONDITIONS, load_weights, tiny_guider
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser

from .judges import TinyTransformer, tiny_convnext

WEIGHTS = Path(__file__).parent / "weights"


def load_conditional_denoiser() -> TinyDenoiser:
    """Its sibling that is told the class, as `condition` writes it; told zeros, no class, it is unconditional."""
    return load_weights(TinyDenoiser(conditions=CONDITIONS), "conditional_denoiser", WEIGHTS)


def load_conditional_sibling() -> TinyDenoiser:
    """A bad version of the conditional denoiser: half as wide, with a sixteenth of the training."""
    return load_weights(TinyDenoiser(width=32, conditions=CONDITIONS), "conditional_sibling", WEIGHTS)


def load_judge(task: str) -> Guider:
    """A network of another architecture and another seed, which never guides."""
    return tiny_guider(tiny_convnext, "judge", task, WEIGHTS)


def load_held_out_judge(task: str) -> Guider:
    """A judge of a third architecture, which never guides and by which nothing is chosen."""
    return tiny_guider(TinyTransformer, "second_judge", task, WEIGHTS)
