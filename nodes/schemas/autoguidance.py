"""Nodes of autoguidance: guide a model with a bad version of itself."""
from comfy_api.latest import io

from ...ppap_core.tinyworld import toy2d
from ...ppap_core.training.finetune import FineTune
from ...ppap_core.viz.plots import loss_plot
from ..bridge import paths, progress, sampler, tensors
from ..bridge.autoguidance import apply_autoguidance
from ..bridge.lora_training import LoraTraining
from ..bridge.noise_levels import PercentSchedule

CATEGORY = "PPAP/autoguidance"


def guidance_inputs() -> list[io.Input]:
    return [io.Model.Input("model", tooltip="The good model."),
            io.Model.Input("bad_model",
                           tooltip="A weaker version of it: less trained or smaller, by the same data. An earlier "
                                   "checkpoint, a smaller sibling, or the same model with an earlier or weaker LoRA, "
                                   "which costs the memory of the LoRAs only."),
            io.Float.Input("weight", default=2.0, min=0.0, max=100.0, step=0.05,
                           tooltip="How far away from the bad model; 1.5 to 3 is usual. Neutral: 1, the bad model is not "
                                   "even asked."),
            io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                           tooltip="Share of the noise schedule at which it begins. Neutral: 0, from the start."),
            io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                           tooltip="Share of the noise schedule at which it ends. Neutral: 1, to the end."),
            io.Float.Input("factor_at_start", default=1.0, min=0.0, max=100.0, step=0.05,
                           tooltip="Multiplies what the weight has above 1 at start_percent. Neutral: 1."),
            io.Float.Input("factor_at_end", default=1.0, min=0.0, max=100.0, step=0.05,
                           tooltip="The same at end_percent; in between it changes evenly. Neutral: 1.")]


class PPAPAutoguidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAutoguidance", display_name="Autoguidance", category=CATEGORY,
            description="A model that is guided away from a bad version of itself: better images, and hardly fewer kinds "
                        "of them. For every sampler; cfg goes on working beside it. Put it after nodes that change CFG.",
            inputs=guidance_inputs(),
            outputs=[io.Model.Output(tooltip="The guided model; the ones that came in stay as they were.")])

    @classmethod
    def execute(cls, model, bad_model, weight, start_percent, end_percent, factor_at_start, factor_at_end):
        schedule = PercentSchedule(start_percent, end_percent, factor_at_start, factor_at_end)
        return io.NodeOutput(apply_autoguidance(model, bad_model, weight, schedule))


class PPAPAutoguidanceGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAutoguidanceGuider", display_name="Autoguidance Guider", category=CATEGORY,
            description="Autoguidance as a guider for SamplerCustomAdvanced.",
            inputs=[*guidance_inputs(),
                    io.Conditioning.Input("positive", tooltip="What both models are asked for."),
                    io.Conditioning.Input("negative", tooltip="What the good model is asked to avoid, if cfg is not 1."),
                    io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                                   tooltip="Classifier-free guidance beside it. Neutral: 1.")],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")])

    @classmethod
    def execute(cls, model, bad_model, weight, start_percent, end_percent, factor_at_start, factor_at_end, positive,
                negative, cfg):
        schedule = PercentSchedule(start_percent, end_percent, factor_at_start, factor_at_end)
        guided = apply_autoguidance(model, bad_model, weight, schedule)
        return io.NodeOutput(sampler.new_cfg_guider(guided, positive, negative, cfg))


class PPAPTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTrainLora", display_name="Train LoRA", category=CATEGORY,
            description="Siblings for autoguidance: fine-tune a model on images by a LoRA. Many steps and a higher rank "
                        "make the good one, few steps and a lower rank on the same images the bad one. Early states, after "
                        "a sixteenth and a quarter of the steps, are saved beside the last one and make bad models too. "
                        "Cancel loses nothing: queue it again and it goes on.",
            inputs=[io.Model.Input("model", tooltip="What is fine-tuned."),
                    io.Conditioning.Input("positive", tooltip="What the images show."),
                    io.Latent.Input("latent", tooltip="The images, encoded by the model's VAE, as one batch."),
                    io.String.Input("name", default="sibling",
                                    tooltip="Name of the file in models/loras. What this node made under the same name "
                                            "is replaced, any other LoRA stays."),
                    io.Int.Input("steps", default=400, min=1, max=1_000_000, tooltip="Training steps."),
                    io.Int.Input("rank", default=4, min=1, max=512, tooltip="Size of the LoRA."),
                    io.Int.Input("batch_size", default=4, min=1, max=4096, tooltip="Images in each training step."),
                    io.Float.Input("learning_rate", default=1e-3, min=0.0, max=1.0, step=1e-5, round=1e-7,
                                   tooltip="Size of the training steps at the start. Neutral: 0, the model stays as it "
                                           "is."),
                    io.Int.Input("seed", default=0, min=0, max=2**48, tooltip="Of images, noise and starting weights.")],
            outputs=[io.Model.Output(tooltip="The model with the LoRA."),
                     io.Image.Output(display_name="losses", tooltip="The loss of the training, as a plot.")])

    @classmethod
    def validate_inputs(cls, name):
        return paths.validate(paths.new_lora_file, name)

    @classmethod
    def execute(cls, model, positive, latent, name, steps, rank, batch_size, learning_rate, seed):
        config = FineTune(steps, rank, batch_size, learning_rate, seed)
        tuned, losses = LoraTraining(model, positive, latent, name, config).run()
        return io.NodeOutput(tuned, tensors.image_to_comfy(loss_plot({"loss": losses}, "Fine-tuning: error of the "
                                                                                      "denoised prediction")))


class PPAPAutoguidanceToy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPAutoguidanceToy", display_name="Autoguidance Toy", category=CATEGORY,
            description="Why it works, in one picture: points of the plane that should lie on a tree, without guidance, "
                        "by classifier-free guidance, by that in an interval, and by autoguidance. Trains three small "
                        "networks on the spot, in less than a minute.",
            inputs=[io.Int.Input("steps", default=2048, min=64, max=100_000, tooltip="Training steps of the good model.")],
            outputs=[io.Image.Output(tooltip="The four panels, with the share of points outside the tree and of its "
                                             "branches that are met.")])

    @classmethod
    def execute(cls, steps):
        report = progress.ShareProgress()
        return io.NodeOutput(tensors.image_to_comfy(toy2d.picture(toy2d.panels(steps, on_step=report))))


NODES = [PPAPAutoguidance, PPAPAutoguidanceGuider, PPAPTrainLora, PPAPAutoguidanceToy]
