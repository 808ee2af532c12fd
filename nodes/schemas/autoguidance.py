"""Nodes of autoguidance: guide a model with a bad version of itself."""
from comfy_api.latest import io

from ...ppap_core.tinyworld import toy2d
from ...ppap_core.training.finetune import FineTune
from ...ppap_core.viz.plots import loss_plot
from ..bridge import autoguidance, paths, progress, sampler, tensors
from ..bridge.lora_training import LoraTraining
from ..bridge.noise_levels import PercentSchedule
from .inputs import also_found_as, cfg_input, folded, learning_rate_input, negative_input, positive_input, window_inputs

CATEGORY = "PPAP/autoguidance"


def autoguidance_inputs() -> list[io.Input]:
    return [io.Model.Input("model", tooltip="The good model. It stays as it is."),
            io.Model.Input("bad_model",
                           tooltip="A weaker version of it: trained less on the same data, or smaller. An earlier "
                                   "checkpoint, a smaller sibling, or the same model with an earlier or weaker LoRA, which "
                                   "takes only the memory of the LoRAs."),
            io.Float.Input("weight", default=2.0, min=0.0, max=100.0, step=0.05,
                           tooltip="How far to go away from the bad model; 1.5 to 3 is usual. The strength, which the "
                                   "factors below multiply, is the part above 1. Neutral: 1, the bad model does not run."),
            *window_inputs()]


class PPAPAutoguidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAutoguidance", display_name="Autoguidance", category=CATEGORY,
            **also_found_as("autoguidance", "bad version of itself", "weak model guidance", "better images",
                            "CFG alternative", "self guidance SAG"),
            description="Guides a model away from a bad version of itself: better images, with hardly less variety. Works "
                        "with every sampler and together with cfg. Put it after nodes that change CFG.",
            inputs=autoguidance_inputs(),
            outputs=[io.Model.Output(tooltip="The guided model.")])

    @classmethod
    def execute(cls, model, bad_model, weight, start_percent, end_percent, factor_at_start, factor_at_end):
        schedule = PercentSchedule(start_percent, end_percent, factor_at_start, factor_at_end)
        return io.NodeOutput(autoguidance.apply_autoguidance(model, bad_model, weight, schedule))


class PPAPAutoguidanceGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAutoguidanceGuider", display_name="Autoguidance Guider", category=CATEGORY,
            **also_found_as("autoguidance sampler custom", "guider for SamplerCustomAdvanced", "weak model guider",
                            "bad model guider", "dual model guider"),
            description="Autoguidance as a guider for SamplerCustomAdvanced.",
            inputs=[*autoguidance_inputs(), positive_input(), negative_input(), cfg_input()],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")])

    @classmethod
    def execute(cls, model, bad_model, weight, start_percent, end_percent, factor_at_start, factor_at_end, positive,
                negative, cfg):
        schedule = PercentSchedule(start_percent, end_percent, factor_at_start, factor_at_end)
        guided = autoguidance.apply_autoguidance(model, bad_model, weight, schedule)
        return io.NodeOutput(sampler.new_cfg_guider(guided, positive, negative, cfg))


class PPAPTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTrainLora", display_name="Train LoRA", category=CATEGORY,
            **also_found_as("fine-tune", "train a LoRA on images", "make a bad model", "LoRA trainer", "weak LoRA"),
            description="Makes good and bad versions of a model for autoguidance, by fine-tuning a LoRA on images. Many "
                        "steps and a higher rank make the good one; few steps and a lower rank, on the same images, the bad "
                        "one. Early states, after a sixteenth and a quarter of the steps, are saved beside the last one and "
                        "make bad models too. Cancelling loses nothing: queue it again and it resumes.",
            inputs=[io.Model.Input("model", tooltip="The model to fine-tune. It stays as it is."),
                    io.Conditioning.Input("positive", tooltip="What the images show."),
                    io.Latent.Input("latent", tooltip="The images as one batch, encoded by the model's VAE."),
                    io.String.Input("name", default="sibling",
                                    tooltip="Name of the file in models/loras. A file of that name is replaced if this node "
                                            "made it; any other LoRA is kept, and the name refused."),
                    io.Int.Input("steps", default=400, min=1, max=1_000_000, tooltip="Training steps."),
                    io.Int.Input("rank", default=4, min=1, max=512, tooltip="Size of the LoRA."),
                    io.Int.Input("batch_size", default=4, min=1, max=4096, tooltip="Images in each training step.",
                                 **folded()),
                    learning_rate_input("the model stays as it is"),
                    io.Int.Input("seed", default=0, min=0, max=2**48,
                                 tooltip="Seed of the choice of images, the noise and the initial weights.")],
            outputs=[io.Model.Output(tooltip="The model with the LoRA."),
                     io.Image.Output(display_name="losses", tooltip="The loss of the training, as a plot.")])

    @classmethod
    def validate_inputs(cls, name):
        return paths.validate(paths.new_lora_file, name)

    @classmethod
    def execute(cls, model, positive, latent, name, steps, rank, batch_size, learning_rate, seed):
        config = FineTune(steps, rank, batch_size, learning_rate, seed)
        tuned, losses = LoraTraining(model, positive, latent, name, config).run()
        plot = loss_plot({"loss": losses}, "Fine-tuning: error of the denoised prediction")
        return io.NodeOutput(tuned, tensors.image_to_comfy(plot))


class PPAPAutoguidanceToy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAutoguidanceToy", display_name="Autoguidance Toy", category=CATEGORY,
            **also_found_as("autoguidance demo", "why autoguidance works", "guidance toy example", "2D toy",
                            "guidance explained"),
            description="Shows in one picture why autoguidance works: points of the plane that should lie on a tree, "
                        "sampled without guidance, with classifier-free guidance, with classifier-free guidance in an "
                        "interval, and with autoguidance. Trains three small networks on the spot, in less than a minute.",
            inputs=[io.Int.Input("steps", default=2048, min=64, max=100_000, tooltip="Training steps of the good model.")],
            outputs=[io.Image.Output(tooltip="The four panels, with the share of points outside the tree and the share of "
                                             "its branches that are reached.")])

    @classmethod
    def execute(cls, steps):
        panels = toy2d.panels(steps, on_step=progress.ShareProgress())
        return io.NodeOutput(tensors.image_to_comfy(toy2d.picture(panels)))


NODES = [PPAPAutoguidance, PPAPAutoguidanceGuider, PPAPTrainLora, PPAPAutoguidanceToy]
