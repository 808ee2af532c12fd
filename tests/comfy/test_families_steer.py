"""Every kind of network in a real ComfyUI: loaded from its folder by the node, aimed, and steering the stock KSampler."""
import shutil
from pathlib import Path

import pytest
import torch
from helpers.guider_families import FAMILIES, Family
from helpers.worlds import PixelWorld

ROOT = Path(__file__).parents[2]

pytest.importorskip("timm")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def world(comfy) -> PixelWorld:
    return PixelWorld(comfy, batch=4)


def aimed(comfy, world: PixelWorld, guider, family: Family):
    """The guider with a target, by the nodes that people use."""
    if family.aim == "text, mask":
        [guider] = comfy("PPAPAimAtText", guider=guider, text="a star")
    reference = comfy("VAEDecode", samples={"samples": world.sample(seed=77)[:1]}, vae=world.vae)[0]
    node, settings = {
        "class": ("PPAPAimAtClass", {"classes": "star"}), "text": ("PPAPAimAtText", {"text": "a red ring"}),
        "mask": ("PPAPAimAtMask", {"mask": torch.eye(32)[None], "name": ""}), "number": ("PPAPAimAtNumber", {"number": 9.0}),
        "image": ("PPAPAimAtImage", {"image": reference, "image_is": "a picture"})}[family.aim.split(", ")[-1]]
    if family.task == "depth":  # a drawn map, because all pictures look nearly alike to random weights
        settings = {"image": torch.linspace(0, 1, 40)[None, None, :, None].expand(1, 30, 40, 3), "image_is": "a map"}
    return comfy(node, guider=guider, **settings)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_each_kind_steers_the_stock_sampler(comfy, world: PixelWorld, name: str):
    import folder_paths

    family, folder = FAMILIES[name], Path(folder_paths.get_folder_paths("ppap_guiders")[0]) / name
    folder.mkdir(parents=True)
    try:
        family.write(folder)
        [guider] = comfy("PPAPLoadGuider", guider_name=name, answer=family.output)
        guider = aimed(comfy, world, guider, family)
        plain = world.sample(steps=20)
        term = world.term(guider, weight=10000.0, start_percent=0.3)
        guided = world.guided(term, max_rms=0.05, steps=20)  # the limit makes every kind's step alike
        with comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            before, after = (guider.energy(images.clone(), torch.zeros(4)) for images in (plain, guided))
        assert guided.isfinite().all() and after.mean() < before.mean(), (before, after)
        [seen] = comfy("PPAPLookThrough", guider=guider, image=torch.rand(2, 40, 24, 3))
        assert seen.shape[0] == 2 and seen.shape[-1] == 3 and seen.isfinite().all()
    finally:
        shutil.rmtree(folder)


def test_nodes_load_without_timm_and_peft(fresh_process, tmp_path):
    """Every node is registered, and errors name the package to install."""
    FAMILIES["timm ResNet"].write(tmp_path)
    code = f"""
import sys, asyncio; sys.path.insert(0, {{comfyui!r}}); sys.modules["timm"] = sys.modules["peft"] = None
from comfy.cli_args import args; args.cpu = True
import utils.extra_config, nodes
assert asyncio.run(nodes.load_custom_node({{root!r}}))
found = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("PPAP")]
pack = sys.modules[nodes.NODE_CLASS_MAPPINGS["PPAPRule"].__module__.rsplit(".nodes", 1)[0]]
said = []
for action in (lambda: pack.ppap_core.guiders.loaders.load_guider({str(tmp_path)!r}),
               lambda: pack.nodes.bridge.distillation.new_bank(pack.nodes.bridge.guider_cache.load_guider("tinyworld/class"),
                                                   pack.ppap_core.schedules.ExpertSchedule((0.1, 1.0)),
                                                   pack.ppap_core.experts.bank.LoraSpec(), "noisy", 0, None)):
    try:
        action()
    except ImportError as error:
        said.append(str(error))
print(len(found), "|".join(said))
"""
    count, said = fresh_process(code).split(" ", 1)
    assert int(count) == len(list((ROOT / "web" / "docs").glob("PPAP*.md")))
    timm, peft = said.split("|")
    assert "pip install timm>=" in timm and "pip install peft>=" in peft


def test_guiders_lie_in_any_folder_that_comfyui_was_told_of(comfy, tmp_path):
    """`ppap_guiders` in extra_model_paths.yaml adds such a folder."""
    import folder_paths

    FAMILIES["image classifier (ViT)"].write(tmp_path / "elsewhere" / "my classifier")
    folder_paths.add_model_folder_path("ppap_guiders", str(tmp_path / "elsewhere"))
    try:
        assert "my classifier" in comfy.pack.nodes.bridge.guider_cache.guider_sources()
        assert comfy("PPAPLoadGuider", guider_name="my classifier")[0].name == "transformers/my classifier"
    finally:
        folder_paths.get_folder_paths("ppap_guiders").remove(str(tmp_path / "elsewhere"))
