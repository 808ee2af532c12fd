"""Nodes that load the tiny worlds."""
from comfy_api.latest import io

from ...ppap_core.tinyworld.latents import class_labels
from ...ppap_core.tinyworld.loaders import SIZE
from ...ppap_core.tinyworld.scenes import CLASSES
from ..bridge import paths, tinyworld
from .inputs import also_found_as

CATEGORY = "PPAP/tiny world"


class PPAPTinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTinyWorld", display_name="Tiny World", category=CATEGORY,
            **also_found_as("tiny model", "demo model", "test model", "example model", "small diffusion model"),
            description="Loads a real diffusion model small enough for a laptop, which draws one shape in front of a wall, "
                        "32 pixels wide, and everything else that the KSampler needs.",
            inputs=[io.Int.Input("batch_size", default=4, min=1, max=256,
                                 tooltip="How many images are sampled at once."),
                    io.Combo.Input("version", options=list(tinyworld.TINY_DENOISERS), default="denoiser", optional=True,
                                   tooltip="denoiser: the model itself. bad sibling: half as wide and with a sixteenth of "
                                           "the training, for Autoguidance.")],
            outputs=[io.Model.Output(tooltip="The trained tiny denoiser; any sampler and scheduler samples it."),
                     io.Conditioning.Output(tooltip="Empty, since the model takes no prompt. Connect it as positive and "
                                                    "negative."),
                     io.Latent.Output(tooltip="Empty images of the model's size."),
                     io.Vae.Output(tooltip="Turns its latents, which are already pixels, into images.")])

    @classmethod
    def execute(cls, batch_size, version="denoiser"):
        return io.NodeOutput(tinyworld.tinyworld_model(version), tinyworld.empty_conditioning(),
                             tinyworld.empty_pixels(batch_size, SIZE), tinyworld.pixel_vae())


class PPAPTinyLatentWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTinyLatentWorld", display_name="Tiny Latent World", category=CATEGORY,
            **also_found_as("tiny latent model", "latent demo model", "small flow model", "tiny SD3", "example checkpoint"),
            description="Loads a real latent diffusion model small enough for a laptop, which draws the same shapes 128 "
                        "pixels wide and knows them by name. The flow model and the VAE are also files for ComfyUI's own "
                        "loaders.",
            inputs=[io.Combo.Input("kind", options=list(tinyworld.TINY_MODELS),
                                   tooltip="flow: in the layout of Stable Diffusion 3. eps: noise-predicting, with the "
                                           "schedule of Stable Diffusion 1.5. Both diffuse the same latents. flow, one "
                                           "frame: the flow for latents with a time axis of length one, as Krea 2, Anima "
                                           "and Qwen-Image have.")],
            outputs=[io.Model.Output(tooltip="Conditioned by Class Conditioning; any sampler and scheduler samples it."),
                     io.Vae.Output(tooltip="Turns its latents into images, and back.")])

    @classmethod
    def execute(cls, kind):
        return io.NodeOutput(tinyworld.TINY_MODELS[kind](), tinyworld.tinyworld_vae())


class PPAPClassConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPClassConditioning", display_name="Class Conditioning", category=CATEGORY,
            **also_found_as("class prompt", "class label conditioning", "prompt of the tiny world", "shape prompt",
                            "tiny world text"),
            description="Chooses what the latent tiny world draws, in the place of a text prompt.",
            inputs=[io.String.Input("classes", default="",
                                    tooltip=f"One of {', '.join(CLASSES)}, or one for each image, separated by "
                                            "commas. Empty: anything, as with an empty prompt.")],
            outputs=[io.Conditioning.Output(tooltip="For a sampler's positive or negative.")])

    @classmethod
    def validate_inputs(cls, classes):
        return paths.validate(class_labels, classes)

    @classmethod
    def execute(cls, classes):
        return io.NodeOutput(tinyworld.class_conditioning(class_labels(classes)))


NODES = [PPAPTinyWorld, PPAPTinyLatentWorld, PPAPClassConditioning]
