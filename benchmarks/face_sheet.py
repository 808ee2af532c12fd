"""A picture of guided faces: the same seeds in each row, refined by the models of finer details of the same authors."""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppap_core import Denoiser, Guider, guided, sample_renewing
from ppap_core.viz.drawing import contact_sheet

from .face_world import STEPS as TABLE_STEPS
from .face_world import FaceWorld, load_face_world
from .faces import FALLING, FaceBench
from .guided import term
from .real import real_networks
from .report import Report
from .training import Workspace

SEEDS = range(8)  # not chosen: the first ones
STEPS, RENEWAL = 40, 0.3  # renewed noise, as ancestral samplers have, mends what went wrong before
SETTING: dict[str, Any] = {"weight": 0.35, "through": True, **FALLING}


def face_sheet(bench: FaceBench, folder: Path, report: Report) -> Tensor:
    """Faces of the first seeds, unguided and asked to smile, as a picture (1, 3, H, W) in [-1, 1].

    folder: keeps the experts of the bench, which are trained where there are none.
    """
    world = load_face_world("expression")
    experts = bench.denoised.make(Workspace(world, folder, TABLE_STEPS, report)).guider
    rows = {"unguided": world.denoise, "happy, plain network": smiling(world, world.guider),
            "happy, five experts": smiling(world, experts)}
    return contact_sheet({name: refined(_faces(world, denoise)) for name, denoise in rows.items()}, scale=1)


def smiling(world: FaceWorld, guider: Guider) -> Denoiser:
    """The world's denoiser, guided towards smiles."""
    wanted = world.wanted(SEEDS, world.guider.labels.index("happy"))
    return guided(world.denoise, [term(world.aimed(guider, wanted), **SETTING)])


def _faces(world: FaceWorld, denoise: Denoiser) -> Tensor:
    noise, sigmas = world.start(SEEDS, STEPS)
    return sample_renewing(denoise, noise, sigmas, RENEWAL, SEEDS)


@torch.no_grad()
def refined(faces: Tensor) -> Tensor:
    """Faces (B, 1, 40, 40) with finer details, (B, 3, 160, 160) in [-1, 1]."""
    real = real_networks()
    return real.refine_faces(real.exposed(faces), SEEDS).expand(-1, 3, -1, -1)
