"""What the guiders of a sampling see, beside ComfyUI's own preview of it."""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ...ppap_core.guidance.gradients import slice_guider
from ...ppap_core.guidance.terms import Term, TermRecord
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.visualize import draw_output
from ...ppap_core.guiders.watched import seen_by, watched
from ...ppap_core.viz.drawing import captioned_tiles, note_picture, to_pillow
from .progress import SamplerPreview, previews_changed
from .terms import schedule_of

PAUSE = 0.25          # seconds between two pictures, at least
SIDES = 256, 512      # least and greatest height of a picture, in pixels; captions of less could not be read
Callback = Callable[[int, Tensor, Tensor, int], None]
"""Of a sampler, as ComfyUI calls it: (step, denoised, noisy, number of steps)"""


@dataclass
class Sight:
    """What the guiders of one sampling saw at its last noise level."""

    terms: Sequence[Term]            # of the sampling; those of weight 0 are not shown
    records: Sequence[TermRecord]    # of the sampling, which grow with it
    watching: Sequence[Guider] = ()  # with networks that remember
    sigma: float = 0.0

    def watch(self, terms: Sequence[Term], sigma: float) -> list[Term]:
        """Return the terms at a noise level, with networks that compute the same and remember what they say."""
        terms = [replace(term, guider=watched(term.guider)) for term in terms]
        self.watching, self.sigma = [term.guider for term in terms], sigma
        return terms

    def pictures(self) -> Iterator[tuple[str, Image]]:
        """Draw what each guider saw of the first image, with a caption."""
        energies = {record.term: record.energy for record in self.records if record.sigma == self.sigma}
        for index, term in enumerate(self.terms):
            if term.weight:
                said, picture = "", note_picture(["not at work in this step"])
                if index in energies:
                    said = f"energy {float(energies[index][0]):.3g}{self._expert(term.guider)}"
                    picture = _draw(term.guider, seen_by(self.watching[index]), energies[index])
                yield f"{term.guider.name}\n{said}", to_pillow(picture[0])

    def _expert(self, guider: Guider) -> str:
        schedule = schedule_of(guider)
        return f", expert {schedule.index(self.sigma) + 1} of {len(schedule)}" if schedule else ""


def _draw(guider: Guider, seen: tuple[Tensor, Tensor], energy: Tensor) -> Tensor:
    image, output = (tensor.float() for tensor in seen)
    if not bool(output.isfinite().all()):
        return note_picture(["its output is not finite"])
    return draw_output(slice_guider(guider, slice(0, 1), len(energy)), image, output, lambda: energy[:1])


class LivePreview:
    """A sampler's callback whose preview is followed by what guiders see, a few times in a second and at the last step."""

    def __init__(self, callback: Callback, sights: Sequence[Sight]):
        self.callback, self.sights = callback, sights
        self.drawn, self.step, self.total = 0.0, 0, 1

    def __call__(self, step: int, denoised: Tensor, noisy: Tensor, total: int) -> None:
        self.step, self.total = step + 1, total
        with previews_changed(self.extend):
            self.callback(step, denoised, noisy, total)

    def extend(self, preview: SamplerPreview) -> SamplerPreview | None:
        """Return a preview with what the guiders see beside it, or None if the last one was just drawn."""
        if time.monotonic() - self.drawn < PAUSE and self.step < self.total:
            return None
        file_format, image, _ = preview
        pictures = [(f"step {self.step} of {self.total}", image)]
        pictures += [picture for sight in self.sights for picture in sight.pictures()]
        tiles = captioned_tiles(pictures, min(max(image.height, SIDES[0]), SIDES[1]))
        self.drawn = time.monotonic()
        return file_format, tiles, max(tiles.size)


def with_live_preview(callback: Any, feature: Any, guidance: Sequence[Any]) -> Any:
    """Return a sampler's callback that also shows what guiders see, if a feature is the first to do so of all guidance.

    callback: None, of a sampling that nobody watches, stays None. guidance: every guidance of the MODEL that is sampled.
    """
    shown = [other for other in guidance if other.live_preview]
    if callback is None or shown[:1] != [feature]:
        return callback
    return LivePreview(callback, [other.runs.current.sight for other in shown])
