"""Guiders of the benchmark that learn from the model's own images: the core's distillation, variants of it, and PPAP's."""
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ppap_core import (
    TASKS,
    DistillConfig,
    ExpertBank,
    ExpertSchedule,
    LoraSpec,
    SampleStore,
    base_network,
    distill,
    to_vp,
    with_experts,
)
from ppap_core.experts.examine import measure_knowledge
from ppap_core.experts.knowledge import describe_knowledge, remember
from ppap_core.experts.lesson import distill_loss
from ppap_core.experts.pairs import Pairs, trajectory_pairs
from ppap_core.experts.samples import BatchSpec, held_out_count
from ppap_core.noise import expand
from ppap_core.rng import seeded
from ppap_core.training.loop import RunOptions

from . import ppap_reference
from .evaluation import hidden_features
from .fresh_noise import fresh_pairs
from .tiny_world import generate_store, hold_out
from .training import IntervalTraining, Networks, Run, StepReport, Trained, Workspace, options


@dataclass(frozen=True)
class SampledTraining(IntervalTraining):
    """Experts that learn the plain network's outputs on generated images, by default from the steps that led to them."""

    images: int = 4096           # generated images to learn from
    guided: float = 0.0          # normalized weight of the plain guider, aimed at random scenes, while they are generated
    ranks: tuple[int, ...] = ()  # of each expert where they differ, none above `rank`
    temperature: float = 1.0     # of the teacher's classes

    def store(self, workspace: Workspace) -> SampleStore:
        folder = workspace.folder / f"samples_{workspace.steps}_{self.images}"
        return generate_store(workspace.world, folder, self.images, workspace.steps, workspace.report, self.guided)

    def network(self, base: nn.Module) -> ExpertBank:
        bank = ExpertBank(base, self.schedule, LoraSpec(self.rank, self.rank, self.targets), self.view)
        for index, rank in enumerate(self.ranks):
            limit_rank(bank, index, rank)
        return bank

    def trainable_share(self, net: "ExpertBank | Networks") -> float:
        share = net.trainable_share()
        return share * sum(self.ranks) / len(self.ranks) / self.rank if self.ranks else share

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        """A batch of trajectory steps, as the core's distillation draws it."""
        return trajectory_pairs(run.images, self.schedule, index, BatchSpec(step, self.batch), self.view)

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        return distill_loss(run.world.guider, run.bank, self.pairs(run, index, step).to(run.world.device), self.temperature)


@dataclass(frozen=True)
class Distillation(SampledTraining):
    """The core's distillation. varied: with variants of the images and fast, as in its presets. patience: as theirs."""

    varied: bool = False
    patience: int = 0

    def fit(self, run: Run) -> None:
        if self.patience:
            hold_out(run.world, run.images, held_out_count(self.images))
        config = DistillConfig(self.steps, self.batch, self.lr, temperature=self.temperature, warm_start=self.warm_start,
                               fast=self.varied, varied=self.varied, patience=self.patience)
        distill(run.world.guider, run.bank, run.images, config, run.folder,
                StepReport(run.report, len(self.schedule), self.steps))


@dataclass(frozen=True)
class NeededExperts(Distillation):
    """The core's distillation, and then the plain network where held-out images show that no expert is needed.

    It shares its training with `Distillation`.
    """

    marks: ClassVar[dict[str, Any]] = {"where_needed": True}

    def make(self, workspace: Workspace) -> Trained:
        world, training = workspace.world, Distillation(**vars(self))
        trained, store = training.make(workspace), training.store(workspace)
        hold_out(world, store, held_out_count(self.images))
        bank = trained.guider.net
        assert isinstance(bank, ExpertBank)
        remember(bank, measure_knowledge(world.guider, bank, store))
        workspace.report(describe_knowledge(bank))
        return trained


@dataclass(frozen=True)
class FreshNoise(SampledTraining):
    """The paper's pairs (Go et al. 2023): images, some mirrored, under noise that is drawn anew."""

    marks: ClassVar[dict[str, Any]] = {"fresh_noise": True}

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        view = to_vp if self.view == "noisy" else run.world.denoise
        return fresh_pairs(run.images, self.schedule, index, BatchSpec(step, self.batch), view, run.world.device)


@dataclass(frozen=True)
class RepeatedNoise(SampledTraining):
    """Several draws of fresh noise for each output of the teacher, in the noisy view."""

    draws: int = 1

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        world, generator, count = run.world, seeded(0, index, step), self.batch // self.draws
        images = run.images.random_images(BatchSpec(step, count, index * 2**64)).to(world.device)
        sigma = self.schedule[index].sample(count * self.draws, generator).to(world.device)
        teacher = world.plain_output(images).repeat_interleave(self.draws, 0)
        images = images.repeat_interleave(self.draws, 0)
        noise = torch.randn(images.shape, generator=generator).to(world.device)
        student = with_experts(world.guider, run.bank).predict(to_vp(images + expand(sigma, images) * noise, sigma), sigma)
        return TASKS[world.guider.task].distance(student, teacher)


@dataclass(frozen=True)
class Jitter(SampledTraining):
    """Noise on the experts' inputs, of std `jitter` at high noise levels and less at low ones."""

    jitter: float = 0.0

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        pairs = super().pairs(run, index, step)
        noise = torch.randn(pairs.inputs.shape, generator=seeded(0, index, step, 1))
        return pairs._replace(inputs=pairs.inputs + self.jitter * to_vp(expand(pairs.sigma, noise) * noise, pairs.sigma))


@dataclass(frozen=True)
class FeatureDistillation(SampledTraining):
    """Features before the head are distilled too. features: weight of their error in the loss; 0: the outputs alone."""

    features: float = 0.0

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        pairs = self.pairs(run, index, step).to(run.world.device)
        preprocess, base = run.world.guider.preprocess, base_network(run.world.guider)
        with torch.no_grad():
            teacher = hidden_features(base, preprocess(pairs.images))
        run.bank.select(index)
        student = hidden_features(run.bank.net, preprocess(pairs.inputs))
        error = (student - teacher).square().mean(1) / teacher.square().mean(1)
        return distill_loss(run.world.guider, run.bank, pairs) + self.features * error


@dataclass(frozen=True)
class PpapReference(SampledTraining):
    """Distillation as the released code of PPAP does it, see `ppap_reference`."""

    marks: ClassVar[dict[str, Any]] = {"original": True}

    @property
    def schedule(self) -> ExpertSchedule:
        return ppap_reference.schedule()

    def network(self, base: nn.Module) -> ExpertBank:
        return ExpertBank(base, self.schedule, LoraSpec(ppap_reference.RANK, ppap_reference.ALPHA), "noisy")

    def fit(self, run: Run) -> None:
        report = StepReport(run.report, 1, self.steps * len(self.schedule)).of_interval(0)
        ppap_reference.train(base_network(run.world.guider), run.bank, partial(self._loss_of, run), self.steps, self.lr,
                             RunOptions({"training": options(self)}, run.folder / "bank.state.safetensors", on_step=report))

    def _loss_of(self, run: Run, net: ExpertBank, index: int, step: int) -> Tensor:
        return self.mean_loss(run._replace(net=net), index, step)

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        return ppap_reference.pairs(run.images, len(self.schedule), index, step, self.batch)

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        return distill_loss(run.world.guider, run.bank, self.pairs(run, index, step).to(run.world.device),
                            ppap_reference.TEMPERATURE)


def limit_rank(bank: ExpertBank, index: int, rank: int) -> None:
    """Leave an expert only this rank: rows of an adapter that are zero on both sides never learn."""
    weights = {name: weight.clone() for name, weight in bank.weights(index).items()}
    for name, weight in weights.items():
        if ".lora_A" in name:
            weight[rank:] = 0
    bank.load(index, weights)
