"""The node of plug-and-play priors: find an image by optimisation."""
from collections.abc import Sequence

from comfy_api.latest import io

from ...ppap_core.guidance.prior import PriorConfig
from ...ppap_core.viz.plots import loss_plot
from ..bridge import tensors
from ..bridge.priors import PriorSearch
from .inputs import (
    IN_PREDICTION,
    THROUGH_MODEL,
    also_found_as,
    cfg_input,
    folded,
    model_input,
    negative_input,
    positive_input,
    vae_input,
)
from .io_types import TermsType

CATEGORY = "PPAP/priors"


class PPAPPlugAndPlayPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPlugAndPlayPrior", display_name="Plug-and-Play Prior", category=CATEGORY,
            **also_found_as("optimize an image", "score distillation", "SDS", "image optimization", "edit an image",
                            "diffusion prior"),
            description="Finds an image by optimisation instead of sampling one: moves a latent step by step until the "
                        "model finds it probable and every guider finds its target in it. For what guidance cannot reach, "
                        "and for changing an existing image. Cancelling loses nothing: queue it again and it resumes.",
            inputs=[model_input(), positive_input(), negative_input(),
                    io.Latent.Input("latent_image", tooltip="Where the search starts, and how many images are found at "
                                                            "once; an empty latent for new images. If it has a mask, only "
                                                            "what is inside may change."),
                    io.Int.Input("seed", default=0, min=0, max=2**48, control_after_generate=True,
                                 tooltip="Image i is found with the noise of seed + i."),
                    io.Int.Input("steps", default=200, min=1, max=100_000,
                                 tooltip="Steps of the search; each runs the model once."),
                    cfg_input(),
                    io.Float.Input("learning_rate", default=1.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="How far a step goes. Starting from noise, low rates give pale, smooth images, "
                                           "which are the most probable ones. To keep the character of your own image, use "
                                           "a low rate such as 0.05. Neutral: 0, nothing moves."),
                    io.Float.Input("sigma_max", default=10.0, min=0.001, max=100.0, step=0.1,
                                   tooltip="Noise level at the start. The higher it is, the less is kept of the latent: try "
                                           "1 to change details. Neutral: sigma_min, all steps at one level."),
                    io.Float.Input("sigma_min", default=0.05, min=0.001, max=100.0, step=0.01,
                                   tooltip="Noise level at the end. Neutral: sigma_max, all steps at one level.",
                                   **folded()),
                    io.Float.Input("start_noise", default=1.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="Noise that is added to the latent at the start. Neutral: 0, the search starts "
                                           "from the latent itself.", **folded()),
                    io.Float.Input("clean_up", default=0.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="Noise level from which the result is sampled anew, in ten steps. This removes "
                                           "traces of the search, and some of what the guiders achieved; try 0.5. Neutral: "
                                           "0, nothing is sampled."),
                    io.Int.Input("particles", default=1, min=1, max=64,
                                 tooltip="How many searches there are for each image; the one that meets the targets best "
                                         "is kept. Neutral: 1.", **folded()),
                    io.Combo.Input("gradient", options=[IN_PREDICTION, THROUGH_MODEL], default=IN_PREDICTION,
                                   tooltip="How the model moves the image. in the prediction: towards its own prediction, "
                                           "which is cheap. through the model: along the gradient of its error, as "
                                           "published, which takes two to three times as long and needs much memory."),
                    TermsType.Input("terms", optional=True,
                                    tooltip="The targets, from Guidance Term: all guiders of sampling work here too. With "
                                            "balanced strength a term pulls weight times as hard as the model; with raw "
                                            "strength, 1 is what probability theory says."),
                    vae_input()],
            outputs=[io.Latent.Output(tooltip="The images that were found."),
                     io.Image.Output(display_name="losses",
                                     tooltip="The error of the noise, which says how probable the model finds the image, "
                                             "and the energy of all terms, step by step.")])

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, learning_rate, sigma_max, sigma_min,
                start_noise, clean_up, particles, gradient, terms=(), vae=None):
        config = PriorConfig(steps, learning_rate, sigma_max, sigma_min, gradient == THROUGH_MODEL, start_noise, particles,
                             renoise_sigma=clean_up)
        search = PriorSearch(model, positive, negative, cfg, latent_image, seed, config, terms, vae)
        latent, losses = search.run()
        errors, energies = zip(*losses, strict=True)
        lines: dict[str, Sequence[float]] = {"error of the noise": errors}
        lines |= {"energy of the terms": energies} if terms else {}
        return io.NodeOutput(latent, tensors.image_to_comfy(loss_plot(lines, "Plug-and-play prior: what was lowered")))


NODES = [PPAPPlugAndPlayPrior]
