"""Nodes that guide: weigh guiders as terms, and apply them to a model."""
from comfy_api.latest import io

from ...ppap_core.guidance.particles import Resampling
from ...ppap_core.guiders.exact import WAYS
from ...ppap_core.guiders.latents import VIEWS
from ...ppap_core.schedules import FALLING
from ..bridge import comparisons, finishing, guidance, progress
from ..bridge.noise_levels import PercentSchedule
from ..bridge.particles import ParticleSampling
from ..bridge.sampler import SamplerSettings
from ..bridge.tensors import mask_from_comfy
from ..bridge.terms import GuidanceTerm, with_view
from .inputs import (
    IN_PREDICTION,
    THROUGH_MODEL,
    also_found_as,
    folded,
    limit_input,
    live_preview_input,
    model_input,
    negative_input,
    particle_inputs,
    positive_input,
    sampler_inputs,
    terms_input,
    vae_input,
    window_inputs,
)
from .io_types import GuiderType, ReportType, TermsType

CATEGORY = "PPAP/guidance"
BALANCED, RAW = "balanced", "raw"
SPREAD, SMALLEST = "not seen", "smallest"
ANOTHER_SET = "Another set: a row of the grid."


class PPAPGuidanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidanceTerm", display_name="Guidance Term", category=CATEGORY,
            **also_found_as("guidance strength", "guidance weight", "guidance schedule", "guidance mask",
                            "regional guidance", "negative guidance"),
            description="How strongly, when and where an aimed guider guides. Chain terms to guide by several guiders at "
                        "once.",
            inputs=[GuiderType.Input("guider", tooltip="A guider with a target."),
                    io.Float.Input("weight", default=0.7, min=-10000.0, max=10000.0, step=0.05,
                                   tooltip="How strongly the guider guides, in the units that strength sets; negative "
                                           "values guide away from the target. With balanced strength, 0.7 is a good start "
                                           "for every guider; through the model, 0.3. Neutral: 0, the guider does not run."),
                    *window_inputs(*FALLING),
                    io.Combo.Input("view", options=["own", *VIEWS], default="own",
                                   tooltip="What the guider looks at: the noisy image, or the model's denoised prediction "
                                           "of it. own: what its experts were distilled for, or the prediction if it has "
                                           "none. Neutral: own.", **folded()),
                    io.Mask.Input("mask", optional=True, tooltip="Where to guide; without it, everywhere."),
                    TermsType.Input("terms", optional=True, tooltip="Other terms, to guide by all of them together."),
                    io.Combo.Input("strength", options=[BALANCED, RAW], default=BALANCED, optional=True,
                                   tooltip="The units of weight. balanced: each step moves the image by this share of what "
                                           "is still uncertain about it, whatever the guider. raw: weight multiplies the "
                                           "gradient itself; 1 is what probability theory says, as in the paper.",
                                   **folded()),
                    io.Combo.Input("gradient", options=[IN_PREDICTION, THROUGH_MODEL], default=IN_PREDICTION, optional=True,
                                   tooltip="How a guider that looks at the prediction moves the image. in the prediction: "
                                           "cheap. through the model: takes into account how the model itself can change "
                                           "the image, which works far better, takes two to three times as long and needs "
                                           "much memory. Makes no difference for a guider of the noisy view."),
                    io.Int.Input("substeps", default=1, min=1, max=64, optional=True,
                                 tooltip="For 4 to 8 steps, as turbo models take: the guider looks and moves the image this "
                                         "many times in each step, by an equal part of the weight, while the model is asked "
                                         "once. Try 4. Neutral: 1.", **folded())],
            outputs=[TermsType.Output(display_name="terms", tooltip="The terms that came in, then this one.")])

    @classmethod
    def execute(cls, guider, weight, start_percent, end_percent, factor_at_start, factor_at_end, view, mask=None, terms=(),
                strength=BALANCED, gradient=IN_PREDICTION, substeps=1):
        schedule = PercentSchedule(start_percent, end_percent, factor_at_start, factor_at_end)
        term = GuidanceTerm(with_view(guider, view), weight, schedule,
                            None if mask is None else mask_from_comfy(mask), strength == BALANCED, gradient == THROUGH_MODEL,
                            substeps)
        return io.NodeOutput((*terms, term))


class PPAPCombineTerms(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPCombineTerms", display_name="Combine Terms", category=CATEGORY,
            **also_found_as("combine guidance", "several guiders", "add guidance together", "merge terms",
                            "multiple guidance"),
            description="Guide by two sets of terms together.",
            inputs=[TermsType.Input("first", tooltip="Some terms."), TermsType.Input("second", tooltip="Some more.")],
            outputs=[TermsType.Output(display_name="terms", tooltip="All of them.")])

    @classmethod
    def execute(cls, first, second):
        return io.NodeOutput((*first, *second))


class PPAPCompareTerms(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPCompareTerms", display_name="Compare Terms", category=CATEGORY,
            **also_found_as("XY plot", "grid of weights", "compare guiders", "compare strengths", "parameter sweep"),
            description="Guides by each of up to four sets of terms at each of several strengths: what comes after this "
                        "node runs once for each, and Image Grid shows all side by side.",
            inputs=[TermsType.Input("terms", tooltip="The first set, from Guidance Term."),
                    io.String.Input("factors", default="0, 0.5, 1, 2",
                                    tooltip="Each multiplies the weights of all terms, and is a column of the grid. 0 is no "
                                            "guidance. Neutral: 1, the weights as they are."),
                    TermsType.Input("terms_2", optional=True, tooltip=ANOTHER_SET),
                    TermsType.Input("terms_3", optional=True, tooltip=ANOTHER_SET),
                    TermsType.Input("terms_4", optional=True, tooltip=ANOTHER_SET)],
            outputs=[TermsType.Output(display_name="terms", is_output_list=True,
                                      tooltip="For Guided KSampler or Apply Guidance, set after set, each at every factor."),
                     io.String.Output(display_name="row_labels", tooltip="The guiders of each set, for Image Grid."),
                     io.String.Output(display_name="column_labels", tooltip="The factors, for Image Grid.")])

    @classmethod
    def execute(cls, terms, factors, terms_2=(), terms_3=(), terms_4=()):
        sets = [terms, *filter(None, (terms_2, terms_3, terms_4))]
        return io.NodeOutput(*comparisons.compare_terms(sets, factors))


class PPAPApplyGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPApplyGuidance", display_name="Apply Guidance", category=CATEGORY,
            **also_found_as("classifier guidance", "CLIP guidance", "universal guidance", "steer the model", "guided model",
                            "training-free guidance", "reward guidance"),
            description="Makes a guided model, for every sampler and together with LoRA, ControlNet, masks and other "
                        "patches. Put it after nodes that change CFG.",
            inputs=[model_input(), terms_input(), limit_input(), vae_input(), live_preview_input()],
            outputs=[io.Model.Output(tooltip="The guided model.")])

    @classmethod
    def execute(cls, model, terms, max_rms, vae=None, live_preview=False):
        return io.NodeOutput(guidance.apply_guidance(model, terms, max_rms, vae, live_preview))


class PPAPGuidedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidedKSampler", display_name="Guided KSampler", category=CATEGORY,
            **also_found_as("guided sampling", "KSampler with guidance", "classifier guidance sampler",
                            "CLIP guided sampler", "sampler with report"),
            description="ComfyUI's KSampler on a guided model, with a report of what guidance did.",
            inputs=[model_input(), terms_input(),
                    io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                                 tooltip="The seed of the noise."),
                    io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of denoising steps."),
                    *sampler_inputs(), positive_input(), negative_input(),
                    io.Latent.Input("latent_image", tooltip="The latent to denoise; an empty one for new images."),
                    io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                                   tooltip="How much of the latent is made anew. Neutral for new images: 1, all of it."),
                    limit_input(), vae_input(), live_preview_input(), *particle_inputs()],
            outputs=[io.Latent.Output(tooltip="The sampled latent."),
                     ReportType.Output(display_name="report",
                                       tooltip="What guidance did, for Plot Guidance and Guidance Summary.")])

    @classmethod
    def execute(cls, model, terms, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
                max_rms, vae=None, live_preview=False, particles=1, give_up=0.75, draws=4, terms_guide=True):
        settings = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        if particles == 1 and terms_guide:
            latent, report = guidance.sample_guided(model, terms, max_rms, vae, latent_image, settings, live_preview)
        else:
            sampling = ParticleSampling(model, terms, settings, Resampling(particles, give_up, draws), terms_guide, vae)
            latent, report = sampling.run(latent_image, max_rms, live_preview)
        return io.NodeOutput(latent, report, ui=progress.show_note(report.warnings()))


class PPAPFinish(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPFinish", display_name="Meet Exactly", category=CATEGORY,
            **also_found_as("make seamless", "make tileable", "mirror image", "histogram matching", "color match",
                            "paste back", "restore the original", "back projection"),
            description="Changes finished images until they meet exactly what a rule asks: no seam, perfect symmetry, the "
                        "very colours, the known pixels. Guidance brings images near, and this the last bit, which the VAE "
                        "takes away.",
            inputs=[io.Image.Input("image", tooltip="Finished images, from VAE Decode."),
                    GuiderType.Input("guider", tooltip="The aimed rule that guided them: "
                                     f"{', '.join(name.removeprefix('rule/') for name in WAYS)}."),
                    io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05,
                                   tooltip="How much of the way there. Neutral: 0, the images stay as they are."),
                    io.Combo.Input("change", options=[SPREAD, SMALLEST], default=SPREAD, optional=True,
                                   tooltip="not seen: spread over the image, so that it leaves no line, block or tint. "
                                           "smallest: the smallest change of all, in the pixels that need it. Symmetry, "
                                           "colours and light know one way only.", **folded())],
            outputs=[io.Image.Output(tooltip="The images, in the same size.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, image, guider, strength, change=SPREAD):
        images, outcome = finishing.finish(guider, image, strength, change == SMALLEST)
        return io.NodeOutput(images, ui=progress.show_text(cls, outcome))


NODES = [PPAPGuidanceTerm, PPAPCombineTerms, PPAPCompareTerms, PPAPApplyGuidance, PPAPGuidedKSampler, PPAPFinish]
