"""No network is asked while a guider is loaded, whatever its config.json names; only a download may."""
import json
import threading
from pathlib import Path

import pytest
import torch
from helpers import says
from helpers.guider_families import (
    FAMILIES,
    IMAGENET,
    MASKS,
    NAMED,
    STAGES,
    SWIN,
    aimed,
    config,
    hf_net,
    photographs,
    processor,
)
from helpers.hub import REPO, serving
from helpers.network import forbid_network

from ppap_core.guiders.guider import clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.offline import offline

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

pytest.importorskip("timm")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_asks_the_network(name: str, tmp_path, monkeypatch):
    """Loading, reading a text and predicting need no network."""
    attempts = forbid_network(monkeypatch)
    FAMILIES[name].write(tmp_path)
    guider = aimed(load_guider(tmp_path, FAMILIES[name].output), FAMILIES[name])
    guider.energy(photographs(), clean(photographs()))
    assert not attempts


DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 7, "use_timm_backbone": False,
        "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": config("ResNetConfig", embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4,
                                  out_features=STAGES)}
WRITERS = {
    "MaskFormer": hf_net("MaskFormerForInstanceSegmentation", config(
        "MaskFormerConfig", backbone_config=config("SwinConfig", **SWIN), decoder_config=config("DetrConfig", **DETR),
        fpn_feature_size=32, mask_feature_size=MASKS["hidden_dim"], **NAMED),
        processor("MaskFormer", size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32, do_normalize=True,
                  **IMAGENET)),
    "UperNet on timm": hf_net("UperNetForSemanticSegmentation", config(
        "UperNetConfig", backbone_config=config("TimmBackboneConfig", backbone="resnet10t", out_indices=[1, 2, 3, 4],
                                                use_pretrained_backbone=False),
        hidden_size=16, use_auxiliary_head=False, **NAMED), processor("Segformer", 64, **IMAGENET)),
    **{name: FAMILIES[name].write for name in ("Depth Anything", "DPT depth", "Mask2Former", "DINOv2", "ZoeDepth",
                                               "UperNet")}}
IN_4_57 = {"backbone": "resnet50", "use_timm_backbone": True, "use_pretrained_backbone": True, "backbone_config": None,
           "backbone_kwargs": {"in_chans": 3, "out_indices": [1, 2, 3, 4]}}
NAMES_TIMM = {**IN_4_57, "backbone": "resnet10t", "backbone_kwargs": {"out_indices": [1, 2, 3, 4]}}
NAMES_HUB = {"backbone": "some-one/some-backbone", "use_pretrained_backbone": True}


def edit(folder: Path, part: str = "", **changes) -> None:
    said = json.loads((folder / "config.json").read_text())
    (said[part] if part else said).update(changes)
    (folder / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(("name", "part", "changes"), [
    ("MaskFormer", "decoder_config", IN_4_57),
    ("MaskFormer", "", {"use_pretrained_backbone": True}),
    ("UperNet on timm", "backbone_config", {"use_pretrained_backbone": True}),
    ("UperNet on timm", "", NAMES_TIMM),
    ("UperNet on timm", "", {**NAMES_TIMM, "backbone": "timm/resnet10t.c3_in1k", "use_timm_backbone": False}),
    ("UperNet", "", {"use_pretrained_backbone": True}),
    ("Depth Anything", "", NAMES_HUB), ("DPT depth", "", {"use_pretrained_backbone": True}), ("ZoeDepth", "", NAMES_HUB),
    ("Mask2Former", "", NAMES_HUB),
    ("DINOv2", "", {"attn_implementation": "some-one/fast-attention", "_attn_implementation": "some-one/fast-attention"}),
], ids=["decoder as 4.57 saves it", "MaskFormer", "timm backbone with weights", "timm backbone by name", "timm page by name",
        "UperNet",
        "name beside settings", "DPT", "ZoeDepth", "Mask2Former", "kernels"])
def test_a_named_backbone_is_not_fetched(name: str, part: str, changes: dict, tmp_path, monkeypatch):
    """The network is that of the folder as it was, and the hub is not asked."""
    attempts = forbid_network(monkeypatch)
    WRITERS[name](tmp_path)
    image = photographs()
    plain = load_guider(tmp_path).predict(image, clean(image))
    edit(tmp_path, part, **changes)
    torch.testing.assert_close(load_guider(tmp_path).predict(image, clean(image)), plain)
    assert not attempts


@pytest.mark.parametrize("name", ["Depth Anything", "UperNet", "MaskFormer"])
def test_a_backbone_on_the_hub_alone_is_refused(name: str, tmp_path, monkeypatch):
    attempts = forbid_network(monkeypatch)
    WRITERS[name](tmp_path)
    edit(tmp_path, **NAMES_HUB, backbone_config=None)
    with says(ValueError, "some-one/some-backbone", "backbone_config", "nothing is downloaded", "config.json"):
        load_guider(tmp_path)
    assert not attempts


def test_a_page_in_the_place_of_a_timm_name_is_refused(tmp_path, monkeypatch):
    """Timm would read the settings of such a name from the hub, even without its weights."""
    attempts = forbid_network(monkeypatch)
    WRITERS["UperNet on timm"](tmp_path)
    edit(tmp_path, "backbone_config", backbone="hf-hub:some-one/some-net")
    with says(ValueError, "hf-hub:some-one/some-net", "timm.list_models()"):
        load_guider(tmp_path)
    assert not attempts


def test_an_adapter_beside_the_network_fetches_no_base(tmp_path, monkeypatch):
    attempts = forbid_network(monkeypatch)
    FAMILIES["image classifier (ViT)"].write(tmp_path)
    adapter = {"base_model_name_or_path": "some-one/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert load_guider(tmp_path).task == "class" and not attempts


def test_the_hub_is_closed_to_a_loading_thread_alone():
    """The client refuses this thread only, and answers it again afterwards."""
    hub = pytest.importorskip("huggingface_hub")
    with serving() as server:
        api, found = hub.HfApi(endpoint=server.url), []
        assert api.model_info(REPO).id == REPO
        with offline():
            asked = len(server.asked)
            with pytest.raises(Exception, match="offline mode"):
                api.model_info(REPO)
            with offline(), pytest.raises(Exception, match="offline mode"):
                api.model_info(REPO)
            with pytest.raises(Exception, match="offline mode"):
                api.model_info(REPO)
            assert len(server.asked) == asked
            other = threading.Thread(target=lambda: found.append(api.model_info(REPO).id))
            other.start()
            other.join()
            assert found == [REPO]
        assert api.model_info(REPO).id == REPO


def test_a_failed_load_opens_the_hub_again(tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    FAMILIES["image classifier (ViT)"].write(tmp_path)
    edit(tmp_path, hidden_size=7)
    with says(ValueError, "ViTForImageClassification"):
        load_guider(tmp_path)
    assert constants.HF_HUB_OFFLINE is before
