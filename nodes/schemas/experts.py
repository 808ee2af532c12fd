"""Nodes that train: generate samples, distil experts."""
from comfy_api.latest import io

from ...ppap_core.experts.adapters import LoraSpec
from ...ppap_core.experts.bank import ExpertBank, with_experts
from ...ppap_core.experts.checkpoint import load_bank, save_bank
from ...ppap_core.experts.distill import DistillConfig, uses_warm_start
from ...ppap_core.experts.samples import STEPS_PER_TRAJECTORY, from_uint8
from ...ppap_core.guiders.latents import VIEWS
from ..bridge import autograd, distillation, fingerprint, latents, paths, progress, sampler, tensors
from ..bridge.distillation import SampleGenerator, Samples
from ..bridge.sampler import SamplerSettings
from .io_types import GuiderType, LossesType, SamplesType

CATEGORY = "PPAP/experts"


class PPAPLoadExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadExperts", display_name="Load Experts", category=CATEGORY,
            description="Give a guider the experts that were distilled for it: one small adapter for each range of noise.",
            inputs=[GuiderType.Input("guider", tooltip="The plain guider that the experts were distilled for."),
                    io.Combo.Input("file_name", options=list(paths.expert_files()),
                                   tooltip="A file in models/ppap_experts.")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The guider with its experts.")])

    @classmethod
    def validate_inputs(cls, file_name):
        return paths.validate(paths.expert_file, file_name)

    @classmethod
    def fingerprint_inputs(cls, file_name, **linked):
        return paths.expert_state(file_name)

    @classmethod
    def execute(cls, guider, file_name):
        with autograd.outside_inference_mode():
            return io.NodeOutput(with_experts(guider, load_bank(paths.expert_file(file_name), guider)))


class PPAPSaveExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPSaveExperts", display_name="Save Experts", category=CATEGORY, is_output_node=True,
            description="Write a guider's experts into models/ppap_experts, for Load Experts and for other people. "
                        "Only the adapters are written, not the network.",
            inputs=[GuiderType.Input("guider", tooltip="A guider with experts, from Distil Experts."),
                    io.String.Input("file_name", default="my experts",
                                    tooltip="Name of the file, without a folder. A file of the same name is replaced.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, file_name):
        return paths.validate(paths.new_expert_file, file_name)

    @classmethod
    def execute(cls, guider, file_name):
        if not isinstance(guider.net, ExpertBank):
            raise ValueError(f"{guider.name} has no experts to save: connect the guider that comes out of Distil Experts")
        file = paths.new_expert_file(file_name)
        save_bank(file, guider.net, guider)
        return io.NodeOutput(ui=progress.show_text(cls, f"saved {file.name}"))


PREVIEW_COUNT = 16  # of the generated images


class PPAPGenerateSamples(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGenerateSamples", display_name="Generate Samples", category=CATEGORY,
            description="Images by your own model and the steps that led to them: all that the experts learn from. They are "
                        "kept in output/ppap_samples, so that a run that was stopped goes on where it was, and a finished "
                        "one costs nothing.",
            inputs=[io.Model.Input("model", tooltip="The model that will be steered."),
                    io.Conditioning.Input("positive", tooltip="What the model is asked for."),
                    io.Latent.Input("latent_image", tooltip="An empty latent: the size of the images, and how many are "
                                                            "made at once."),
                    io.String.Input("name", default="samples", tooltip="Name of the folder in output/ppap_samples."),
                    io.Int.Input("count", default=512, min=64, max=100_000, step=64,
                                 tooltip="How many images at least; they come in files of 64."),
                    io.Int.Input("steps", default=20, min=1, max=1000,
                                 tooltip=f"Denoising steps for each image; {STEPS_PER_TRAJECTORY} of them are kept for the "
                                         "experts."),
                    io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                                   tooltip="Classifier-free guidance of the model itself. Neutral: 1."),
                    io.Combo.Input("sampler_name", options=sampler.SAMPLERS, default="euler",
                                   tooltip="The sampling algorithm."),
                    io.Combo.Input("scheduler", options=sampler.SCHEDULERS, default="karras",
                                   tooltip="How the noise falls from step to step."),
                    io.Int.Input("seed", default=0, min=0, max=2**48, tooltip="Image i is made from the noise of seed + i."),
                    io.Conditioning.Input("negative", optional=True,
                                          tooltip="What the model is asked to avoid. Without it, cfg does nothing."),
                    io.Vae.Input("vae", optional=True,
                                 tooltip="The model's VAE, if it works on latents: the untouched network looks at the "
                                         "decoded image.")],
            outputs=[SamplesType.Output(display_name="samples",
                                        tooltip="The images and the steps that led to them, for Distil Experts."),
                     io.Image.Output(tooltip=f"The first {PREVIEW_COUNT} of them.")])

    @classmethod
    def validate_inputs(cls, name):
        return paths.validate(paths.checked_file_name, name)

    @classmethod
    def execute(cls, model, positive, latent_image, name, count, steps, cfg, sampler_name, scheduler, seed, negative=None,
                vae=None):
        space = distillation.space_to_distil(model, vae)
        negative = negative or positive
        about = {**fingerprint.fingerprint_model(model, positive, negative), "vae": fingerprint.fingerprint_vae(vae),
                 "shape": list(latents.resize_empty_latent(model, latent_image).shape), "cfg": cfg, "steps": steps,
                 "sampler": sampler_name, "scheduler": scheduler, "seed": seed}
        samples = Samples(distillation.open_store(name, about), space)
        settings = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, positive, negative)
        SampleGenerator(model, vae, latent_image, settings).fill(samples.store, count)
        return io.NodeOutput(samples, tensors.image_to_comfy(from_uint8(samples.store.images[:PREVIEW_COUNT])))


class PPAPDistilExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPDistilExperts", display_name="Distil Experts", category=CATEGORY,
            description="Teach a network that has only seen clean images to read noisy ones: one small adapter for each "
                        "range of noise, each learning to say while the image is still noise what the untouched network "
                        "says about the finished one. The diffusion model is not run. No labels, no data set. Cancel loses "
                        "nothing: queue it again and it goes on.",
            inputs=[SamplesType.Input("samples", tooltip="Generated images, from Generate Samples."),
                    GuiderType.Input("guider", tooltip="A plain guider; a target is not needed and is kept."),
                    io.Combo.Input("view", options=[*reversed(VIEWS)],
                                   tooltip="What the experts look at: the model's denoised prediction (stronger), or the "
                                           "noisy image itself (as in the paper)."),
                    io.Int.Input("experts", default=5, min=1, max=64,
                                 tooltip="Number of noise ranges; each gets an equal share of the samples' steps."),
                    io.Float.Input("sigma_min", default=0.0, min=0.0, max=1e4, step=0.001,
                                   tooltip="Lowest noise level of the experts. Neutral: 0, the lowest of the samples' "
                                           "steps."),
                    io.Float.Input("sigma_max", default=0.0, min=0.0, max=1e5, step=0.1,
                                   tooltip="Highest noise level of the experts. Neutral: 0, the highest of the samples' "
                                           "steps up to 100, above which there is only noise."),
                    io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Training steps for each expert."),
                    io.Int.Input("batch_size", default=32, min=1, max=4096, tooltip="Images in each training step."),
                    io.Float.Input("learning_rate", default=1e-3, min=0.0, max=1.0, step=1e-5, round=1e-7,
                                   tooltip="Size of the training steps at the start. Neutral: 0, the experts stay the "
                                           "plain network."),
                    io.Int.Input("rank", default=8, min=1, max=512, tooltip="Size of the adapters."),
                    io.Float.Input("alpha", default=8.0, min=0.0, max=1024.0, step=0.5,
                                   tooltip="Scale of the adapters is alpha / rank. Neutral: 0, the experts stay the plain "
                                           "network."),
                    io.Int.Input("seed", default=0, min=0, max=2**48, tooltip="Of steps, images and starting weights."),
                    io.Float.Input("temperature", default=1.0, min=0.05, max=10.0, step=0.05, optional=True,
                                   tooltip="Of the plain network's classes while it teaches: below 1 they are sharper, so "
                                           "that the experts learn to be surer; the paper uses 0.25. Guiders without "
                                           "classes do not use it. Neutral: 1.")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The guider with its experts."),
                     LossesType.Output(display_name="losses", tooltip="The loss of every training step, for Plot Losses.")])

    @classmethod
    def execute(cls, samples, guider, view, experts, sigma_min, sigma_max, steps, batch_size, learning_rate, rank, alpha,
                seed, temperature=1.0):
        schedule = distillation.schedule_for(samples, experts, sigma_min, sigma_max)
        bank = distillation.new_bank(guider, schedule, LoraSpec(rank, alpha), view, seed, samples.space)
        config = DistillConfig(steps, batch_size, learning_rate, seed, temperature=temperature,
                               warm_start=uses_warm_start(view))
        losses = distillation.train_experts(samples, guider, bank, config)
        return io.NodeOutput(with_experts(guider, bank), losses)


NODES = [PPAPGenerateSamples, PPAPDistilExperts, PPAPSaveExperts, PPAPLoadExperts]
