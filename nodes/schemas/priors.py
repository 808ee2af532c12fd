"""The node of plug-and-play priors: find an image by optimisation."""
from comfy_api.latest import io

from ...ppap_core.guidance.prior import PriorConfig
from ...ppap_core.viz.plots import loss_plot
from ..bridge import tensors
from ..bridge.priors import search
from .inputs import IN_PREDICTION, THROUGH_MODEL, vae_input
from .io_types import TermsType

CATEGORY = "PPAP/priors"


class PPAPPlugAndPlayPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPlugAndPlayPrior", display_name="Plug-and-Play Prior", category=CATEGORY,
            description="Finds an image instead of sampling one: a latent is moved, step by step, until the model takes "
                        "it for an image and every guider for what it is aimed at. For what guidance cannot reach, and "
                        "for changing an image that is there. Cancel loses nothing: queue it again and it goes on.",
            inputs=[io.Model.Input("model", tooltip="A diffusion model, of latents or of pixels; it is not changed."),
                    io.Conditioning.Input("positive", tooltip="What the model is asked for."),
                    io.Conditioning.Input("negative", tooltip="What the model is asked to avoid."),
                    io.Latent.Input("latent_image", tooltip="Where the search starts, and how many images are found at "
                                                            "once; an empty latent for new images. A mask that it has "
                                                            "says where it may change."),
                    io.Int.Input("seed", default=0, min=0, max=2**48, control_after_generate=True,
                                 tooltip="Image i is found with the noise of seed + i."),
                    io.Int.Input("steps", default=200, min=1, max=100_000,
                                 tooltip="Steps of the search; each asks the model once."),
                    io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                                   tooltip="Classifier-free guidance of the model itself. Neutral: 1."),
                    io.Float.Input("learning_rate", default=1.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="How far a step goes. From noise, low rates give pale, smooth images, which are "
                                           "the most probable ones. An image of yours stays itself at a low rate: 0.05. "
                                           "Neutral: 0, nothing moves."),
                    io.Float.Input("sigma_max", default=10.0, min=0.001, max=100.0, step=0.1,
                                   tooltip="Noise level at the start. The higher, the less is kept of the latent that came "
                                           "in: try 1 to change details of it. Neutral: sigma_min, all steps at one level."),
                    io.Float.Input("sigma_min", default=0.05, min=0.001, max=100.0, step=0.01,
                                   tooltip="Noise level at the end. Neutral: sigma_max, all steps at one level."),
                    io.Float.Input("start_noise", default=1.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="Noise on the latent at the start. Neutral: 0, the search starts from it as it "
                                           "is."),
                    io.Float.Input("clean_up", default=0.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="Noise level from which the found image is sampled anew, in ten steps: takes "
                                           "away traces of the search, and some of what the guiders asked for; try 0.5. "
                                           "Neutral: 0, nothing is sampled."),
                    io.Int.Input("particles", default=1, min=1, max=64,
                                 tooltip="How many searches there are for each image; the one that meets the guiders best "
                                         "is kept. Neutral: 1."),
                    io.Combo.Input("gradient", options=[IN_PREDICTION, THROUGH_MODEL], default=IN_PREDICTION,
                                   tooltip="How the model moves the image. in the prediction: towards its own prediction, "
                                           "cheap. through the model: as published, by the gradient of its error, which "
                                           "asks for two to three times the time and much memory."),
                    TermsType.Input("terms", optional=True,
                                    tooltip="What the image has to meet, from Guidance Term: all that steers sampling "
                                            "works here. balanced: pulls `weight` times as hard as the model. raw: 1 is "
                                            "what probability theory says."),
                    vae_input()],
            outputs=[io.Latent.Output(tooltip="What was found."),
                     io.Image.Output(display_name="losses",
                                     tooltip="The error of the noise, which says how well the model knows such an image, "
                                             "and the energy of all terms, step by step.")])

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, learning_rate, sigma_max, sigma_min,
                start_noise, clean_up, particles, gradient, terms=(), vae=None):
        config = PriorConfig(steps, learning_rate, sigma_max, sigma_min, gradient == THROUGH_MODEL, start_noise, particles,
                             renoise_sigma=clean_up)
        latent, losses = search(model, terms, positive, negative, cfg, latent_image, seed, config, vae)
        errors, energies = zip(*losses, strict=True)
        lines = {"error of the noise": errors} | ({"energy of the terms": energies} if terms else {})
        return io.NodeOutput(latent, tensors.image_to_comfy(loss_plot(lines, "Plug-and-play prior: what was lowered")))


NODES = [PPAPPlugAndPlayPrior]
