"""What flows along the wires of this pack."""
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..ppap_core.guidance import Reading
from ..ppap_core.guider import Guider
from ..ppap_core.samples import SampleStore
from ..ppap_core.view import LatentSpace


@dataclass(frozen=True)
class GuidanceTerm:
    """One guider's part in guidance, in the units of ComfyUI: it becomes a core `Term` once a model gives them a meaning."""

    guider: Guider
    weight: float
    start: float               # share of the sampling, as in ComfyUI's other nodes; not a share of the steps
    end: float
    factor_at_start: float     # of the weight
    factor_at_end: float
    mask: Any = None           # MASK (B|1, H, W) in [0, 1]
    balanced: bool = True      # whether the weight is a share of what is uncertain, or scales the gradient as it is
    through: bool = False      # whether the gradient in the prediction goes on through the model

    def __post_init__(self):
        if self.start > self.end:
            raise ValueError(f"steering would start at {self.start:g} and end at {self.end:g}: expected a start_percent "
                             "that is not above end_percent")


@dataclass(frozen=True)
class Samples:
    """Generated images and steps that led to them."""

    store: SampleStore
    space: LatentSpace | None = None  # the latents that were diffused; None for pixels


@dataclass(frozen=True)
class Report:
    """What guidance did in one run."""

    names: tuple[str, ...]     # of the terms
    readings: tuple[Reading, ...]
    levels: int                # of noise at which the model was asked


PPAPGuider = io.Custom("PPAP_GUIDER")    # ppap_core.guider.Guider
PPAPTerms = io.Custom("PPAP_TERMS")      # tuple[GuidanceTerm, ...]
PPAPSamples = io.Custom("PPAP_SAMPLES")  # Samples
PPAPReport = io.Custom("PPAP_REPORT")    # Report
PPAPLosses = io.Custom("PPAP_LOSSES")    # {"interval of noise": [loss of each step]}
