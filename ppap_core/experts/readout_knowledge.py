"""What the heads of a readout know: how often they give, on held-out steps, the plain guider's answer on finished images."""
from dataclasses import replace

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from .examine import BATCH, LEARNED_FROM, Agreements, commonest_answer, joined, summarize
from .knowledge import Knowledge
from .pairs import pairs_at, steps_in
from .readout import ReadoutNetwork
from .readout_distill import FeatureSamples, maps_at, output_like


def measure_readout(guider: Guider, readout: ReadoutNetwork, samples: FeatureSamples) -> tuple[Knowledge | None, ...]:
    """What each head knows, beside the plain guider on the denoiser's prediction; None for an interval without steps.

    By the held-out images of the samples, or by some that the heads learned from where there are none.
    guider: the plain one, the teacher.
    """
    held_out = samples.store.held_out
    store = held_out or samples.store
    images = len(store) if held_out else min(len(store), LEARNED_FROM)
    commonest = commonest_answer(guider, store, images, readout.head(0).mean.device)
    found: list[Knowledge | None] = []
    for index in range(len(readout.schedule)):
        steps = steps_in(store, readout.schedule, index)
        steps = steps[steps[:, 0] < images]
        parts = [_agreements(guider, readout, index, replace(samples, store=store), batch, commonest)
                 for batch in steps.split(BATCH) if len(batch)]
        found.append(summarize(joined(parts), steps[:, 0], bool(held_out)) if parts else None)
    return tuple(found)


@torch.no_grad()
def _agreements(guider: Guider, readout: ReadoutNetwork, index: int, samples: FeatureSamples, steps: Tensor,
                commonest: Tensor) -> Agreements:
    device = commonest.device
    noisy, denoised = (pairs_at(samples.store, steps, view) for view in ("noisy", "denoised"))
    teacher = guider.predict(noisy.images.to(device), clean(noisy.images.to(device)))
    plain = replace(guider, view="denoised", decode=samples.space.colors if samples.space else None)
    prediction, sigma = denoised.inputs.to(device), denoised.sigma.to(device)
    outputs = (plain.predict(plain.to_image(prediction, sigma), sigma),
               output_like(readout.head(index), maps_at(readout, samples, noisy), teacher), commonest.expand_as(teacher))
    return Agreements(*(TASKS[guider.task].agreement(output, teacher).cpu() for output in outputs))
