"""Nodes that guide: aim a guider, weigh it, apply it."""
from dataclasses import replace

from comfy_api.latest import io

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.latents import VIEWS
from ..bridge import guidance, sampler
from ..bridge.guidance import GuidanceTerm
from ..bridge.noise_levels import PercentSchedule
from ..bridge.sampler import SamplerSettings
from .inputs import IN_PREDICTION, THROUGH_MODEL, limit_input, vae_input
from .io_types import GuiderType, ReportType, TermsType

CATEGORY = "PPAP/guidance"


def terms_input() -> io.Input:
    return TermsType.Input("terms", tooltip="What steers the sampling, from Guidance Term.")


class PPAPGuidanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidanceTerm", display_name="Guidance Term", category=CATEGORY,
            description="How strongly, when and where an aimed guider steers. Chain terms to steer by several guiders at "
                        "once.",
            inputs=[GuiderType.Input("guider", tooltip="A guider with a target."),
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
                    TermsType.Input("terms", optional=True, tooltip="Other terms, to steer by all of them together."),
                    io.Combo.Input("strength", options=["balanced", "raw"], default="balanced", optional=True,
                                   tooltip="What the weight means. balanced: in each step the image is moved by this share "
                                           "of what is still uncertain of it, whatever the guider. raw: the gradient as it "
                                           "is, times the weight; 1 is what probability theory says, as in the paper."),
                    io.Combo.Input("gradient", options=[IN_PREDICTION, THROUGH_MODEL], default=IN_PREDICTION, optional=True,
                                   tooltip="How a guider that looks at the prediction moves the image. in the prediction: "
                                           "cheap. through the model: the model says too how the image can change, which "
                                           "is far better and asks for two to three times the time and much memory. A "
                                           "guider of the noisy view has no use for it.")],
            outputs=[TermsType.Output(display_name="terms", tooltip="This term, after those that came in.")])

    @classmethod
    def execute(cls, guider, weight, start_percent, end_percent, factor_at_start, factor_at_end, view, mask=None, terms=(),
                strength="balanced", gradient=IN_PREDICTION):
        schedule = PercentSchedule(start_percent, end_percent, factor_at_start, factor_at_end)
        term = GuidanceTerm(with_view(guider, view), weight, schedule, mask, strength == "balanced",
                            gradient == THROUGH_MODEL)
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
            inputs=[TermsType.Input("first", tooltip="Some terms."), TermsType.Input("second", tooltip="Some more.")],
            outputs=[TermsType.Output(display_name="terms", tooltip="All of them.")])

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
                    io.Combo.Input("sampler_name", options=sampler.SAMPLERS, default="euler",
                                   tooltip="The sampling algorithm."),
                    io.Combo.Input("scheduler", options=sampler.SCHEDULERS, default="karras",
                                   tooltip="How the noise falls from step to step."),
                    io.Conditioning.Input("positive", tooltip="What the model is asked for."),
                    io.Conditioning.Input("negative", tooltip="What the model is asked to avoid."),
                    io.Latent.Input("latent_image", tooltip="The latent to denoise; empty for new images."),
                    io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                                   tooltip="How much of the latent is made anew. Neutral for new images: 1, all of it."),
                    limit_input(), vae_input()],
            outputs=[io.Latent.Output(tooltip="The sampled latent."),
                     ReportType.Output(display_name="report", tooltip="What guidance did, for Plot Guidance.")])

    @classmethod
    def execute(cls, model, terms, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
                max_rms, vae=None):
        settings = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        return io.NodeOutput(*guidance.sample_guided(model, terms, max_rms, vae, latent_image, settings))


NODES = [PPAPGuidanceTerm, PPAPCombineTerms, PPAPApplyGuidance, PPAPGuidedKSampler]
