"""Each shipped workflow, dropped onto the page and run by its button, with classic nodes and with Vue nodes.

`make screenshots` keeps a picture of each page, at full settings, in runs/screenshots.
"""
import os
from pathlib import Path

import pytest
from helpers.frontend import FrontEnd
from helpers.graphs import WORKFLOW_NAMES, page_of

SCREENSHOTS = os.environ.get("PPAP_SCREENSHOTS")
VUE_NODES = "Comfy.VueNodes.Enabled"


def set_vue_nodes(front: FrontEnd, enabled: bool) -> None:
    front.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [VUE_NODES, enabled])


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_dropped_workflow_opens_and_runs(front: FrontEnd, name: str):
    """The second run, with Vue nodes, takes what the first one computed from the server's cache."""
    workflow = page_of(name)
    for vue in (False, True):
        set_vue_nodes(front, vue)
        front.drop(name, workflow)
        assert front.nodes_in_red() == [] and front.complaints() == []
        if not SCREENSHOTS:
            front.hurry()
        history = front.run()
        assert history["status"]["status_str"] == "success", history["status"]
        assert front.complaints() == []
        assert (front.page.locator("[data-node-id]").count() > 0) == vue
        if SCREENSHOTS and not vue:
            front.photograph(Path(SCREENSHOTS) / f"{name}.jpg")
    shown = [key for key, output in history["outputs"].items() if output.get("images")]
    assert shown
    front.page.wait_for_function("() => document.querySelector('[data-node-id] img')?.naturalWidth > 0")


def test_an_unknown_node_is_red(front: FrontEnd):
    """The tests above would see it."""
    set_vue_nodes(front, False)
    workflow = page_of("rules")
    for node in workflow["nodes"]:
        node["type"] = node["type"].replace("PPAPRule", "PPAPGone")
    front.drop("gone", workflow)
    assert set(front.nodes_in_red()) == {"PPAPGone"}
    assert any("Missing" in each for each in front.complaints())


def test_vue_nodes_fold_what_few_need(front: FrontEnd):
    set_vue_nodes(front, True)
    workflow = page_of("rules")
    front.drop("rules", workflow)
    [term, *_] = [node["id"] for node in workflow["nodes"] if node["type"] == "PPAPGuidanceTerm"]
    box = front.page.locator(f"[data-node-id='{term}']")
    assert "weight" in box.inner_text() and "factor_at_start" not in box.inner_text()
    box.get_by_text("Show advanced inputs").click()
    box.get_by_text("factor_at_start").wait_for()
    set_vue_nodes(front, False)
