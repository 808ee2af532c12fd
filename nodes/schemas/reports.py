"""Nodes that show: losses, what guidance did, and what a guider sees."""
from comfy_api.latest import io, ui

from ...ppap_core.guiders.visualize import visualize
from ...ppap_core.viz.plots import guidance_plot, loss_plot
from ..bridge import comparisons, guider_cache, intervals, progress, reports, tensors
from .inputs import also_found_as, scheduler_input
from .io_types import GuiderType, LossesType, ReportType, TermsType

CATEGORY = "PPAP/reports"
MORE_IMAGES = "More images, for the next cell."


class PPAPPlotLosses(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPlotLosses", display_name="Plot Losses", category=CATEGORY,
            **also_found_as("loss graph", "training curve", "loss plot", "visualize training", "how well experts learned"),
            description="Shows how well each expert learned: one line for each range of noise, lower is better.",
            inputs=[LossesType.Input("losses", tooltip="From Distill Experts.")],
            outputs=[io.Image.Output(tooltip="The plot.")])

    @classmethod
    def execute(cls, losses):
        return io.NodeOutput(tensors.image_to_comfy(loss_plot(losses)))


class PPAPPlotGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPlotGuidance", display_name="Plot Guidance", category=CATEGORY,
            **also_found_as("guidance graph", "guidance curve", "visualize guidance", "energy plot", "guidance plot"),
            description="Shows what guidance did, step by step: the energy of each term (lower is closer to the target) and "
                        "the size of its shift.",
            inputs=[ReportType.Input("report", tooltip="From Guided KSampler or Guidance Report.")],
            outputs=[io.Image.Output(tooltip="The plot.")])

    @classmethod
    def execute(cls, report):
        return io.NodeOutput(tensors.image_to_comfy(guidance_plot(report.names, report.records)))


class PPAPPlotIntervals(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPPlotIntervals", display_name="Plot Intervals", category=CATEGORY, is_output_node=True,
            **also_found_as("which expert works when", "noise ranges", "interval editor", "guidance schedule",
                            "visualize steps"),
            description="Shows which expert works at which step and how strongly each term guides there, before anything is "
                        "sampled; and how experts that are only planned would share the steps.",
            inputs=[io.Model.Input("model", tooltip="The model that is sampled, whose noise levels are shown."),
                    io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of denoising steps."),
                    scheduler_input(),
                    io.String.Input("edges", default="", tooltip="To plan experts: the noise levels between them, ascending "
                                                                 "and separated by commas, such as 0.3, 1, 4 for four. "
                                                                 "Distill Experts takes the same text. Neutral: empty."),
                    TermsType.Input("terms", optional=True, tooltip="From Guidance Term; each has a row of its own."),
                    io.Sigmas.Input("sigmas", optional=True,
                                    tooltip="The noise levels of the steps, in place of scheduler and steps.")],
            outputs=[io.Image.Output(tooltip="The picture.")])

    @classmethod
    def execute(cls, model, steps, scheduler, edges, terms=(), sigmas=None):
        levels = intervals.levels_of(model, scheduler, steps) if sigmas is None else sigmas
        picture = tensors.image_to_comfy(intervals.plot_intervals(model, terms, edges, levels))
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture))


class PPAPReadGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPReadGuidance", display_name="Guidance Summary", category=CATEGORY, is_output_node=True,
            **also_found_as("Read Guidance", "what guidance did", "guidance in words", "show text report",
                            "guidance debug"),
            description="Says what guidance did in words: in how many steps each term acted, its energy at first and at "
                        "last (lower is closer to the target), and how far it moved the image.",
            inputs=[ReportType.Input("report", tooltip="From Guided KSampler or Guidance Report.")],
            outputs=[io.String.Output(display_name="text", tooltip="One line for each term.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, report):
        text = report.summary()
        return io.NodeOutput(text, ui=progress.show_text(cls, text))


class PPAPGuidanceReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPGuidanceReport", display_name="Guidance Report", category=CATEGORY,
            **also_found_as("guidance log", "guidance statistics", "did guidance work", "inspect guidance",
                            "guidance debug"),
            description="Reports what guidance did while a sampler made this latent with this guided model.",
            inputs=[io.Model.Input("model", tooltip="The guided model, from Apply Guidance."),
                    io.Latent.Input("latent", tooltip="A latent that a sampler made with it.")],
            outputs=[ReportType.Output(display_name="report", tooltip="For Plot Guidance and Guidance Summary.")])

    @classmethod
    def execute(cls, model, latent):
        report = reports.report_of(model, latent)
        return io.NodeOutput(report, ui=progress.show_note(report.warnings()))


class PPAPLookThrough(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLookThrough", display_name="Preview Guider", category=CATEGORY,
            **also_found_as("Look Through", "what the guider sees", "depth preview", "classify an image",
                            "segmentation preview", "tag an image", "aesthetic score"),
            description="Shows what a guider sees in images: how likely each class is, a depth map, coloured regions, a "
                        "mask, the number it measures, or how close the image is to its target.",
            inputs=[GuiderType.Input("guider", tooltip="Any guider. A target is needed only to show how close an image is "
                                                       "to it."),
                    io.Image.Input("image", tooltip="Images without noise.")],
            outputs=[io.Image.Output(tooltip="One picture for each image.")])

    @classmethod
    def execute(cls, guider, image):
        pictures = visualize(guider, tensors.image_from_comfy(image).to(guider_cache.load_to_device(guider)))
        return io.NodeOutput(tensors.image_to_comfy(pictures))


class PPAPImageGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPImageGrid", display_name="Image Grid", category=CATEGORY, is_input_list=True,
            **also_found_as("XY plot", "compare images", "labeled grid", "contact sheet", "comparison grid"),
            description="Lays images out in rows and columns with labels, to compare them: of several samplers, or of one "
                        "that ran several times after Compare Terms.",
            inputs=[io.Image.Input("images", tooltip="Each batch is a cell, with its images side by side. A single batch "
                                                     "fills a cell with each of its images."),
                    io.String.Input("row_labels", default="", multiline=True,
                                    tooltip="A line for each row. Neutral: empty, none."),
                    io.String.Input("column_labels", default="", multiline=True,
                                    tooltip="A line for each column; there are as many columns as lines. Neutral: empty, "
                                            "one column."),
                    io.Image.Input("images_2", optional=True, tooltip=MORE_IMAGES),
                    io.Image.Input("images_3", optional=True, tooltip=MORE_IMAGES),
                    io.Image.Input("images_4", optional=True, tooltip=MORE_IMAGES),
                    io.Image.Input("images_5", optional=True, tooltip=MORE_IMAGES),
                    io.Image.Input("images_6", optional=True, tooltip=MORE_IMAGES),
                    io.Image.Input("images_7", optional=True, tooltip=MORE_IMAGES),
                    io.Image.Input("images_8", optional=True, tooltip=MORE_IMAGES)],
            outputs=[io.Image.Output(tooltip="The grid.")])

    @classmethod
    def execute(cls, images, row_labels, column_labels, images_2=(), images_3=(), images_4=(), images_5=(), images_6=(),
                images_7=(), images_8=()):
        lists = images, images_2, images_3, images_4, images_5, images_6, images_7, images_8
        batches = [batch for several in lists for batch in several or ()]
        return io.NodeOutput(comparisons.grid_of(batches, "\n".join(row_labels), "\n".join(column_labels)))


NODES = [PPAPPlotLosses, PPAPPlotGuidance, PPAPPlotIntervals, PPAPReadGuidance, PPAPGuidanceReport, PPAPLookThrough,
         PPAPImageGrid]
