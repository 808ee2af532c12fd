"""Nodes that guide: aim a guider, weigh it, apply it."""
from dataclasses import replace

from comfy_api.latest import io

from ..ppap_core.experts import VIEWS, ExpertBank
from ..ppap_core.guider import Guider, class_target, reading
from ..ppap_core.pictures import map_target
from . import bridge
from .types import GuidanceTerm, PPAPGuider, PPAPReport, PPAPTerms

CATEGORY = "PPAP/guide"
PICTURE, MAP = "a picture", "a map"


def limit_input() -> io.Float.Input:
    return io.Float.Input("max_rms", default=0.0, min=0.0, max=100.0, step=0.01,
                          tooltip="Upper limit for the size of the shift in one step, as its root mean square where images "
                                  "span -1 to 1; try 0.3 when images burn out. Neutral: 0, no limit.")


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
                                    tooltip="A class by name or number, such as: star. Several, separated by commas, aim "
                                            "each image of the batch at its own: star, disk, heart, ring.")],
            outputs=[PPAPGuider.Output(display_name="guider", tooltip="The guider with a target.")])

    @classmethod
    def execute(cls, guider, classes):
        with bridge.autograd():
            return io.NodeOutput(guider.aim(class_target(guider, classes)))


class PPAPAimAtImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAimAtImage", display_name="Aim at Image", category=CATEGORY,
            description="Tell a depth or segmentation network which depth or which regions it should steer towards.",
            inputs=[PPAPGuider.Input("guider", tooltip="A network for depth or segmentation, with or without experts."),
                    io.Image.Input("image", tooltip="One image for the whole batch, or one for each image of it."),
                    io.Combo.Input("image_is", options=[PICTURE, MAP], default=PICTURE,
                                   tooltip="a picture: the guider looks at it, and what it sees becomes the target. a map: "
                                           "the image is the target itself, grey depth with near in white, or regions in "
                                           "the colours that Look Through shows.")],
            outputs=[PPAPGuider.Output(display_name="guider", tooltip="The guider with a target.")])

    @classmethod
    def execute(cls, guider, image, image_is):
        picture = bridge.image_from_comfy(image).to(bridge.ready(guider))
        with bridge.autograd():
            target = (reading if image_is == PICTURE else map_target)(guider, picture)
        return io.NodeOutput(guider.aim(target))


class PPAPGuidanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidanceTerm", display_name="Guidance Term", category=CATEGORY,
            description="How strongly, when and where an aimed guider steers. Chain terms to steer by several guiders at "
                        "once.",
            inputs=[PPAPGuider.Input("guider", tooltip="A guider with a target."),
                    io.Float.Input("weight", default=4.0, min=-10000.0, max=10000.0, step=0.1,
                                   tooltip="Strength; 1 is what probability theory says, more is stronger, negative steers "
                                           "away. Neutral: 0, the guider is not even asked."),
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
                                  tooltip="Steer only here. As large as the image; without it, everywhere."),
                    PPAPTerms.Input("terms", optional=True, tooltip="Other terms, to steer by all of them together.")],
            outputs=[PPAPTerms.Output(display_name="terms", tooltip="This term, after those that came in.")])

    @classmethod
    def execute(cls, guider, weight, start_percent, end_percent, factor_at_start, factor_at_end, view, mask=None, terms=()):
        term = GuidanceTerm(with_view(guider, view), weight, start_percent, end_percent, factor_at_start, factor_at_end,
                            mask)
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
            inputs=[io.Model.Input("model", tooltip="A pixel-space diffusion model."), terms_input(), limit_input()],
            outputs=[io.Model.Output(tooltip="The steered model; the one that came in stays as it was.")])

    @classmethod
    def execute(cls, model, terms, max_rms):
        return io.NodeOutput(bridge.apply_guidance(model, terms, max_rms))


class PPAPGuidedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidedKSampler", display_name="Guided KSampler", category=CATEGORY,
            description="ComfyUI's KSampler on a steered model, and a report of what the guidance did.",
            inputs=[io.Model.Input("model", tooltip="A pixel-space diffusion model."), terms_input(),
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
                    limit_input()],
            outputs=[io.Latent.Output(tooltip="The sampled latent."),
                     PPAPReport.Output(display_name="report", tooltip="What guidance did, for Plot Guidance.")])

    @classmethod
    def execute(cls, model, terms, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
                max_rms):
        return io.NodeOutput(*bridge.sample_guided(model, terms, max_rms, seed, steps, cfg, sampler_name, scheduler,
                                                   positive, negative, latent_image, denoise=denoise))


NODES = [PPAPAimAtClass, PPAPAimAtImage, PPAPGuidanceTerm, PPAPCombineTerms, PPAPApplyGuidance, PPAPGuidedKSampler]
