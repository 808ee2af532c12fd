"""A picture of guided faces: the same seeds in each row, refined by the models of finer details of the same authors."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core.viz.drawing import contact_sheet

from .face_world import load_face_world
from .faces import FaceBench, tables
from .methods import METHODS, Batch
from .real import real_networks
from .report import Report
from .report import Row as Result
from .training import Workspace

SEEDS = range(8)  # not chosen: the first ones


class Shown(NamedTuple):
    """A row of the picture: a row of a table, under a name."""

    name: str
    aim: str
    row: str


SHOWN = (
    Shown("unguided", "happy", "unguided"),
    Shown("happy, plain guider", "happy", "plain guider, through the model"),
    Shown("happy, five experts", "happy", "five experts where needed, through the model"),
    Shown("surprised, five experts", "surprised", "five experts where needed, through the model"),
    Shown("sad, five experts", "sad", "five experts where needed, through the model"),
)


def face_sheet(bench: FaceBench, results: Sequence[Result], folder: Path, report: Report) -> Tensor:
    """The rows of SHOWN that there are results of, each at its best setting, as a picture (1, 3, H, W) in [-1, 1]."""
    settings = {(result["aim"], result["row"]): result["setting"] for result in results}
    shown = [each for each in SHOWN if (each.aim, each.row) in settings]
    return contact_sheet({each.name: refined(_faces(bench, each, settings[each.aim, each.row], folder, report))
                          for each in shown}, scale=1)


def _faces(bench: FaceBench, shown: Shown, setting: dict[str, float], folder: Path, report: Report) -> Tensor:
    [table] = [table for table in tables(bench) if table.title == shown.aim]
    world, row = load_face_world(table.task), table.by_name[shown.row]
    noise, sigmas = world.start(SEEDS, table.steps)
    wanted = world.wanted(SEEDS, world.guider.labels.index(shown.aim))
    report(f"picture: {shown.name}")
    return METHODS[row.method](row, Workspace(world, folder, table.steps, report)).sample(
        Batch(wanted, SEEDS, noise, sigmas), setting)


@torch.no_grad()
def refined(faces: Tensor) -> Tensor:
    """Faces (B, 1, 40, 40) with finer details, (B, 3, 160, 160) in [-1, 1]."""
    real = real_networks()
    return real.refine_faces(real.exposed(faces), SEEDS).expand(-1, 3, -1, -1)
