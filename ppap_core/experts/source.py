"""A sample store as the source of experts: the latents and the model of its images, and the noise that their steps cover."""
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise

from ..guiders.latents import LatentSpace
from ..io.files import DamagedFileError, load_tensors, save_tensors
from ..io.values import is_name, is_whole
from ..noise import PURE_NOISE
from ..schedules import ExpertSchedule
from .origin import Origin, read_origin
from .samples import SampleStore

FILE = "source.safetensors"  # in a store
MAX_SHUFFLE = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The model that made the images of a store, as far as experts have to know it."""

    space: LatentSpace | None = None  # of the model's latents; None for pixels
    origin: Origin | None = None      # the model, for people


def save_source(store: SampleStore, source: Source) -> None:
    """Keep a source beside the images, where none is kept yet; a folder that cannot be written is told in the log."""
    space, file = source.space, store.folder / FILE
    if file.exists():
        return
    header = {"space": space and space.name, "shuffle": space.shuffle if space else 1,
              "origin": source.origin and asdict(source.origin)}
    try:
        save_tensors(file, {"factors": space.factors, "bias": space.bias} if space else {}, header)
    except OSError as error:
        log.warning("%s Experts of these images cannot be distilled from the command line.", error)


def load_source(store: SampleStore) -> Source:
    """The source of a store. ValueError where the file is damaged, or missing beside images of latents."""
    file = store.folder / FILE
    if not file.exists():
        if store.shards.row("denoised").shape[1:] == store.shards.row("images").shape:
            return Source()
        raise ValueError(f"{store.folder.name} holds images of latents, and no {FILE} that tells which: generate these "
                         "samples once more with this version, which adds it and makes no image anew")
    tensors, header = load_tensors(file)
    name, shuffle = header.get("space"), header.get("shuffle")
    origin = read_origin(header.get("origin"))
    if name is None:
        return Source(None, origin)
    with suppress(KeyError):
        factors, bias = (tensors[part].clone() for part in ("factors", "bias"))  # else the file stays open
        if (is_name(name) and is_whole(shuffle, 1, MAX_SHUFFLE) and factors.shape[1:] == bias.shape == (3,)
                and factors.isfinite().all() and bias.isfinite().all()):
            return Source(LatentSpace(name, factors, bias, shuffle), origin)
    raise DamagedFileError(f"{file} does not describe latents: delete it, and generate these samples once more, which "
                           "makes no image anew.")


def schedule_for(store: SampleStore, experts: int, sigma_min: float = 0.0, sigma_max: float = 0.0,
                 edges: tuple[float, ...] = ()) -> ExpertSchedule:
    """Divide a range of noise among experts, each with an equal share of the steps that led to the images.

    sigma_min, sigma_max: VE noise levels; 0 takes the lowest, or the highest, of these steps. edges: noise levels between
    the experts, which take the place of equal shares and of their number; (): none. ValueError for an empty range, and for
    an expert without a step to learn from.
    """
    levels = [sigma for sigma in store.sigmas.unique().tolist() if 0 < sigma <= PURE_NOISE]
    lowest, highest = sigma_min or min(levels, default=0.0), sigma_max or max(levels, default=0.0)
    if not 0 < lowest < highest:
        raise ValueError(f"the experts would reach from sigma {lowest:.4g} to {highest:.4g}: expected a range that goes up; "
                         "generate samples with more steps, or set other values of sigma_min and sigma_max")
    if not edges:
        return ExpertSchedule.equal_shares(experts, lowest, highest, levels)
    for low, high in pairwise((lowest, *edges, highest)):
        if not any(low <= level < high or low < level == high == highest for level in levels):
            raise ValueError(f"no step of the samples lies between the edges {low:.4g} and {high:.4g}: expected edges from "
                             f"{lowest:.4g} to {highest:.4g}, with at least one of the {len(levels)} steps between two of "
                             "them; move or leave out an edge, or generate samples with more steps")
    return ExpertSchedule((lowest, *edges, highest))
