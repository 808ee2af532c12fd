"""Nodes that guide: aim a guider, weigh it, apply it."""
from dataclasses import replace

from comfy_api.latest import io

from ..ppap_core.experts import VIEWS, ExpertBank
from ..ppap_core.guider import Guider
from ..ppap_core.targets import (
    aim_at_text,
    class_target,
    image_target,
    map_target,
    mask_target,
    number_target,
    palette,
    with_cutouts,
)
from . import bridge, folders, guidance
from .types import GuidanceTerm, PPAPGuider, PPAPReport, PPAPTerms

CATEGORY = "PPAP/guide"
PICTURE, MAP = "a picture", "a map"
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


def aimed_output() -> io.Output:
    return PPAPGuider.Output(display_name="guider", tooltip="The guider with a target, for Guidance Term.")


def terms_input() -> io.Input:
    return PPAPTerms.Input("terms", tooltip="What steers the sampling, from Guidance Term.")


class PPAPAimAtClass(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtClass", display_name="Aim at Class", category=CATEGORY,
            description="Tell a classifier which class it should steer towards.",
            inputs=[PPAPGuider.Input("guider", tooltip="A classifier, with or without experts."),
                    io.String.Input("classes", default="star",
                                    tooltip="A class by name or number, such as: star. A comma begins the next image of the "
                                            "batch: star, disk, heart, ring. A plus puts several into one image, each with "
                                            "its weight after a colon: star + ring:0.5. A negative weight stays away: "
                                            "star + ring:-1. Neutral: the weight 0.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, classes):
        with bridge.autograd():
            return io.NodeOutput(guider.aim(class_target(guider, classes)))


class PPAPAimAtText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtText", display_name="Aim at Text", category=CATEGORY,
            description="Say in words what a text-image network should see in the image, or what a network that marks "
                        "things should mark.",
            inputs=[PPAPGuider.Input("guider", tooltip="A network that knows texts: CLIP, SigLIP, CLIPSeg."),
                    io.String.Input("text", default="a photo of a lighthouse", multiline=True,
                                    tooltip="What the image shall show, as in a caption. One line is for the whole batch; "
                                            "several lines are for one image each.")],
            outputs=[PPAPGuider.Output(display_name="guider",
                                       tooltip="CLIP and SigLIP: the guider with a target, for Guidance Term. CLIPSeg: the "
                                               "guider that marks what the text says, for Aim at Mask and Look Through.")])

    @classmethod
    def execute(cls, guider, text):
        with bridge.autograd():
            return io.NodeOutput(aim_at_text(guider, text))


class PPAPAimAtImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtImage", display_name="Aim at Image", category=CATEGORY,
            description="Show a guider an image that it should see again: the same depth, regions, class, style, structure, "
                        "colours, or whatever it looks for.",
            inputs=[PPAPGuider.Input("guider", tooltip="Any network or rule that looks at images, with or without experts."),
                    io.Image.Input("image", tooltip="One image for the whole batch, or one for each image of it."),
                    io.Combo.Input("image_is", options=[PICTURE, MAP], default=PICTURE,
                                   tooltip="a picture: the guider looks at it, and what it sees becomes the target. a map: "
                                           "the image is the target itself, for guiders of depth (grey, near is white), "
                                           "regions (the colours that Look Through shows) and masks (white where the "
                                           "thing shall be).")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, image, image_is):
        picture = bridge.image_from_comfy(image).to(bridge.ready(guider))
        with bridge.autograd():
            target = (image_target if image_is == PICTURE else map_target)(guider, picture)
        return io.NodeOutput(guider.aim(target))


class PPAPAimAtMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtMask", display_name="Aim at Mask", category=CATEGORY,
            description="Say where something shall be: paint the place, and name the class.",
            inputs=[PPAPGuider.Input("guider", tooltip="A segmentation network, or CLIPSeg after Aim at Text."),
                    io.Mask.Input("mask", tooltip="White where the thing shall be, of any size, over the whole image. One "
                                                  "mask for the whole batch, or one for each image of it."),
                    io.String.Input("name", default="star",
                                    tooltip="The class that shall fill the mask, by name or number; outside of it anything "
                                            "may be. Not used after Aim at Text, which has said it already.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, mask, name):
        with bridge.autograd():
            return io.NodeOutput(guider.aim(mask_target(guider, mask, name)))


class PPAPAimAtNumber(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtNumber", display_name="Aim at Number", category=CATEGORY,
            description="Say how bright, sharp, colourful or beautiful an image shall be, to a guider that measures it.",
            inputs=[PPAPGuider.Input("guider", tooltip="A rule such as brightness, or a network that gives a score."),
                    io.Float.Input("number", default=0.5, min=-1000.0, max=1000.0, step=0.01,
                                   tooltip="What the guider shall measure; Look Through shows what it measures in any "
                                           "image. Neutral: what the image has already; no steering at all is weight 0 in "
                                           "Guidance Term.")],
            outputs=[aimed_output()])

    @classmethod
    def execute(cls, guider, number):
        with bridge.autograd():
            return io.NodeOutput(guider.aim(number_target(guider, number)))


class PPAPPalette(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPalette", display_name="Palette", category=CATEGORY,
            description="Colours as an image of stripes. Wired into Aim at Image of the rule 'colours', it steers towards "
                        "these colours.",
            inputs=[io.String.Input("colours", default="#1d3557, #e63946, #f1faee:2",
                                    tooltip="Colours as six hexadecimal digits, separated by commas. A colon and a number "
                                            "say how much of the image a colour takes, beside the others. Neutral: 1.")],
            outputs=[io.Image.Output(tooltip="The stripes, for Aim at Image.")])

    @classmethod
    def validate_inputs(cls, colours):
        return folders.verdict(palette, colours)

    @classmethod
    def execute(cls, colours):
        return io.NodeOutput(bridge.image_to_comfy(palette(colours)))


class PPAPCutOuts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPCutOuts", display_name="Cut-outs", category=CATEGORY,
            description="Let a network look at parts of the image too, not only at the whole: it sees details that are lost "
                        "in the small picture it makes of the whole.",
            inputs=[PPAPGuider.Input("guider", tooltip="A network for classes, texts, embeddings, style or scores."),
                    io.Int.Input("count", default=8, min=0, max=64,
                                 tooltip="How many parts are judged beside the whole image, others at each noise level; "
                                         "each costs as much as the whole. Neutral: 0, only the whole image.")],
            outputs=[PPAPGuider.Output(display_name="guider", tooltip="The guider that looks at parts too; a target that it "
                                                                      "had is kept.")])

    @classmethod
    def execute(cls, guider, count):
        return io.NodeOutput(with_cutouts(guider, count))


class PPAPGuidanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidanceTerm", display_name="Guidance Term", category=CATEGORY,
            description="How strongly, when and where an aimed guider steers. Chain terms to steer by several guiders at "
                        "once.",
            inputs=[PPAPGuider.Input("guider", tooltip="A guider with a target."),
                    io.Float.Input("weight", default=0.5, min=-10000.0, max=10000.0, step=0.05,
                                   tooltip="Strength, in the units of strength; negative steers away. 0.5 is a good start "
                                           "for every guider that is balanced. Neutral: 0, the guider is not even asked."),
                    io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                                   tooltip="Share of the noise schedule at which steering begins. Neutral: 0, from the "
                                           "start."),
                    io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                                   tooltip="Share of the noise schedule at which steering ends. Neutral: 1, to the end."),
                    io.Float.Input("factor_at_start", default=1.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="Factor of the weight where steering begins. Neutral: 1."),
                    io.Float.Input("factor_at_end", default=1.0, min=0.0, max=100.0, step=0.05,
                                   tooltip="Factor of the weight where steering ends, in between it changes evenly. "
                                           "Neutral: 1."),
                    io.Combo.Input("view", options=["own", *VIEWS], default="own",
                                   tooltip="What the guider looks at: the noisy image, or the model's denoised prediction "
                                           "of it. own: what its experts were distilled for, the prediction when it has "
                                           "none."),
                    io.Mask.Input("mask", optional=True,
                                  tooltip="Steer only here; without it, everywhere."),
                    PPAPTerms.Input("terms", optional=True, tooltip="Other terms, to steer by all of them together."),
                    io.Combo.Input("strength", options=["balanced", "raw"], default="balanced", optional=True,
                                   tooltip="What the weight means. balanced: in each step the image is moved by this share "
                                           "of what is still uncertain of it, whatever the guider. raw: the gradient as it "
                                           "is, times the weight; 1 is what probability theory says, as in the paper."),
                    io.Combo.Input("gradient", options=[IN_PREDICTION, THROUGH_MODEL], default=IN_PREDICTION, optional=True,
                                   tooltip="How a guider that looks at the prediction moves the image. in the prediction: "
                                           "cheap. through the model: the model says too how the image can change, which "
                                           "is far better and asks for two to three times the time and much memory. A "
                                           "guider of the noisy view has no use for it.")],
            outputs=[PPAPTerms.Output(display_name="terms", tooltip="This term, after those that came in.")])

    @classmethod
    def execute(cls, guider, weight, start_percent, end_percent, factor_at_start, factor_at_end, view, mask=None, terms=(),
                strength="balanced", gradient=IN_PREDICTION):
        term = GuidanceTerm(with_view(guider, view), weight, start_percent, end_percent, factor_at_start, factor_at_end,
                            mask, strength == "balanced", gradient == THROUGH_MODEL)
        return io.NodeOutput((*terms, term))


def with_view(guider: Guider, view: str) -> Guider:
    """The guider looking at something else. ValueError for experts, who know one view only."""
    if view in ("own", guider.view):
        return guider
    if isinstance(guider.net, ExpertBank):
        raise ValueError(f"the experts of {guider.name} were distilled for the {guider.view} view, not the {view} one: "
                         "choose 'own', or distil experts for that view")
    return replace(guider, view=view)


class PPAPCombineTerms(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPCombineTerms", display_name="Combine Terms", category=CATEGORY,
            description="Steer by two sets of terms together.",
            inputs=[PPAPTerms.Input("first", tooltip="Some terms."), PPAPTerms.Input("second", tooltip="Some more.")],
            outputs=[PPAPTerms.Output(display_name="terms", tooltip="All of them.")])

    @classmethod
    def execute(cls, first, second):
        return io.NodeOutput((*first, *second))


class PPAPApplyGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPApplyGuidance", display_name="Apply Guidance", category=CATEGORY,
            description="A model that is steered, for every sampler and together with LoRA, ControlNet, masks and other "
                        "patches. Put it after nodes that change CFG.",
            inputs=[io.Model.Input("model", tooltip="A diffusion model, of latents or of pixels."), terms_input(),
                    limit_input(), vae_input()],
            outputs=[io.Model.Output(tooltip="The steered model; the one that came in stays as it was.")])

    @classmethod
    def execute(cls, model, terms, max_rms, vae=None):
        return io.NodeOutput(guidance.apply_guidance(model, terms, max_rms, vae))


class PPAPGuidedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidedKSampler", display_name="Guided KSampler", category=CATEGORY,
            description="ComfyUI's KSampler on a steered model, and a report of what the guidance did.",
            inputs=[io.Model.Input("model", tooltip="A diffusion model, of latents or of pixels."), terms_input(),
                    io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                                 tooltip="The random seed used for creating the noise."),
                    io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of denoising steps."),
                    io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                                   tooltip="Classifier-free guidance of the model itself. Neutral: 1."),
                    io.Combo.Input("sampler_name", options=bridge.SAMPLERS, default="euler",
                                   tooltip="The sampling algorithm."),
                    io.Combo.Input("scheduler", options=bridge.SCHEDULERS, default="karras",
                                   tooltip="How the noise falls from step to step."),
                    io.Conditioning.Input("positive", tooltip="What the model is asked for."),
                    io.Conditioning.Input("negative", tooltip="What the model is asked to avoid."),
                    io.Latent.Input("latent_image", tooltip="The latent to denoise; empty for new images."),
                    io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                                   tooltip="How much of the latent is made anew. Neutral for new images: 1, all of it."),
                    limit_input(), vae_input()],
            outputs=[io.Latent.Output(tooltip="The sampled latent."),
                     PPAPReport.Output(display_name="report", tooltip="What guidance did, for Plot Guidance.")])

    @classmethod
    def execute(cls, model, terms, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
                max_rms, vae=None):
        return io.NodeOutput(*guidance.sample_guided(model, terms, max_rms, vae, seed, steps, cfg, sampler_name, scheduler,
                                                   positive, negative, latent_image, denoise=denoise))


NODES = [PPAPAimAtClass, PPAPAimAtText, PPAPAimAtImage, PPAPAimAtMask, PPAPAimAtNumber, PPAPPalette, PPAPCutOuts,
         PPAPGuidanceTerm, PPAPCombineTerms, PPAPApplyGuidance, PPAPGuidedKSampler]
