"""Networks that only the benchmarks need: judges that never guide, and the conditional denoisers."""
from pathlib import Path

from ppap_core import Guider
from ppap_core.tinyworld.loaders import CONDITIONS, load_weights, tiny_guider
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser

from .judges import TinyTransformer, tiny_convnext

WEIGHTS = Path(__file__).parent / "weights"


def load_conditional_denoiser() -> TinyDenoiser:
    """The denoiser conditioned on the class, as `condition` encodes it; on zeros it is unconditional."""
    return load_weights(TinyDenoiser(conditions=CONDITIONS), "conditional_denoiser", WEIGHTS)


def load_conditional_sibling() -> TinyDenoiser:
    """A bad conditional denoiser: half as wide, with a sixteenth of the training."""
    return load_weights(TinyDenoiser(width=32, conditions=CONDITIONS), "conditional_sibling", WEIGHTS)


def load_judge(task: str) -> Guider:
    """The judge of a task: of another architecture and another seed than the guider."""
    return tiny_guider(tiny_convnext, "judge", task, WEIGHTS)


def load_held_out_judge(task: str) -> Guider:
    """The held-out judge of a task: of a third architecture; nothing is chosen by it."""
    return tiny_guider(TinyTransformer, "second_judge", task, WEIGHTS)
