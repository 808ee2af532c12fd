"""The Download Guider node, against a hub that runs in the test."""
from collections.abc import Iterator

import pytest
from helpers.hub import FILES, REPO, TAKEN, Hub, contents, serving

FOLDER = "some-one--a_net.v1"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def here(comfy, hub: Hub, monkeypatch):
    """The pack with its downloads going to the test's hub and to an empty folder."""
    module, load = comfy.pack.ppap_core.guiders.loaders.hub, comfy.pack.nodes.schemas.guiders
    monkeypatch.setattr(load, "download", lambda repo, folder, report: module.download(repo, folder, report, hub.url))
    monkeypatch.setattr(module, "PIECE_SIZE", 2000)
    place = comfy.pack.nodes.bridge.paths.downloaded_guider(REPO)
    assert not place.exists()
    yield place
    for file in (*place.parent.glob(f"{FOLDER}/*"), *place.parent.glob(f".{FOLDER}/*")):
        file.unlink()
    for folder in (*place.parent.glob(FOLDER), *place.parent.glob(f".{FOLDER}")):
        folder.rmdir()


def node(comfy):
    return comfy.registered["PPAPDownloadGuider"]


def test_a_downloaded_network_is_in_the_list_of_load_guider(comfy, here):
    state = node(comfy).fingerprint_inputs(repo_id=REPO)
    done = node(comfy).execute(repo_id=REPO)
    assert done.ui == {"text": [f"downloaded {FOLDER}: press R and choose it in Load Guider"]}
    assert here.parent.name == "ppap_guiders" and contents(here) == {name: FILES[name] for name in TAKEN}
    assert FOLDER in comfy.pack.nodes.bridge.guider_cache.guider_sources()
    assert node(comfy).fingerprint_inputs(repo_id=REPO) != state
    again = node(comfy).execute(repo_id=REPO)
    assert again.ui == {"text": [f"{FOLDER} is there already: press R and choose it in Load Guider"]}


def test_the_bar_moves_and_cancel_stops_and_the_next_run_goes_on(comfy, here, hub, monkeypatch):
    import comfy.model_management as management
    from comfy.utils import ProgressBar

    seen = []

    def update(self, value, total, preview=None):
        seen.append((value, total))
        if value > 300:
            management.interrupt_current_processing(True)
    monkeypatch.setattr(ProgressBar, "update_absolute", update)
    with pytest.raises(management.InterruptProcessingException):
        node(comfy).execute(repo_id=REPO)
    assert not here.exists() and FOLDER not in comfy.pack.nodes.bridge.guider_cache.guider_sources()
    assert f".{FOLDER}" not in comfy.pack.nodes.bridge.guider_cache.guider_sources()
    monkeypatch.setattr(ProgressBar, "update_absolute", lambda self, value, total, preview=None: None)
    node(comfy).execute(repo_id=REPO)
    assert seen[0] == (0, 1000) and seen == sorted(seen)
    assert contents(here) == {name: FILES[name] for name in TAKEN}
    assert hub.served == sum(len(FILES[name]) for name in TAKEN)


def test_what_load_guider_refuses_is_not_downloaded(comfy, here, hub):
    hub.files = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": bytes(9000)}
    with pytest.raises(ValueError, match="LlamaForCausalLM, which answers nothing that can guide"):
        node(comfy).execute(repo_id=REPO)
    assert hub.served < 100 and not here.exists() and not here.with_name(f".{FOLDER}").exists()


@pytest.mark.parametrize("name", ["", "resnet18", "../a/b", "timm/../../x"])
def test_a_wrong_name_is_refused_before_anything_runs(comfy, name: str):
    assert "owner/name" in node(comfy).validate_inputs(repo_id=name, suggestion="none")
    assert node(comfy).validate_inputs(repo_id="timm/resnet18.a1_in1k") is True


def test_a_suggestion_is_downloaded_where_nothing_is_named(comfy, here, monkeypatch):
    suggested = comfy.pack.ppap_core.guiders.loaders.suggested
    monkeypatch.setitem(suggested.SUGGESTED, "depth", suggested.Suggestion(REPO, 1, "MIT"))
    assert node(comfy).validate_inputs(repo_id="", suggestion="depth") is True
    assert node(comfy).execute(repo_id="", suggestion="depth").ui == {
        "text": [f"downloaded {FOLDER}: press R and choose it in Load Guider"]}
    assert here.exists()


def test_each_suggestion_is_a_name_on_the_hub_and_in_the_tooltip(comfy):
    suggested = comfy.pack.ppap_core.guiders.loaders.suggested.SUGGESTED
    combo = next(slot for slot in node(comfy).define_schema().inputs if slot.id == "suggestion")
    assert combo.options == ["none", *suggested]
    for repo, _, licence in suggested.values():
        assert node(comfy).validate_inputs(repo_id=repo) is True and repo in combo.tooltip and licence in combo.tooltip


def test_a_name_that_is_linked_is_not_known_yet(comfy):
    assert node(comfy).validate_inputs(repo_id=None) is True and node(comfy).fingerprint_inputs(repo_id=None) == []
