"""Experts outlive their library: networks are recognised by their values, whatever the next release calls their modules."""
import json
from pathlib import Path

import pytest
import torch
from helpers import disturb, fixed_weights, images, made_up_trajectories, randn, says, small_guider
from helpers.releases import RELEASES, WRITERS, answers, write_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.distill import distill
from ppap_core.experts.lesson import DistillConfig
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.states import NOTE, state_folder
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.io.hashing import digest, weight_digests
from ppap_core.schedules import ExpertSchedule

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

NETWORKS = sorted(file.stem for file in (RELEASES / WRITERS[0]).glob("*.safetensors") if file.stem != "answers")
SCHEDULE = ExpertSchedule((0.1, 1.0, 10.0))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("writer", WRITERS)
def test_experts_of_another_release_answer_as_there(tmp_path, writer: str, name: str):
    """Banks written under transformers 4.57 and 5.24 open under the release that is installed here."""
    pytest.importorskip("transformers")
    guider = load_guider(write_weights(RELEASES / name, tmp_path / name))
    bank = load_bank(RELEASES / writer / f"{name}.safetensors", guider)
    expected = load_file(RELEASES / writer / "answers.safetensors")[name]
    found = answers(guider, bank)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 100 * (found - expected).abs().max(), "the experts do something"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bank_without_digests_opens_by_former_names(tmp_path, name: str):
    """Version 0.1.0 wrote a hash over names: transformers 5 knows what it called them before."""
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__} still has the names of 4.57")
    tensors, header = load_tensors(RELEASES / WRITERS[0] / f"{name}.safetensors")
    file = tmp_path / "old.safetensors"
    save_tensors(file, tensors, {key: value for key, value in header.items() if key not in ("weights", "library")})
    guider = load_guider(write_weights(RELEASES / name, tmp_path / name))
    expected = load_file(RELEASES / WRITERS[0] / "answers.safetensors")[name]
    torch.testing.assert_close(answers(guider, load_bank(file, guider)), expected, rtol=1e-4, atol=1e-4)


class Before(nn.Module):
    """A small network as a library has it in one release."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.norm(self.stem(image)).relu().mean((2, 3))
        return self.classifier(self.query(pooled) * self.key(pooled).sigmoid())


class After(nn.Module):
    """The same network in the next release: other names, in another order."""

    def __init__(self, before: Before):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"k_proj": before.key, "q_proj": before.query})])
        self.embed = nn.Sequential(before.stem, before.norm)
        self.head = nn.ModuleDict({"fc": before.classifier})
        self.register_buffer("table", torch.arange(4))

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.embed(image).relu().mean((2, 3))
        return self.head["fc"](self.blocks[0]["q_proj"](pooled) * self.blocks[0]["k_proj"](pooled).sigmoid())


class Known(nn.Module):
    """The same network under names that its library can take back."""

    def __init__(self, before: Before):
        super().__init__()
        self.a, self.norm, self.b, self.c, self.d = before.children()

    def names_in_files(self) -> dict[str, str]:
        old = dict(a="stem", norm="norm", b="query", c="key", d="classifier")
        return {name: f"{old[name.partition('.')[0]]}.{name.partition('.')[2]}" for name in self.state_dict()}

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.norm(self.a(image)).relu().mean((2, 3))
        return self.d(self.b(pooled) * self.c(pooled).sigmoid())


class Fused(nn.Module):
    """The same network once more, with two layers in one, which no adapter of theirs fits."""

    def __init__(self, before: Before):
        super().__init__()
        self.embed, self.head, self.both = nn.Sequential(before.stem, before.norm), before.classifier, nn.Linear(8, 16)
        self.both.weight.data = torch.cat([before.query.weight, before.key.weight])
        self.both.bias.data = torch.cat([before.query.bias, before.key.bias])

    def forward(self, image: Tensor) -> Tensor:
        query, key = self.both(self.embed(image).relu().mean((2, 3))).chunk(2, 1)
        return self.head(query * key.sigmoid())


def before(**changes: Tensor) -> Before:
    net = fixed_weights(Before()).eval()
    with torch.no_grad():
        for name, value in changes.items():
            net.get_parameter(name.replace("__", ".")).copy_(value)
    return net


def guider_of(net: nn.Module) -> Guider:
    return Guider("small/class", IgnoreSigma(net), Preprocess((12, 16)), "class", tuple("abcde"))


def saved_bank(folder: Path, net: nn.Module) -> tuple[Path, Tensor]:
    """The file of a bank, and what its experts answer."""
    guider, file = guider_of(net), folder / "bank.safetensors"
    bank = ExpertBank(net, SCHEDULE, LoraSpec(rank=2, targets=("stem", "query", "key")))
    for index in range(2):
        disturb(bank, index, seed=10 * index, size=0.4)
    save_bank(file, bank, guider)
    return file, outputs(bank)


def outputs(bank: ExpertBank) -> Tensor:
    image = randn(2, 3, 10, 14)
    with torch.no_grad():
        return torch.stack([bank(image, torch.full((2,), sigma)) for sigma in (0.3, 3.0)])


def test_experts_follow_layers_of_other_names_and_order(tmp_path):
    file, expected = saved_bank(tmp_path, before())
    bank = load_bank(file, guider_of(After(before())))
    assert bank.lora.targets == ("embed.0", "blocks.0.q_proj", "blocks.0.k_proj")
    assert torch.equal(outputs(bank), expected)


def test_experts_go_back_to_the_names_they_came_from(tmp_path):
    file, expected = saved_bank(tmp_path, before())
    renamed = guider_of(After(before()))
    save_bank(tmp_path / "again.safetensors", load_bank(file, renamed), renamed)
    assert torch.equal(outputs(load_bank(tmp_path / "again.safetensors", guider_of(before()))), expected)


def test_layers_of_equal_values_keep_their_order(tmp_path):
    """Two layers that start alike are told apart by their order."""
    equal = {"key__weight": before().query.weight, "key__bias": before().query.bias}
    file, expected = saved_bank(tmp_path, before(**equal))

    class Moved(After):
        def __init__(self, net: Before):
            super().__init__(net)
            self.blocks = nn.ModuleList([nn.ModuleDict({"q_proj": net.query, "k_proj": net.key})])
    assert torch.equal(outputs(load_bank(file, guider_of(Moved(before(**equal)).eval()))), expected)


@pytest.mark.parametrize("name", ["stem.weight", "query.bias", "classifier.weight", "norm.weight", "norm.running_mean"])
def test_a_renamed_network_of_one_other_value_is_refused(tmp_path, name: str):
    file, _ = saved_bank(tmp_path, before())
    other = before()
    other.state_dict()[name].view(-1)[0].add_(1e-6 * 2**8)
    with says(ValueError, "bank.safetensors does not fit", "fingerprint", "distil new ones"):
        load_bank(file, guider_of(After(other)))


def test_a_renamed_network_of_other_classes_is_refused(tmp_path):
    file, _ = saved_bank(tmp_path, before())
    other = before()
    other.classifier = nn.Linear(8, 7)
    with says(ValueError, "does not fit"):
        load_bank(file, guider_of(After(other)))


def test_a_renamed_network_with_a_norm_more_is_the_same(tmp_path):
    """A release keeps a norm that nobody asks for."""
    file, expected = saved_bank(tmp_path, before())
    renamed = After(before())
    renamed.unused = nn.LayerNorm(6)
    assert torch.equal(outputs(load_bank(file, guider_of(renamed.eval()))), expected)


def test_layers_that_became_one_are_refused_with_releases(tmp_path, monkeypatch):
    """The sentence names the release that wrote the experts and the one that is here."""
    monkeypatch.setattr("ppap_core.experts.checkpoint.libraries", lambda net: "some_library 1.0")
    file, _ = saved_bank(tmp_path, before())
    monkeypatch.setattr("ppap_core.experts.checkpoint.libraries", lambda net: "some_library 2.0")
    with says(ValueError, "does not fit", "some_library 1.0", "some_library 2.0"):
        load_bank(file, guider_of(Fused(before())))


def test_a_bank_names_the_release_of_its_library(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", num_classes=5).eval()
    save_bank(tmp_path / "bank.safetensors", ExpertBank(net, SCHEDULE, LoraSpec(rank=1)), guider_of(net))
    assert load_tensors(tmp_path / "bank.safetensors")[1]["library"] == f"timm {timm.__version__}"


def test_digests_in_a_bank_are_those_of_the_plain_weights(tmp_path):
    """Adapters merged into weights do not change what the network is known by."""
    guider = small_guider()
    bank = ExpertBank(base_network(guider), SCHEDULE, LoraSpec(rank=2))
    disturb(bank, 0)
    save_bank(tmp_path / "bank.safetensors", bank, guider)
    header = load_tensors(tmp_path / "bank.safetensors")[1]
    assert bank.adapted.merged and header["weights"] == weight_digests(base_network(guider).state_dict())


# Distillations under way

CONFIG = DistillConfig(steps=8, batch=3, lr=1e-2, seed=4)


class Stopped(Exception):
    pass


class Distillation:
    """A distillation that keeps its states as the node does, under releases that name the layers in their own way."""

    def __init__(self, folder: Path):
        self.folder, self.steps = folder, []
        self.store = SampleStore(folder / "store", {"seed": 0})
        self.store.fill(SHARD_SIZE, lambda seeds: (images(len(seeds), seed=seeds[0]),
                                                   made_up_trajectories(images(len(seeds), seed=seeds[0]), seeds[0])))

    def folder_of(self, fingerprint: str, lora: LoraSpec) -> Path:
        return self.folder / "states" / digest([fingerprint, lora])

    def run(self, net: nn.Module, rank: int = 2, stop: int | None = None, view: str = "noisy") -> ExpertBank:
        """Train until a step, counted over both experts, or to the end."""
        guider = guider_of(net)
        bank = ExpertBank(net, SCHEDULE, LoraSpec(rank), view)
        self.steps = []

        def on_step(index: int, step: int, loss: float) -> None:
            self.steps.append(index * CONFIG.steps + step)
            if stop == self.steps[-1]:
                raise Stopped
        distill(guider, bank, self.store, CONFIG, state_folder(guider, bank, self.folder_of), on_step)
        return bank


@pytest.mark.parametrize("first, second", [(before, lambda: After(before())), (lambda: After(before()), before)],
                         ids=["to the new names", "and back"])
def test_a_distillation_goes_on_under_other_names(tmp_path, first, second):
    """It was stopped in the second expert, and comes to what it would have without a stop."""
    distillation = Distillation(tmp_path)
    with pytest.raises(Stopped):
        distillation.run(first().eval(), stop=11)
    bank = distillation.run(second().eval())
    assert distillation.steps == [12, 13, 14, 15]
    straight = Distillation(tmp_path / "straight").run(first().eval())
    torch.testing.assert_close(outputs(bank), outputs(straight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["another network", "another rank", "half a note", "a note of nothing",
                                    "half a state"])
def test_another_distillation_does_not_go_on(tmp_path, change: str):
    distillation = Distillation(tmp_path)
    with pytest.raises(Stopped):
        distillation.run(before(), stop=11)
    note = next(tmp_path.glob(f"states/*/{NOTE}"))
    if change in ("half a note", "a note of nothing"):
        note.write_text("{" if change == "half a note" else json.dumps(json.loads(note.read_text()) | {"weights": [1]}))
    if change == "half a state":
        for file in note.parent.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-9])
    net = before(stem__bias=torch.ones(8)) if change == "another network" else before()
    distillation.run(After(net).eval(), rank=3 if change == "another rank" else 2)
    assert distillation.steps == list(range(16))


@pytest.mark.parametrize("described", [{"lora": None}, {"lora": [1]}, {"lora": {"targets": None}},
                                       {"lora": {"targets": [1]}}, {"index": 99}, {"index": None}, {"index": "1"}], ids=str)
def test_a_state_of_a_strange_description_begins_anew(tmp_path, described: dict):
    distillation = Distillation(tmp_path)
    with pytest.raises(Stopped):
        distillation.run(before(), stop=11)
    for file in tmp_path.glob("states/*/*.state.safetensors"):
        tensors, header = load_tensors(file)
        save_tensors(file, tensors, header | described)
    distillation.run(After(before()).eval())
    assert distillation.steps == list(range(16))


def test_a_distillation_of_former_names_goes_on(tmp_path):
    """Version 0.1.0 left no note: the library knows what it called the layers before."""
    distillation = Distillation(tmp_path)
    with pytest.raises(Stopped):
        distillation.run(before(), stop=11)
    next(tmp_path.glob(f"states/*/{NOTE}")).unlink()
    distillation.run(Known(before()).eval())
    assert distillation.steps == [12, 13, 14, 15]


def test_a_distillation_of_the_same_names_leaves_no_copy(tmp_path):
    distillation = Distillation(tmp_path)
    with pytest.raises(Stopped):
        distillation.run(before(), stop=5)
    distillation.run(before())
    assert distillation.steps == list(range(6, 16)) and len(list((tmp_path / "states").iterdir())) == 1
