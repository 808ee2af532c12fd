"""Help pages and tooltips on the page."""
import pytest
from helpers.frontend import FrontEnd
from helpers.graphs import page_of


def place(front: FrontEnd, kind: str) -> None:
    """A node alone on the canvas, selected."""
    front.clear()
    front.page.evaluate("""kind => {
        const node = LiteGraph.createNode(kind);
        node.pos = [300, 300];
        app.graph.add(node);
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [0, 0];
        app.canvas.selectNode(node);
        app.canvas.setDirty(true, true);
    }""", kind)


def test_the_help_page_of_a_node_opens(front: FrontEnd):
    place(front, "PPAPGuidanceTerm")
    front.page.get_by_test_id("info-button").click()
    text = front.page.locator(".node-help-content")
    text.get_by_role("heading", name="Guidance Term").wait_for()
    assert "factor_at_start" in text.inner_text() and "Neutral: 0, the guider does not run" in text.inner_text()
    front.page.get_by_role("button", name="Toggle properties panel").click()


@pytest.mark.parametrize("kind, widget", [("PPAPGuidanceTerm", "weight"), ("PPAPRule", "rule")])
def test_a_tooltip_appears_over_a_setting(front: FrontEnd, kind: str, widget: str):
    place(front, kind)
    front.page.wait_for_function("name => app.graph.nodes[0].widgets.find(each => each.name == name).last_y > 0", arg=widget)
    x, y = front.page.evaluate("""name => {
        const node = app.graph.nodes[0], widget = node.widgets.find(each => each.name == name);
        const {x, y} = document.querySelector('#graph-canvas').getBoundingClientRect();
        return [x + node.pos[0] + 60, y + node.pos[1] + widget.last_y + 10];
    }""", widget)
    front.page.mouse.move(x - 5, y)
    front.page.mouse.move(x, y, steps=4)
    tooltip = front.page.locator(".node-tooltip")
    tooltip.wait_for()
    inputs = front.server.get(f"/object_info/{kind}")[kind]["input"]["required"]
    assert tooltip.inner_text().split() == inputs[widget][1]["tooltip"].split()


def test_the_notes_of_a_workflow_are_read_as_text(front: FrontEnd):
    front.drop("quickstart", page_of("quickstart"))
    notes = front.page.locator(".comfy-markdown")
    assert "Quick" in notes.first.inner_text()
