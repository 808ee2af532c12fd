"""The node for the first success: a model steered by one choice, without any other node."""
from typing import Any

from comfy_api.latest import io

from ..bridge import guidance, guider_cache, steer
from .inputs import also_found_as, model_input, vae_input

CATEGORY = "PPAP"
DYNAMIC = hasattr(io, "DynamicCombo")  # whether inputs can follow a choice; else all of them are shown
Settings = dict[str, Any]


def _choice_inputs() -> dict[str, tuple[Any, Settings]]:
    """Types and settings of the inputs that the choices ask for, by their ids."""
    networks = {"options": list(guider_cache.guider_sources())}
    unit = {"min": 0.0, "max": 1.0, "step": 0.01}
    return {
        "palette": (io.String, {"default": "#1d3557, #e63946, #f1faee:2", "tooltip":
                    "colours of a palette: six hexadecimal digits each, separated by commas. A colon and a number say how "
                    "much of the image a colour takes, relative to the others. Neutral: 1."}),
        "image": (io.Image, {"optional": True, "tooltip": "The image to take the colours, layout, edges, depth or regions "
                             "from, or that is grey or small: one for the whole batch, or one for each image of it."}),
        "brightness": (io.Float, {"default": 0.5, **unit, "tooltip":
                       "brightness: 0 is black, 1 is white. Neutral: what the image has already."}),
        "contrast": (io.Float, {"default": 0.25, **unit, "tooltip":
                     "contrast: 0 is flat, 0.5 is half black and half white. Neutral: what the image has already."}),
        "saturation": (io.Float, {"default": 0.2, **unit, "tooltip":
                       "saturation: 0 is grey. Neutral: what the image has already."}),
        "sharpness": (io.Float, {"default": 0.1, **unit, "tooltip":
                      "sharpness: 0 is blurred, photographs have 0.05 to 0.1. Neutral: what the image has already."}),
        "axis": (io.Combo, {"options": list(steer.AXES), "tooltip":
                 "symmetry: the image equals its mirror image, itself upside down, or itself turned by 180 degrees."}),
        "classifier": (io.Combo, {**networks, "default": "tinyworld/class", "tooltip":
                       "a class: a classifier or a tagger. Those of tinyworld/ come with the pack; Download Guider fetches "
                       "others."}),
        "classes": (io.String, {"default": "star", "tooltip":
                    "a class: its name or number. Commas separate the images of the batch; a plus puts several classes into "
                    "one image, each with its weight after a colon, as in star + ring:0.5. Neutral: the weight 0."}),
        "text_network": (io.Combo, {**networks, "tooltip":
                         "a text: a network that understands text, such as CLIP or SigLIP. None comes with the pack; "
                         "Download Guider fetches one."}),
        "text": (io.String, {"default": "a photo of a lighthouse", "multiline": True, "tooltip":
                 "a text: what the image should show, written as a caption. One line serves the whole batch; several lines "
                 "serve one image each."}),
        "map_network": (io.Combo, {**networks, "default": "tinyworld/depth", "tooltip":
                        "depth or regions of an image: a network for depth or segmentation, or any other that sees in "
                        "images what shall be alike."})}


def _choice_input(name: str, prefix: str = "", **changes: Any) -> io.Input:
    kind, settings = _choice_inputs()[name]
    return kind.Input(prefix + name, **{**settings, **changes})


def _options() -> list:
    if not DYNAMIC:
        return list(steer.CHOICES)
    return [io.DynamicCombo.Option(name, [_choice_input(slot) for slot in choice.inputs])
            for name, choice in steer.CHOICES.items()]


def towards_input() -> io.Input:
    return getattr(io, "DynamicCombo", io.Combo).Input("towards", options=_options(), tooltip=(
        "What the images should have. Colours, layout, edges, light, symmetry and tiling need no network and no download; a "
        "class, a text, depth and regions are seen by a network."))


def flat_inputs() -> list[io.Input]:
    """Inputs of all choices, in a ComfyUI in which they cannot follow the choice."""
    return [] if DYNAMIC else [_choice_input(name, "towards.", optional=True) for name in _choice_inputs()]


class PPAPSteer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPSteer", display_name="Steer", category=CATEGORY,
            description="Steers a model towards one thing: colours, light, symmetry, seamless tiling, the layout or depth "
                        "of an image, a class, a text. Put it before any sampler; several in a row steer together.",
            **also_found_as("color match", "palette", "recolor", "color grading", "seamless texture", "tileable", "mirror",
                            "depth control", "classifier guidance", "CLIP guidance", "simple guidance", "easy", "colorize",
                            "enlarge"),
            inputs=[model_input(),
                    io.Combo.Input("strength", options=list(steer.STRENGTHS), default="medium",
                                   tooltip="How strongly it steers: soft nudges, medium steers, strong forces."),
                    io.Float.Input("factor", default=1.0, min=-10.0, max=10.0, step=0.05,
                                   tooltip="Multiplies the strength: 1 leaves it as it is, 2 doubles it, negative values "
                                           "steer away. Neutral: 0, the images are what they are without this node."),
                    towards_input(),
                    io.Mask.Input("mask", optional=True, tooltip="Where to steer; without it, everywhere."),
                    vae_input(), *flat_inputs()],
            outputs=[io.Model.Output(tooltip="The steered model, for any sampler or another Steer.")])

    @classmethod
    def fingerprint_inputs(cls, towards, **others):
        return steer.network_stamp(towards, others)

    @classmethod
    def execute(cls, model, strength, factor, towards, mask=None, vae=None, **others):
        term = steer.term_of(*steer.chosen(towards, others), strength, factor, mask)
        return io.NodeOutput(guidance.apply_guidance(model, [term], 0.0, vae))


NODES = [PPAPSteer]
