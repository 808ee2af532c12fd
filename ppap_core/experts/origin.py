"""The model that experts were distilled on: kept in their file for people, and compared with the model that they guide."""
import re
from dataclasses import asdict, dataclass
from typing import Any

from ..guiders.guider import Guider
from ..guiders.latents import PIXELS
from ..io.values import is_number, is_whole
from .bank import ExpertBank

KEY = "origin"  # of the training info of a bank
MAX_SHOWN = 80  # characters of a name from a file


@dataclass(frozen=True)
class Origin:
    """A diffusion model, as a file of experts names it."""

    model: str             # its kind, such as "SDXL"
    file: str = ""         # name of its weights' file, without folders; "" if that is not known
    sigma_data: float = 1.0  # standard deviation of what it diffuses
    sigma_min: float = 0.0   # noise levels that it knows (VE sigma)
    sigma_max: float = 0.0

    @property
    def name(self) -> str:
        """Kind and file, for people."""
        return f"{self.model} ({self.file})" if self.file else self.model

    def differs_from(self, other: "Origin") -> bool:
        """Whether this is known to be another model: of another kind, or from a file of another name."""
        return self.model != other.model or bool(self.file and other.file and self.file != other.file)


def remember_origin(bank: ExpertBank, origin: Origin) -> None:
    """Keep in a bank, and so in its file, on which model it was distilled."""
    bank.training_info = {**bank.training_info, KEY: asdict(origin)}


def origin_of(bank: ExpertBank) -> Origin | None:
    """The model that a bank was distilled on; None where its file does not say, as those of earlier versions."""
    return read_origin(bank.training_info.get(KEY))


def read_origin(said: Any) -> Origin | None:
    """The model in the words of a file; None for anything else."""
    if not isinstance(said, dict) or not isinstance(said.get("model"), str):
        return None
    return Origin(_shown(said["model"]), _shown(said.get("file", "")), *(
        _number(said.get(key)) for key in ("sigma_data", "sigma_min", "sigma_max")))


def describe_origin(bank: ExpertBank) -> str:
    """Sentences on which models a bank can guide, and on what it was distilled."""
    origin, info = origin_of(bank), bank.training_info
    kind = "pixels" if bank.space_name == PIXELS else f"{_shown(bank.space_name)} latents"
    known = f"Distilled on {origin.name}" if origin else "Distilled on a model that the file does not name"
    samples = info["samples"] if isinstance(info.get("samples"), dict) else {}
    counts = [f"{count} {unit}" for count, unit in ((info.get("images"), "images"), (samples.get("steps"), "sampling steps"))
              if is_whole(count, 0, 1e12)]
    edges = bank.schedule.edges
    return (f"These experts guide every model of {kind}. "
            f"{', '.join([known, *counts])}, sigma {edges[0]:.3g} to {edges[-1]:.3g}.")


def describe_transfer(bank: ExpertBank, model: Origin) -> str:
    """A remark where a bank guides another model than the one that it was distilled on; "" where it does not, or may not."""
    origin = origin_of(bank)
    return f"experts distilled on {origin.name} guide {model.name}" if origin and origin.differs_from(model) else ""


def shared_name(guider: Guider) -> str:
    """Name for a file of experts among people, <guider>--<space>. ValueError for a guider without experts."""
    if not isinstance(guider.net, ExpertBank):
        raise ValueError(f"{guider.name} has no experts: expected a guider with a bank")
    return "--".join(re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII).strip(".-_") or "experts"
                     for part in (guider.name, guider.net.space_name))


def _shown(text: object) -> str:
    return " ".join(str(text).split())[:MAX_SHOWN]


def _number(value: object) -> float:
    return float(value) if is_number(value) else 0.0
