"""Nodes that aim a guider: they give it a target."""
from comfy_api.latest import io

from ...ppap_core.guiders.copies import COPIES
from ...ppap_core.guiders.targets import (
    aim_at_text,
    class_target,
    image_target,
    map_target,
    mask_target,
    number_target,
    with_cutouts,
)
from ...ppap_core.guiders.tasks import TASKS
from ...ppap_core.viz.colors import palette
from ..bridge import autograd, paths, tensors
from ..bridge.targets import aim_at_image, aim_at_variety
from .inputs import also_found_as
from .io_types import GuiderType

CATEGORY = "PPAP/targets"
PICTURE, MAP = "a picture", "a map"
DRAWN = ", ".join(f"{name} ({task.drawn_as})" for name, task in TASKS.items() if task.from_map)


def aimed_output() -> io.Output:
    return GuiderType.Output(display_name="guider", tooltip="The guider with a target, for Guidance Term.")


class PPAPAimAtClass(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtClass", display_name="Aim at Class", category=CATEGORY,
            **also_found_as("classifier guidance", "class label", "ImageNet class", "tags", "target class",
                            "negative class"),
            description="Chooses the class that a classifier guides towards, or the tags that a tagger does.",
            inputs=[GuiderType.Input("guider", tooltip="A classifier or a tagger, with or without experts."),
                    io.String.Input("classes", default="star",
                                    tooltip="A class by name or number, such as: star. Commas separate the images of the "
                                            "batch: star, disk, heart, ring. A plus puts several classes into one image, "
                                            "each with its weight after a colon: star + ring:0.5. A negative weight guides "
                                            "away: star + ring:-1. Neutral: the weight 0. The classes of a classifier rule "
                                            "each other out; a tagger's tags are free where none was named.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, classes):
        with autograd.outside_inference_mode():
            return io.NodeOutput(guider.aim(class_target(guider, classes)))


class PPAPAimAtText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtText", display_name="Aim at Text", category=CATEGORY,
            **also_found_as("CLIP guidance", "text guidance", "CLIP prompt", "caption", "text target", "semantic guidance"),
            description="Says in words what a text-image network should see in the image, or what CLIPSeg should mark in "
                        "it.",
            inputs=[GuiderType.Input("guider", tooltip="A network that understands text: CLIP, SigLIP, CLIPSeg."),
                    io.String.Input("text", default="a photo of a lighthouse", multiline=True,
                                    tooltip="What the image should show, written as a caption. One line serves the whole "
                                            "batch; several lines serve one image each.")],
            outputs=[GuiderType.Output(display_name="guider",
                                       tooltip="CLIP and SigLIP: the guider with a target, for Guidance Term. CLIPSeg: a "
                                               "guider that marks what the text says, for Aim at Mask and Preview Guider.")])

    @classmethod
    def execute(cls, guider, text):
        with autograd.outside_inference_mode():
            return io.NodeOutput(aim_at_text(guider, text))


class PPAPAimAtImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtImage", display_name="Aim at Image", category=CATEGORY,
            **also_found_as("depth control", "style transfer", "reference image", "image guidance", "structure",
                            "color match", "same pose", "similar image", "colorize", "super resolution", "restore",
                            "repair image"),
            description="Shows a guider an image that it should recognise again: the same depth, regions, class, style, "
                        "structure, colours, or whatever else it looks for.",
            inputs=[GuiderType.Input("guider", tooltip="Any network or rule that looks at images, with or without experts."),
                    io.Image.Input("image", tooltip="One image for the whole batch, or one for each image of it."),
                    io.Combo.Input("image_is", options=[PICTURE, MAP], default=PICTURE,
                                   tooltip="a picture: the guider looks at it, and its output becomes the target. a map: "
                                           f"the image is the target itself, for guiders of {DRAWN}."),
                    io.Mask.Input("missing", optional=True,
                                  tooltip="White where the image is torn or missing, as the mask of Load Image is where it "
                                          f"was painted over. For the rules {', '.join(COPIES)}. Without it, nothing is "
                                          "missing.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, image, image_is, missing=None):
        return io.NodeOutput(aim_at_image(guider, image, image_target if image_is == PICTURE else map_target, missing))


class PPAPAimAtMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtMask", display_name="Aim at Mask", category=CATEGORY,
            **also_found_as("place an object", "layout control", "regional object", "segmentation mask", "mask target",
                            "composition"),
            description="Says where something should be: paint the place, and name the class.",
            inputs=[GuiderType.Input("guider", tooltip="A segmentation network, or CLIPSeg after Aim at Text."),
                    io.Mask.Input("mask", tooltip="White where the thing should be, of any size, over the whole image. One "
                                                  "mask for the whole batch, or one for each image of it."),
                    io.String.Input("name", default="star",
                                    tooltip="The class that should fill the mask, by name or number; anything may be "
                                            "outside it. Not used after Aim at Text, whose text names it.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, mask, name):
        with autograd.outside_inference_mode():
            return io.NodeOutput(guider.aim(mask_target(guider, tensors.mask_from_comfy(mask), name)))


class PPAPAimAtNumber(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtNumber", display_name="Aim at Number", category=CATEGORY,
            **also_found_as("aesthetic score", "brightness", "reward", "saturation", "quality score", "image score"),
            description="Says how bright, sharp, colourful or beautiful an image should be, to a guider that measures it.",
            inputs=[GuiderType.Input("guider", tooltip="A rule such as brightness, or a network that gives a score."),
                    io.Float.Input("number", default=0.5, min=-1000.0, max=1000.0, step=0.01,
                                   tooltip="What the guider should measure; Preview Guider shows what it measures in any "
                                           "image. Neutral: what the image has already. To guide not at all, set weight to "
                                           "0 in Guidance Term."),
                    io.String.Input("name", default="", optional=True,
                                    tooltip="Which number, by name or index, for a network that gives several, such as "
                                            "valence and arousal; the others are free. Neutral: empty, the only one.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, number, name=""):
        with autograd.outside_inference_mode():
            return io.NodeOutput(guider.aim(number_target(guider, number, name)))


class PPAPVariety(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPVariety", display_name="Variety", category=CATEGORY,
            **also_found_as("diversity", "particle guidance", "different images", "same face every seed", "unlike images",
                            "more variation"),
            description="Keeps the images of a batch unlike each other, for models that give nearly the same picture for "
                        "every seed. Each image is guided away from the others of its batch, and from further images, in "
                        "what a guider sees.",
            inputs=[GuiderType.Input("guider", optional=True,
                                     tooltip="In what the images should differ: the outputs of any guider, which needs no "
                                             "target. Without it, in layout: light, dark and colour at the same places."),
                    io.Image.Input("unlike", optional=True,
                                   tooltip="Further images to be unlike, such as those of earlier runs. Without them, only "
                                           "each other.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider=None, unlike=None):
        return io.NodeOutput(aim_at_variety(guider, unlike))


class PPAPPalette(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPalette", display_name="Palette", category=CATEGORY,
            **also_found_as("color palette", "color match", "color scheme", "color grading", "brand colors", "hex colors"),
            description="Draws colours as an image of stripes. Wired into Aim at Image with the rule 'colours', it guides "
                        "towards these colours.",
            inputs=[io.String.Input("colours", default="#1d3557, #e63946, #f1faee:2",
                                    tooltip="Colours as six hexadecimal digits, separated by commas. A colon and a number "
                                            "say how much of the image a colour takes, relative to the others. Neutral: "
                                            "1.")],
            outputs=[io.Image.Output(tooltip="The stripes, for Aim at Image.")])

    @classmethod
    def validate_inputs(cls, colours):
        return paths.validate(palette, colours)

    @classmethod
    def execute(cls, colours):
        return io.NodeOutput(tensors.image_to_comfy(palette(colours)))


class PPAPCutOuts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPCutOuts", display_name="Cut-outs", category=CATEGORY,
            **also_found_as("cutouts", "random crops", "CLIP cutouts", "look at details", "patches", "augmentations"),
            description="Lets a network look at parts of the image as well as the whole: it then sees details that are lost "
                        "when the whole is made small for it.",
            inputs=[GuiderType.Input("guider", tooltip="A network for classes, texts, embeddings, style or scores."),
                    io.Int.Input("count", default=8, min=0, max=64,
                                 tooltip="How many parts are judged beside the whole image, different ones at each noise "
                                         "level; each costs as much as the whole. Neutral: 0, only the whole image.")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The guider that looks at parts too. A target that it "
                                                                      "has is kept.")])

    @classmethod
    def execute(cls, guider, count):
        return io.NodeOutput(with_cutouts(guider, count))


NODES = [PPAPAimAtClass, PPAPAimAtText, PPAPAimAtImage, PPAPAimAtMask, PPAPAimAtNumber, PPAPVariety, PPAPPalette,
         PPAPCutOuts]
