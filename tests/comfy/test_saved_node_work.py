"""Work that the nodes of version 0.1.0 left half-done in ComfyUI's folders is recognised and finished.

A manifest and the names of the states hold fingerprints of the model, the conditioning and all settings: if one of them came
out differently, work would be refused or begun anew.
"""
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

SAVED = Path(__file__).parents[1] / "fixtures" / "nodes"
BANKS = SAVED.parent / "core"
FULL = {"start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0, "factor_at_end": 1.0}
THROUGH = {"gradient": "through the model"}
LAYER = "diffusion_model.joint_blocks.1.x_block.attn.qkv"
LORA = (f"{LAYER}.lora_up.weight", f"{LAYER}.lora_down.weight", f"{LAYER}.alpha")  # what is compared of it


def recorded(name: str) -> Tensor:
    with safe_open(SAVED / "results.safetensors", "pt") as file:
        return file.get_tensor(name)


def alike(found: Tensor, name: str, atol: float) -> None:
    """To rounding: processors and numbers of threads differ in the last bits."""
    torch.testing.assert_close(found.float(), recorded(name).float(), rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


class Graph:
    """The graphs that were run, by their nodes' ids and inputs alone."""

    def __init__(self, comfy: Callable[..., tuple]):
        self.comfy = comfy
        self.pixels, self.nothing, _, self.no_vae = comfy("PPAPTinyWorld", batch_size=1)
        self.flow, self.vae = comfy("PPAPTinyLatentWorld", kind="flow")
        self.star, self.untold = (self.one("PPAPClassConditioning", classes=classes) for classes in ("star", ""))

    def one(self, node: str, **inputs: Any) -> Any:
        return self.comfy(node, **inputs)[0]

    def guider(self, task: str = "class") -> Any:
        return self.one("PPAPLoadGuider", guider_name=f"tinyworld/{task}")

    def aimed(self, guider: Any = None) -> Any:
        return self.one("PPAPAimAtClass", guider=guider or self.guider(), classes="star")

    def rule(self, name: str) -> Any:
        return self.one("PPAPRule", rule=name)

    def experts(self, name: str, task: str) -> Any:
        return self.one("PPAPLoadExperts", guider=self.guider(task), file_name=f"{name}.safetensors")

    def term(self, guider: Any = None, **changes: Any) -> Any:
        return self.one("PPAPGuidanceTerm", **{"guider": guider or self.aimed(), "weight": 0.5, "view": "own",
                                               "strength": "balanced", **FULL, **changes})

    def guided(self, model: Any, *terms: Any, **changes: Any) -> Any:
        for term in terms:
            model = self.one("PPAPApplyGuidance", **{"model": model, "terms": term, "max_rms": 0.3, **changes})
        return model

    def away(self, model: Any, bad: Any, **changes: Any) -> Any:
        return self.one("PPAPAutoguidance", **{"model": model, "bad_model": bad, "weight": 2.0, **FULL, **changes})

    def with_lora(self, strength: float) -> Any:
        return self.one("LoraLoaderModelOnly", model=self.flow, lora_name="sibling_4.safetensors", strength_model=strength)

    def with_depth(self) -> dict[str, Any]:
        """Conditioning under a ControlNet."""
        net = self.one("ControlNetLoader", control_net_name="tinyworld_depth.safetensors")
        positive, negative = self.comfy("ControlNetApplyAdvanced", positive=self.star, negative=self.untold, control_net=net,
                                        image=torch.full((1, 16, 16, 3), 0.5), strength=0.8, start_percent=0.0,
                                        end_percent=0.7, vae=self.vae)
        return {"positive": positive, "negative": negative}

    def samples(self, name: str, count: int = 64, **changes: Any) -> tuple:
        """Samples of the tiny world, 4 x 8 pixels."""
        settings = {"model": self.pixels, "positive": self.nothing, "latent_image": {"samples": torch.zeros(32, 3, 4, 8)},
                    "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "seed": 7}
        return self.comfy("PPAPGenerateSamples", name=name, count=count, **{**settings, **changes})

    def of_latents(self, **changes: Any) -> dict[str, Any]:
        """The settings of samples of the latent tiny world, 2 x 2 places."""
        return {"model": self.flow, "positive": self.star, "negative": self.untold, "vae": self.vae, "cfg": 1.5,
                "scheduler": "simple", "latent_image": {"samples": torch.zeros(32, 16, 2, 2)}, **changes}

    def distilled(self, samples: Any, guider: Any, **changes: Any) -> tuple:
        settings = {"view": "noisy", "experts": 2, "sigma_min": 0.0, "sigma_max": 0.0, "steps": 7, "batch_size": 3,
                    "learning_rate": 1e-2, "rank": 1, "alpha": 2.0, "seed": 5, "temperature": 0.5}
        return self.comfy("PPAPDistilExperts", samples=samples, guider=guider, **{**settings, **changes})

    def weights(self, guider: Any) -> dict[str, Tensor]:
        """The experts of a guider, as Save Experts writes them."""
        import folder_paths

        self.comfy("PPAPSaveExperts", guider=guider, file_name="gone on with")
        return tensors(Path(folder_paths.get_folder_paths("ppap_experts")[0]) / "gone on with.safetensors")[0]

    def lora(self) -> tuple:
        return self.comfy("PPAPTrainLora", model=self.flow, positive=self.star, latent={"samples": recorded("latents")},
                          name="sibling", steps=16, rank=1, batch_size=2, learning_rate=0.01, seed=3)

    def found(self, **changes: Any) -> Tensor:
        settings = {"seed": 3, "steps": 9, "cfg": 1.0, "learning_rate": 0.5, "sigma_max": 5.0, "sigma_min": 0.1,
                    "start_noise": 1.0, "clean_up": 0.0, "particles": 1, "gradient": "in the prediction"}
        return self.comfy("PPAPPlugAndPlayPrior", **{**settings, **changes})[0]["samples"]


def tensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file of the pack, and its description."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()["ppap"])


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def models(comfy) -> Iterator[Path]:
    """Experts and a LoRA of version 0.1.0 among the models."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("ppap_experts")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("denoised_pixel", "denoised_latent"):
        shutil.copy(BANKS / f"{name}.safetensors", folder)
    yield folder
    for name in ("denoised_pixel", "denoised_latent", "gone on with"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def graph(comfy, models: Path) -> Graph:
    graph = Graph(comfy)
    eps = graph.one("PPAPTinyLatentWorld", kind="eps")
    for name, model in (("pixels", graph.pixels), ("flow", graph.flow), ("eps", eps)):
        if not torch.equal(model.get_model_object("model_sampling").sigmas, recorded(f"sigmas.{name}")):
            pytest.skip("this machine rounds ComfyUI's noise levels differently from the one that made the files, and the "
                        "fingerprint of a model holds them to the bit")
    return graph


@pytest.fixture
def output(comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's output and LoRA folders with a copy of what version 0.1.0 left in them."""
    import folder_paths

    before = folder_paths.get_output_directory()
    shutil.copytree(SAVED / "output", tmp_path / "output")
    shutil.copytree(SAVED / "loras", tmp_path / "loras")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    folder_paths.set_output_directory(str(tmp_path / "output"))
    yield tmp_path / "output"
    folder_paths.set_output_directory(before)


@pytest.fixture
def reported(comfy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that a node's progress bar showed."""
    import comfy.utils

    steps = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, value, *args: steps.append(value))
    return steps


# What tells one work from another

MANIFESTS: dict[str, Callable[[Graph], dict[str, Any]]] = {
    "plain": lambda g: {},
    "settings": lambda g: {"cfg": 2.5, "negative": g.nothing, "sampler_name": "heun", "scheduler": "normal", "seed": 2**40},
    "guided": lambda g: {"model": g.guided(g.pixels, g.term())},
    "guided twice": lambda g: {"model": g.guided(g.pixels, g.term(view="noisy"), g.term(strength="raw", weight=4.0))},
    "terms": lambda g: {"model": g.guided(g.pixels, g.term(terms=g.term(
        start_percent=0.1, end_percent=0.8, factor_at_start=2.0, factor_at_end=0.5, mask=torch.ones(1, 4, 8))))},
    "through": lambda g: {"model": g.guided(g.pixels, g.term(**THROUGH))},
    "cut-outs": lambda g: {"model": g.guided(g.pixels, g.term(g.aimed(
        g.one("PPAPCutOuts", guider=g.guider(), count=3))))},
    "number": lambda g: {"model": g.guided(g.pixels, g.term(g.one(
        "PPAPAimAtNumber", guider=g.rule("brightness"), number=0.75)))},
    "rule": lambda g: {"model": g.guided(g.pixels, g.term(g.rule("smoothness")))},
    "depth": lambda g: {"model": g.guided(g.pixels, g.term(g.one(
        "PPAPAimAtImage", guider=g.guider("depth"), image=torch.full((1, 32, 32, 3), 0.25), image_is="a map")))},
    "experts": lambda g: {"model": g.guided(g.pixels, g.term(g.one(
        "PPAPAimAtImage", guider=g.experts("denoised_pixel", "depth"), image=torch.full((1, 32, 32, 3), 0.25),
        image_is="a map")))},
    "autoguidance": lambda g: {"model": g.away(g.pixels, g.one("PPAPTinyWorld", batch_size=1, version="bad sibling"))},
    "latents plain": lambda g: g.of_latents(),
    "latents eps": lambda g: g.of_latents(model=g.one("PPAPTinyLatentWorld", kind="eps"), sampler_name="uni_pc"),
    "latents guided": lambda g: g.of_latents(model=g.guided(g.flow, g.term(), vae=g.vae)),
    "latents experts": lambda g: g.of_latents(model=g.guided(g.flow, g.term(g.aimed(
        g.experts("denoised_latent", "class"))))),
    "latents lora": lambda g: g.of_latents(model=g.with_lora(0.7)),
    "latents siblings": lambda g: g.of_latents(model=g.away(g.with_lora(1.0), g.with_lora(0.3), end_percent=0.9)),
    "latents controlnet": lambda g: g.of_latents(**g.with_depth())}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_recognised(graph: Graph, output: Path, reported: list[int], name: str):
    """Finished images are not generated again: they are those of the shard beside the manifest."""
    folder = output / "ppap_samples" / name
    folder.mkdir()
    manifest = json.loads((SAVED / "manifests.json").read_text(encoding="utf-8"))[name]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.copy(output / "ppap_samples" / "pixels" / "shard_00000.safetensors", folder)
    _, images = graph.samples(name, **MANIFESTS[name](graph))
    shown = tensors(folder / "shard_00000.safetensors")[0]["images"][:16].movedim(1, -1) / 255
    torch.testing.assert_close(images, shown, rtol=0, atol=1e-6)
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest and not reported


def test_all_manifests_differ():
    saved = json.loads((SAVED / "manifests.json").read_text(encoding="utf-8"))
    assert saved.keys() == MANIFESTS.keys()
    assert len({json.dumps(each, sort_keys=True) for each in saved.values()}) == len(saved)


# What goes on

def test_half_generated_samples_go_on(graph: Graph, output: Path, reported: list[int]):
    folder = output / "ppap_samples" / "pixels"
    before = (folder / "shard_00000.safetensors").read_bytes(), (folder / "manifest.json").read_bytes()
    graph.samples("pixels", count=128)
    assert reported == [3 * 64 + 32 * step for step in range(1, 7)], "of 128 images the first 64 were there"
    assert before == ((folder / "shard_00000.safetensors").read_bytes(), (folder / "manifest.json").read_bytes())
    made, about = tensors(folder / "shard_00001.safetensors")
    assert about == {"first": 64}
    assert (made["images"][::9].int() - recorded("samples.images").int()).abs().max() <= 1
    alike(made["sigmas"], "samples.sigmas", 1e-5)
    for name in ("noisy", "denoised"):
        alike(made[name][::9], f"samples.{name}", 4e-3)  # rounding of halves


def test_a_half_done_distillation_goes_on(graph: Graph, output: Path, reported: list[int]):
    """Two experts of the noisy view, of which the second one was being trained."""
    states = files(output / "ppap_distillation")
    guider, losses = graph.distilled(graph.samples("pixels")[0], graph.guider())
    assert reported == [11, 12, 13, 14] and files(output / "ppap_distillation") == states
    alike(torch.tensor(list(losses.values())), "distillation.losses", 1e-3)
    for name, weight in graph.weights(guider).items():
        alike(weight, f"distillation.{name}", 1e-3)


def test_a_half_done_distillation_of_latents_goes_on(graph: Graph, output: Path, reported: list[int]):
    """An expert of the denoised view with its stem."""
    states = files(output / "ppap_distillation")
    samples = graph.samples("latents", **graph.of_latents())[0]
    guider, losses = graph.distilled(samples, graph.guider("depth"), view="denoised", experts=1)
    assert reported == [5, 6, 7] and files(output / "ppap_distillation") == states
    alike(torch.tensor(list(losses.values())), "latent distillation.losses", 1e-3)
    weights = graph.weights(guider)
    for name in ("expert_0.stem.body.4.bias", "expert_0.levels.0.0.lora_A.weight"):
        alike(weights[name], f"latent distillation.{name}", 1e-3)


def test_half_done_training_of_a_lora_goes_on(graph: Graph, output: Path, reported: list[int]):
    """The early state that it wrote stays as it is, and the stock loader reads the LoRA."""
    states, early = files(output / "ppap_training"), (output.parent / "loras" / "sibling_4.safetensors").read_bytes()
    graph.lora()
    assert reported == list(range(10, 17)) and files(output / "ppap_training") == states
    assert files(output.parent / "loras") == {"sibling.safetensors", "sibling_4.safetensors"}
    assert (output.parent / "loras" / "sibling_4.safetensors").read_bytes() == early
    weights = tensors(output.parent / "loras" / "sibling.safetensors")[0]
    for name in LORA:
        alike(weights[name], f"lora.{name}", 1e-3)


def test_a_saved_lora_changes_the_model_as_it_did(graph: Graph, output: Path):
    sampled = graph.comfy("KSampler", model=graph.with_lora(1.0), seed=5, steps=3, cfg=1.0, sampler_name="euler",
                          scheduler="simple", denoise=1.0, positive=graph.star, negative=graph.untold,
                          latent_image={"samples": torch.zeros(2, 16, 4, 6)})[0]["samples"]
    alike(sampled, "lora.sampled", 1e-3)


def masked(graph: Graph) -> dict[str, Any]:
    """Two particles that start from grey and may change the right half."""
    mask = torch.zeros(1, 8, 12)
    mask[..., 6:] = 1
    latent = graph.one("SetLatentNoiseMask", samples={"samples": torch.full((2, 3, 8, 12), 0.25)}, mask=mask)
    return {"model": graph.pixels, "positive": graph.nothing, "negative": graph.nothing, "latent_image": latent,
            "particles": 2, "terms": graph.term(terms=graph.term(graph.rule("smoothness"), strength="raw"))}


def through_latents(graph: Graph) -> dict[str, Any]:
    """Through the model of latents, with a guider that looks through the VAE."""
    return {"model": graph.flow, "positive": graph.star, "negative": graph.untold, "cfg": 2.0, "vae": graph.vae, **THROUGH,
            "latent_image": {"samples": torch.zeros(2, 16, 4, 6)}, "terms": graph.term(**THROUGH), "start_noise": 0.5}


SEARCHES = {"pixels": masked, "latents": through_latents}


@pytest.mark.parametrize("name, first", [("pixels", 6), ("latents", 5)], ids=SEARCHES)
def test_a_half_done_search_goes_on(graph: Graph, output: Path, reported: list[int], name: str, first: int):
    states = files(output / "ppap_prior")
    found = graph.found(**SEARCHES[name](graph))
    assert reported == list(range(first, 10)) and files(output / "ppap_prior") == states
    alike(found, f"search.{name}", 5e-3)
