"""Inputs that several nodes share."""
from comfy_api.latest import io

IN_PREDICTION, THROUGH_MODEL = "in the prediction", "through the model"


def limit_input() -> io.Float.Input:
    return io.Float.Input("max_rms", default=0.0, min=0.0, max=100.0, step=0.01,
                          tooltip="Upper limit for the size of the shift in one step, as its root mean square where images "
                                  "span -1 to 1, or in latents; try 0.3 when images burn out. Neutral: 0, no limit.")


def vae_input() -> io.Vae.Input:
    return io.Vae.Input("vae", optional=True,
                        tooltip="For models of latents: guiders of the denoised view then look at the decoded image, which "
                                "is exact and costs more. Without it they look at the latent's colours. Guiders with "
                                "experts use the small decoder they were trained with instead.")
