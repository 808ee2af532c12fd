"""Shared by the schemas of several nodes: inputs, and names under which a node is also found."""
from dataclasses import fields
from inspect import signature
from typing import Any

from comfy_api.latest import io

from ..bridge import sampler
from .io_types import TermsType

IN_PREDICTION, THROUGH_MODEL = "in the prediction", "through the model"


def also_found_as(*names: str) -> dict[str, Any]:
    """Return arguments of io.Schema by which a search finds a node; older versions of ComfyUI have no such names."""
    return {"search_aliases": list(names)} if "search_aliases" in {field.name for field in fields(io.Schema)} else {}


def folded() -> dict[str, Any]:
    """Return arguments of a widget that few need: it is shown on request, where this version of ComfyUI can hide it."""
    return {"advanced": True} if "advanced" in signature(io.Float.Input.__init__).parameters else {}


def model_input() -> io.Input:
    return io.Model.Input("model", tooltip="A diffusion model, of latents or of pixels. It stays as it is.")


def positive_input() -> io.Input:
    return io.Conditioning.Input("positive", tooltip="What the model should show.")


def negative_input() -> io.Input:
    return io.Conditioning.Input("negative", tooltip="What the model should avoid.")


def cfg_input() -> io.Input:
    return io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                          tooltip="Classifier-free guidance of the model itself. Neutral: 1.")


def scheduler_input() -> io.Input:
    return io.Combo.Input("scheduler", options=sampler.SCHEDULERS, default="karras",
                          tooltip="How the noise falls from step to step.")


def sampler_inputs() -> list[io.Input]:
    return [cfg_input(),
            io.Combo.Input("sampler_name", options=sampler.SAMPLERS, default="euler", tooltip="The sampling algorithm."),
            scheduler_input()]


def terms_input() -> io.Input:
    return TermsType.Input("terms", tooltip="What guides the sampling, from Guidance Term.")


def limit_input() -> io.Input:
    return io.Float.Input("max_rms", default=0.0, min=0.0, max=100.0, step=0.01,
                          tooltip="Upper limit of the shift in one step: its root mean square, where images span -1 to 1, "
                                  "or in latents. Try 0.3 when images burn out. Neutral: 0, no limit.")


def vae_input() -> io.Input:
    return io.Vae.Input("vae", optional=True,
                        tooltip="For latent models: guiders of the denoised view then judge the decoded image, which is "
                                "exact and costs more. Without it they judge a preview made of the latent's colours. "
                                "Guiders with experts use the small decoder that they were trained with in either case.")


def live_preview_input() -> io.Input:
    return io.Boolean.Input("live_preview", default=False, optional=True, **folded(), tooltip=(
        "Shows, beside ComfyUI's own preview, what each guider sees in the first image while it is sampled, a few times in "
        "a second. Only where previews are on in ComfyUI's settings. It changes no image. Neutral: off."))


def particle_inputs() -> list[io.Input]:
    """Inputs of a `Resampling`, and whether the terms also guide."""
    return [io.Int.Input("particles", default=1, min=1, max=64, optional=True,
                         tooltip="How many images are sampled at once for each one, of which the terms choose the best. "
                                 "With give_up, better ones take the place of worse ones on the way. Takes so many times as "
                                 "long, and the memory of a batch so many times as large. Neutral: 1."),
            io.Float.Input("give_up", default=0.75, min=0.0, max=1.0, step=0.05, optional=True, **folded(),
                           tooltip="How many particles are given up each time. Where the terms guide too, 0 is best; where "
                                   "they only choose, try 0.75. 1: all go on from the best one. Neutral: 0, none; the best "
                                   "one is taken at the end."),
            io.Int.Input("draws", default=4, min=0, max=1000, optional=True, **folded(),
                         tooltip="How often particles are given up, while it is decided what the image shows: not in pure "
                                 "noise, and not when only details are left. Neutral: 0."),
            io.Boolean.Input("terms_guide", default=True, optional=True, **folded(),
                             tooltip="Whether the terms also guide all particles. Off: they only choose, and then need no "
                                     "gradient. Neutral: on.")]


def window_inputs(at_start: float = 1.0, at_end: float = 1.0) -> list[io.Input]:
    """Inputs of a `PercentSchedule`. at_start, at_end: the factors that a new node has."""
    return [io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                           tooltip="Where guidance begins, as a share of the noise schedule. Neutral: 0, at the start."),
            io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                           tooltip="Where guidance ends, as a share of the noise schedule. Neutral: 1, at the end."),
            io.Float.Input("factor_at_start", default=at_start, min=0.0, max=100.0, step=0.05,
                           tooltip="Multiplies the strength at start_percent. Neutral: 1.", **folded()),
            io.Float.Input("factor_at_end", default=at_end, min=0.0, max=100.0, step=0.05,
                           tooltip="Multiplies the strength at end_percent; in between, the factor changes evenly. "
                                   "Neutral: 1.", **folded())]


def learning_rate_input(neutral: str, default: float = 1e-3) -> io.Input:
    return io.Float.Input("learning_rate", default=default, min=0.0, max=1.0, step=1e-5, round=1e-7,
                          tooltip=f"Size of the training steps at the start; it falls to zero. Neutral: 0, {neutral}.",
                          **folded())
