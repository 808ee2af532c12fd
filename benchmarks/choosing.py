"""Choosing against guiding at equal passes of the model: best of several, best seeds, particles, guidance, and both."""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core import Denoiser, GuidanceSettings, Guider, Prediction, Term, guided, sample_euler
from ppap_core.guidance.choice import Choice
from ppap_core.guidance.particles import Resampling, best_rows, first_noise, sample_particles
from ppap_core.guidance.prior import repeat_term
from ppap_core.schedules import falling

from .evaluation import Evaluator
from .few_steps import FewStepWorld, load_few_step_world
from .report import Column, Report, cached_json, markdown
from .report import Row as Result
from .tiny_world import NOISE, TinyWorld, load_world
from .training import config_hash
from .world import Wanted


@dataclass(frozen=True)
class Way:
    """A way to make an image: how it is guided, how many candidates there are, and how they are given up."""

    name: str
    steps: int = 16
    guidance: str = ""       # "": none; "prediction", or "through" the model
    looked: int = 0          # candidates that are sampled in `ahead` steps first, of which the best starts again; 0: none
    ahead: int = 4
    particles: Resampling = Resampling()
    scorer: str = ""         # without a gradient: "answer", right or wrong alone, "rounded" to whole nats; "": as it is
    world: str = "pixels"    # or "latents"
    decoded: bool = False    # whether latents are judged through their decoder, not by their linear colours

    @property
    def passes(self) -> int:
        """Passes of the model for an image; a pass back counts as one."""
        each = 2 if self.guidance == "through" else 1
        return each * (self.looked * self.ahead + self.particles.count * self.steps)


@dataclass(frozen=True)
class ChoosingBench:
    """Everything that a result depends on, besides the weights of the world."""

    images: int = 128
    scenes: int = 2048       # real ones for Frechet distances
    prediction: float = 0.6  # weight
    through: float = 0.3


BEST, PARTICLES = Resampling(4, 0.0), Resampling(4)
IN_BOTH = (
    Way("unguided"),
    Way("best of 4", particles=BEST),
    Way("best seed of 12", looked=12),
    Way("particles", particles=PARTICLES),
    Way("guidance", guidance="prediction"),
    Way("guidance, best of 4", particles=BEST, guidance="prediction"),
    Way("guidance, particles", particles=PARTICLES, guidance="prediction"),
    Way("in whole nats, particles", particles=PARTICLES, scorer="rounded"),
    Way("guidance through the model", guidance="through"),
)
WAYS = (
    *IN_BOTH,
    Way("guidance in 64 steps", steps=64, guidance="prediction"),
    Way("particles, all from the best", particles=Resampling(4, 1.0)),
    Way("right or wrong, particles", particles=PARTICLES, scorer="answer"),
    Way("guidance through the model, best of 2", particles=Resampling(2, 0.0), guidance="through"),
    *(replace(way, name=f"in latents: {way.name}", world="latents") for way in IN_BOTH),
    Way("in latents: particles, decoded", particles=PARTICLES, world="latents", decoded=True),
    Way("in latents: guidance, best of 4, decoded", particles=BEST, guidance="prediction", world="latents", decoded=True),
)
WORLDS: dict[str, Callable[[], TinyWorld | FewStepWorld]] = {"pixels": load_world,
                                                             "latents": partial(load_few_step_world, "flow")}


@dataclass(frozen=True)
class Coarse:
    """Logits of a classifier without a gradient: reduced to its answer, or rounded to whole numbers."""

    guider: Guider
    scorer: str

    def __call__(self, image: Tensor, sigma: Tensor) -> Tensor:
        logits = self.guider.net(image, sigma)
        if self.scorer == "answer":
            return 100.0 * torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()
        return logits.log_softmax(1).round()


@dataclass(frozen=True)
class Run:
    """One way in a world."""

    world: TinyWorld | FewStepWorld
    bench: ChoosingBench
    way: Way

    def terms(self, wanted: Wanted) -> list[Term]:
        """What guides and chooses."""
        through = self.way.guidance == "through"
        guider = self.world.aimed(self.world.guider, wanted)
        guider = replace(guider, net=Coarse(guider, self.way.scorer)) if self.way.scorer else guider
        sigmas = self.world.start([0], self.way.steps)[1]
        weight = self.bench.through if through else self.bench.prediction
        return [Term(guider, weight, falling(sigmas.tolist()), normalized=True, backprop_through_model=through)]

    def denoiser(self, terms: Sequence[Term], count: int) -> Denoiser:
        """The model for so many particles of each image."""
        guiding = [repeat_term(term, count) for term in terms] if self.way.guidance else []
        return guided(self.world.denoise, guiding, GuidanceSettings(sigma_data=self.world.sigma_data))

    def choice(self, terms: Sequence[Term], count: int) -> Choice:
        """What chooses among so many particles of each image."""
        if self.way.decoded:
            terms = [replace(term, guider=replace(term.guider, decode=self._decode)) for term in terms]
        return Choice(terms, count)

    def _decode(self, latents: Tensor, sigma: Tensor) -> Tensor:
        assert isinstance(self.world, FewStepWorld)
        return self.world.decode(latents)

    def sample(self, numbers: Sequence[int], wanted: Wanted) -> Tensor:
        """An image for each number."""
        seeds, terms, count = [NOISE + number for number in numbers], self.terms(wanted), self.way.particles.count
        start, sigmas = self.world.start(seeds, self.way.steps)
        noise = start / sigmas[0]
        if self.way.looked:
            noise = self._best_noise(noise, seeds, terms)
        return sample_particles(self.denoiser(terms, count), self.choice(terms, count), noise, sigmas, self.way.particles,
                                seeds, self.world.sigma_data)

    def _best_noise(self, noise: Tensor, seeds: Sequence[int], terms: Sequence[Term]) -> Tensor:
        """Of several noises for each image the one that leads to the best one in few steps."""
        every = first_noise(noise, self.way.looked, seeds)
        sigmas = self.world.start(seeds[:1], self.way.ahead)[1]
        images = sample_euler(self.denoiser(terms, self.way.looked), every * sigmas[0], sigmas)
        clean = images.new_zeros(len(images))
        return every[best_rows(self.choice(terms, self.way.looked)(Prediction(images, clean, images)))]

    def result(self, evaluator: Evaluator) -> Result:
        """Measurements, by judges that never guide and never choose."""
        scores = evaluator.evaluate(self.sample, range(self.bench.images))
        return {"way": self.way.name, "passes": self.way.passes, **asdict(scores)}


def choosing_bench(bench: ChoosingBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Result]:
    """A row for each way; finished ones are read from the folder.

    only: names of the ways to run; (): all. ValueError for a name that no way has.
    """
    if unknown := {*only} - {way.name for way in WAYS}:
        raise ValueError(f"there is no way '{min(unknown)}': expected some of {'; '.join(way.name for way in WAYS)}")
    rows = []
    for name, load in WORLDS.items():
        ways = [way for way in WAYS if way.world == name and (not only or way.name in only)]
        if not ways:
            continue
        world = load()
        evaluator = world.evaluator(bench.scenes)
        for way in ways:
            file = config_hash({"bench": str(bench), "way": str(replace(way, name=""))})
            rows.append(cached_json(folder / f"{file}.json", partial(Run(world, bench, way).result, evaluator)))
            report(f"{rows[-1]}")
    return rows


COLUMNS = (Column("way", "{way}", numeric=False), Column("passes", "{passes}"), Column("right class", "{score:.1%}"),
           Column("by the second judge", "{second_score:.1%}"), Column("by the guider", "{own_score:.1%}"),
           Column("Fréchet", "{frechet:.3g}"), Column("precision", "{precision:.2f}"), Column("recall", "{recall:.2f}"))


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, rows)
