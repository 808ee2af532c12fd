"""ComfyUI's own page in a real browser, used as a person uses it: files are dropped, buttons pressed, words typed.

The names of its parts are those of comfyui-frontend-package 1.49.
"""
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .comfy_server import Server
from .graphs import QUICK

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATIENCE = 600  # seconds for what is queued: the browser draws beside it on the same processors
SMALL, LARGE = {"width": 1400, "height": 900}, {"width": 2800, "height": 1800}  # of the page, in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow && window.app.graph
    && document.querySelector('#graph-canvas')"""  # what was open before is loaded last
# The page fades its curtain out when it is ready; where little is drawn, this never ends, and no click gets through.
LIFT_CURTAIN = "() => document.querySelectorAll('.p-blockui-mask').forEach(each => each.remove())"
FOLLOWS_THE_MOUSE = "() => app.canvas.state.ghostNodeId != null"
ATTEMPTS = 10  # at what a busy page may not have been ready for
DROP = """([name, text]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("#graph-canvas"), {x, y} = canvas.getBoundingClientRect();
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer,
                                                  clientX: x + 9, clientY: y + 9}));
}"""
SET_WIDGETS = """(values) => app.graph.nodes.forEach(node => node.widgets?.forEach(widget => {
    if (widget.name in (values[node.type] ?? {})) widget.value = values[node.type][widget.name];
}))"""
RED = """() => app.graph.nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))
    .map(node => node.type)"""
TEXT_ON = "id => app.graph.getNodeById(id).widgets?.find(each => each.name == '$$node-text-preview')?.value"
HAS_ALL = "ids => app.graph.nodes.length == ids.length && ids.every(id => app.graph.getNodeById(id))"


@contextmanager
def browser_page() -> Iterator["Page"]:
    """A page of a browser without a window; the test is skipped where there is no browser or no playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: 'make test-frontend' installs it")
    paths = [path for name in BROWSERS if (path := shutil.which(name))]
    if not paths:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=paths[0], args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SMALL, locale="en-US")
        page.set_default_timeout(PATIENCE * 200)
        yield page
        browser.close()


class FrontEnd:
    """The page of a running ComfyUI."""

    def __init__(self, page: "Page", server: Server):
        self.page, self.server = page, server

    def load(self, **settings: Any) -> None:
        """Open the page anew. settings: by their ids, with _ in the place of dots."""
        for name, value in settings.items():
            self.server.post(f"/settings/{name.replace('_', '.')}", value)
        self.page.goto(self.server.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(1000)
        self.page.evaluate(LIFT_CURTAIN)

    def drop(self, name: str, workflow: dict) -> None:
        """Drag a workflow file, of the page or of the API, onto the canvas, and wait until all its nodes are there."""
        self.page.evaluate(DROP, [f"{name}.json", json.dumps(workflow)])
        ids = [node["id"] for node in workflow["nodes"]] if "nodes" in workflow else [*workflow]
        self.page.wait_for_function(HAS_ALL, arg=ids)
        self.page.wait_for_timeout(700)  # what is missing is looked for after the nodes are there

    def photograph(self, file: Path) -> None:
        """Save a picture of the page with all nodes in view, so large that they can be read."""
        self.page.set_viewport_size(LARGE)
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(3000)  # the view glides, and pictures are loaded
        file.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=file, type="jpeg", quality=70)
        self.page.set_viewport_size(SMALL)

    def clear(self) -> None:
        """Open an empty workflow."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.page.wait_for_function("() => app.graph.nodes.length == 0")

    def hurry(self) -> None:
        """Set few steps in the nodes."""
        self.page.evaluate(SET_WIDGETS, QUICK)

    def nodes_in_red(self) -> list[str]:
        """The types of nodes that are unknown or marked as wrong."""
        return self.page.evaluate(RED)

    def complaints(self) -> list[str]:
        """The texts of all dialogues and error messages that are open."""
        shown = self.page.locator("[data-testid=error-overlay], [role=dialog]").all()
        return [each.inner_text() for each in shown if each.is_visible()]

    def press_run(self) -> dict:
        """Press the Run button; the server's answer to what the page queued."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answer:
            self.page.get_by_test_id("queue-button").click()
        return answer.value.json()

    def run(self) -> dict:
        """Press the Run button; the history of what was queued, when it is finished."""
        answer = self.press_run()
        assert "prompt_id" in answer, answer
        return self.server.wait(answer["prompt_id"], PATIENCE)

    def error(self) -> tuple[str, str]:
        """Press the Run button; the message of the error that follows, and the panel that its button opens."""
        self.press_run()
        overlay = self.page.get_by_test_id("error-overlay")
        overlay.wait_for(timeout=PATIENCE * 1000)
        message = overlay.inner_text()
        self.page.get_by_test_id("error-overlay-see-errors").click()
        panel = self.page.get_by_test_id("properties-panel")
        panel.wait_for()
        self.page.wait_for_timeout(1500)  # the panel fetches its report
        return message, panel.inner_text()

    def text_on(self, node: str) -> str:
        """The text that a node shows below its widgets."""
        return self.page.evaluate(TEXT_ON, node) or ""

    @contextmanager
    def search(self) -> Iterator["Search"]:
        """Double-click on the empty canvas and search for nodes."""
        self.clear()
        search = Search(self.page)
        for _ in range(ATTEMPTS):
            self.page.mouse.dblclick(500, 560)
            if search.opens():
                break
        yield search
        self.page.keyboard.press("Escape")

    def put_down(self) -> None:
        """Click where the node shall stand that was found, and follows the mouse."""
        self.page.wait_for_function("() => app.graph.nodes.length == 1")
        for _ in range(ATTEMPTS):
            self.page.mouse.click(600, 400)
            self.page.wait_for_timeout(500)
            if not self.page.evaluate(FOLLOWS_THE_MOUSE):
                break


class Search:
    """The node search."""

    def __init__(self, page: "Page"):
        self.page, self.field = page, page.get_by_role("combobox").and_(page.locator("[aria-controls=results-list]"))

    def opens(self) -> bool:
        """Whether it is open within 20 seconds."""
        for _ in range(40):
            if self.field.is_visible():
                return True
            self.page.wait_for_timeout(500)
        return False

    def names(self, phrase: str) -> list[str]:
        """The display names of the nodes that are found, best first."""
        self.field.fill(phrase)
        self.page.wait_for_timeout(350)  # the page waits until nobody types
        return self.page.evaluate("() => [...document.querySelectorAll('[data-testid=result-item]')]"
                                  ".map(each => each.innerText.split('\\n')[0])")
