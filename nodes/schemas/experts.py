"""Nodes of experts: generate samples, distil experts, save and load them."""
from comfy_api.latest import io

from ...ppap_core.experts.adapters import LoraSpec
from ...ppap_core.experts.bank import with_experts
from ...ppap_core.experts.lesson import DistillConfig, uses_warm_start
from ...ppap_core.experts.presets import AS_SET, PRESETS, with_preset
from ...ppap_core.experts.trajectories import STEPS_PER_TRAJECTORY
from ...ppap_core.guiders.latents import VIEWS
from ..bridge import distillation, paths, progress, prompts, tensors
from ..bridge.distillation import Limits, SampleGenerator
from ..bridge.readouts import ReadoutDistillation, describe_prompts
from ..bridge.sampler import SamplerSettings
from .inputs import also_found_as, folded, learning_rate_input, positive_input, sampler_inputs
from .io_types import GuiderType, LossesType, SamplesType

CATEGORY = "PPAP/experts"
PREVIEW_COUNT = 16  # of the generated images


class PPAPGenerateSamples(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGenerateSamples", display_name="Generate Samples", category=CATEGORY,
            **also_found_as("make training images", "samples for distillation", "synthetic data set", "data-free",
                            "sample store"),
            description="Makes images with your own model, and keeps the steps that led to them: all that experts learn "
                        "from. Everything is saved in output/ppap_samples, so that a cancelled run resumes, and a finished "
                        "one costs nothing.",
            inputs=[io.Model.Input("model", tooltip="The model that will be guided."), positive_input(),
                    io.Latent.Input("latent_image", tooltip="An empty latent: the size of the images, and how many are made "
                                                            "at once."),
                    io.String.Input("name", default="samples", tooltip="Name of the folder in output/ppap_samples."),
                    io.Int.Input("count", default=512, min=64, max=100_000, step=64,
                                 tooltip="How many images at least; they come in files of 64."),
                    io.Int.Input("steps", default=20, min=1, max=1000,
                                 tooltip="Denoising steps for each image, of which "
                                         f"{STEPS_PER_TRAJECTORY} are kept for the experts."),
                    *sampler_inputs(),
                    io.Int.Input("seed", default=0, min=0, max=2**48, tooltip="Image i is made from the noise of seed + i."),
                    io.Conditioning.Input("negative", optional=True,
                                          tooltip="What the model should avoid. Without it, cfg has no effect."),
                    io.Vae.Input("vae", optional=True,
                                 tooltip="The model's VAE, for a latent model: the plain guider looks at the decoded "
                                         "image."),
                    io.Boolean.Input("draw_prompts", default=False, optional=True,
                                     tooltip="Makes each image with one of the positive prompts, drawn by its seed, where "
                                             "several come together from Prompt List or Conditioning (Combine). Neutral: "
                                             "off, each image is made with all of them.", **folded())],
            outputs=[SamplesType.Output(display_name="samples",
                                        tooltip="The images and the steps that led to them, for Distill Experts."),
                     io.Image.Output(tooltip=f"The first {PREVIEW_COUNT} of them.")])

    @classmethod
    def validate_inputs(cls, name):
        return paths.validate(paths.checked_file_name, name)

    @classmethod
    def execute(cls, model, positive, latent_image, name, count, steps, cfg, sampler_name, scheduler, seed, negative=None,
                vae=None, draw_prompts=False):
        settings = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, positive, negative or positive)
        samples = SampleGenerator(model, vae, latent_image, settings, draw_prompts).fill(name, count)
        return io.NodeOutput(samples, tensors.image_to_comfy(samples.store.images_at(range(PREVIEW_COUNT))))


class PPAPPromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPromptList", display_name="Prompt List", category=CATEGORY,
            **also_found_as("several prompts", "prompts from lines", "multiline prompts", "random prompt", "wildcards"),
            description="Encodes each line of a text as a prompt of its own. Generate Samples with draw_prompts then makes "
                        "each image with one of them, so that experts learn from all that you will draw.",
            inputs=[io.Clip.Input("clip", tooltip="The model's text encoder."),
                    io.String.Input("text", default="a photo of a lighthouse\na watercolour of a harbour", multiline=True,
                                    tooltip="One prompt in each line; empty lines do not count.")],
            outputs=[io.Conditioning.Output(tooltip="All prompts together, as Conditioning (Combine) gives them, for the "
                                                    "positive of Generate Samples.")])

    @classmethod
    def execute(cls, clip, text):
        return io.NodeOutput(prompts.encode_lines(clip, text))


class PPAPDistilExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPDistilExperts", display_name="Distill Experts", category=CATEGORY,
            **also_found_as("Distil Experts", "train experts", "PPAP experts", "noise-aware classifier", "train a guider",
                            "knowledge distillation"),
            description="Teaches a network that has only seen clean images to read noisy ones: one small adapter for each "
                        "range of noise, each of which learns to say, while the image is still noise, what the plain "
                        "network says about the finished image. The diffusion model is not run. No labels, no data set. "
                        "Cancelling loses nothing: queue it again and it resumes.",
            inputs=[SamplesType.Input("samples", tooltip="Generated images, from Generate Samples."),
                    GuiderType.Input("guider", tooltip="A plain guider. It needs no target, and keeps one that it has."),
                    io.Combo.Input("view", options=[*reversed(VIEWS)],
                                   tooltip="What the experts look at: the model's denoised prediction, which does with "
                                           "fewer images, or the noisy image itself (as in the paper), which wants "
                                           "thousands of images and a sampler that renews noise, such as euler_ancestral."),
                    io.Int.Input("experts", default=5, min=1, max=64,
                                 tooltip="Number of noise ranges; each gets an equal share of the samples' steps."),
                    io.Float.Input("sigma_min", default=0.0, min=0.0, max=1e4, step=0.001,
                                   tooltip="Lowest noise level of the experts. Neutral: 0, the lowest of the samples' "
                                           "steps.", **folded()),
                    io.Float.Input("sigma_max", default=0.0, min=0.0, max=1e5, step=0.1,
                                   tooltip="Highest noise level of the experts. Neutral: 0, the highest of the samples' "
                                           "steps up to 100, above which there is only noise.", **folded()),
                    io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Training steps for each expert."),
                    io.Int.Input("batch_size", default=32, min=1, max=4096, tooltip="Images in each training step.",
                                 **folded()),
                    learning_rate_input("the experts stay the plain network"),
                    io.Int.Input("rank", default=8, min=1, max=512, tooltip="Size of the adapters.", **folded()),
                    io.Float.Input("alpha", default=8.0, min=0.0, max=1024.0, step=0.5,
                                   tooltip="The adapters are scaled by alpha / rank. Neutral: 0, the experts stay the plain "
                                           "network.", **folded()),
                    io.Int.Input("seed", default=0, min=0, max=2**48,
                                 tooltip="Seed of the choice of images and steps, and of the initial weights."),
                    io.Float.Input("temperature", default=1.0, min=0.05, max=10.0, step=0.05, optional=True,
                                   tooltip="Of the plain network's classes while it teaches: below 1 they are sharper, and "
                                           "the experts learn to be more certain; the paper uses 0.25. Has no effect for "
                                           "guiders without classes. Neutral: 1.", **folded()),
                    io.String.Input("edges", default="", optional=True,
                                    tooltip="Noise levels between the experts, ascending and separated by commas, such as "
                                            "0.3, 1, 4 for four. They take the place of equal shares and of the number of "
                                            "experts; Plot Intervals shows which steps lie between them. Neutral: empty.",
                                    **folded()),
                    io.Combo.Input("preset", options=[*PRESETS], default=AS_SET, optional=True,
                                   tooltip="How long to train. A quick look takes 300 steps, good up to 1000 and thorough "
                                           "up to 4000, in place of the number above; good and thorough end an expert early "
                                           "where images held out show that it learns no more. They see each image in "
                                           "a mirror and shifted, too, so that fewer images go further, and are fast: the "
                                           "plain network answers once for each, and the device computes in 16 bits where "
                                           "it is good at that. Neutral: as set."),
                    io.Float.Input("minutes", default=0.0, min=0.0, max=100_000.0, step=0.5, optional=True,
                                   tooltip="End after so many minutes with what is reached, the time divided among the "
                                           "experts. Queued again with more minutes, it goes on from there. Neutral: 0, no "
                                           "limit.", **folded()),
                    GuiderType.Input("start", optional=True,
                                     tooltip="A guider with experts to go on from, with further images or more steps. "
                                             "Without it, experts start as the plain network.")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The guider with its experts."),
                     LossesType.Output(display_name="losses", tooltip="The loss of every training step, for Plot Losses.")])

    @classmethod
    def execute(cls, samples, guider, view, experts, sigma_min, sigma_max, steps, batch_size, learning_rate, rank, alpha,
                seed, temperature=1.0, edges="", preset=AS_SET, minutes=0.0, start=None):
        schedule = distillation.schedule_for(samples, experts, sigma_min, sigma_max, edges)
        bank = distillation.new_bank(guider, schedule, LoraSpec(rank, alpha), view, seed, samples.space)
        config = DistillConfig(steps, batch_size, learning_rate, seed, temperature=temperature,
                               warm_start=uses_warm_start(view))
        trained = distillation.train_experts(samples, guider, bank, with_preset(config, preset), Limits(start, minutes))
        experts = with_experts(guider, bank)
        words = (distillation.describe_experts(experts), trained.course)
        return io.NodeOutput(experts, trained.losses, ui=progress.show_note("\n".join(filter(None, words))))


class PPAPDistillReadout(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPDistillReadout", display_name="Distill Readout", category=CATEGORY,
            **also_found_as("Readout Guidance", "Distil Readout", "inner features", "feature guidance", "train a readout",
                            "guider of a model"),
            description="Teaches small heads to read from the model's own inner features, while the image is still noise, "
                        "what the plain network says about the finished image. They guide this model alone, with a gradient "
                        "that goes back through its first half. No labels, no data set. A cancelled run resumes when it is "
                        "queued again.",
            inputs=[io.Model.Input("model", tooltip="The model that will be guided."),
                    SamplesType.Input("samples", tooltip="Images generated by this model, from Generate Samples."),
                    GuiderType.Input("guider", tooltip="A plain guider. It needs no target, and keeps one that it has."),
                    io.Conditioning.Input("positive", tooltip="The prompt that the samples were made with."),
                    io.Int.Input("heads", default=5, min=1, max=64,
                                 tooltip="Number of noise ranges; each gets an equal share of the samples' steps."),
                    io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Training steps for each head."),
                    io.Int.Input("batch_size", default=32, min=1, max=4096, tooltip="Images in each training step."),
                    learning_rate_input("the heads learn nothing", 3e-3),
                    io.Int.Input("seed", default=0, min=0, max=2**48,
                                 tooltip="Seed of the choice of images and steps, and of the initial weights.")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The guider with its readout, for this model."),
                     LossesType.Output(display_name="losses", tooltip="The loss of every training step, for Plot Losses.")])

    @classmethod
    def execute(cls, model, samples, guider, positive, heads, steps, batch_size, learning_rate, seed):
        config = DistillConfig(steps, batch_size, learning_rate, seed)
        readout, losses = ReadoutDistillation(model, samples, guider, positive, heads, config).run()
        words = (distillation.describe_experts(readout), describe_prompts(positive))
        return io.NodeOutput(readout, losses, ui=progress.show_note("\n".join(filter(None, words))))


class PPAPSaveExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPSaveExperts", display_name="Save Experts", category=CATEGORY, is_output_node=True,
            **also_found_as("save guider", "save noise experts", "save adapters", "export experts", "write experts"),
            description="Writes a guider's experts into models/ppap_experts, for Load Experts and for other people. Only "
                        "the adapters are written, not the network.",
            inputs=[GuiderType.Input("guider", tooltip="A guider with experts, from Distill Experts."),
                    io.String.Input("file_name", default="my experts",
                                    tooltip="Name of the file, without a folder. A file of that name is replaced.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, file_name):
        return paths.validate(paths.new_expert_file, file_name)

    @classmethod
    def execute(cls, guider, file_name):
        file = distillation.save_experts(guider, file_name)
        return io.NodeOutput(ui=progress.show_text(cls, distillation.describe_saved(guider, file)))


class PPAPLoadExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadExperts", display_name="Load Experts", category=CATEGORY,
            **also_found_as("load noise experts", "noise-aware guider", "load adapters", "experts file", "import experts"),
            description="Gives a guider the experts that were distilled for it: one small adapter for each range of noise.",
            inputs=[GuiderType.Input("guider", tooltip="The plain guider that the experts were distilled for."),
                    io.Combo.Input("file_name", options=list(paths.expert_files()),
                                   tooltip="A file in models/ppap_experts.")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The guider with its experts.")])

    @classmethod
    def validate_inputs(cls, file_name):
        return paths.validate(paths.expert_file, file_name)

    @classmethod
    def fingerprint_inputs(cls, file_name, **linked):
        return paths.expert_stamp(file_name)

    @classmethod
    def execute(cls, guider, file_name):
        experts = distillation.load_experts(guider, paths.expert_file(file_name))
        return io.NodeOutput(experts, ui=progress.show_note(distillation.describe_loaded(experts)))


NODES = [PPAPPromptList, PPAPGenerateSamples, PPAPDistilExperts, PPAPDistillReadout, PPAPSaveExperts, PPAPLoadExperts]
