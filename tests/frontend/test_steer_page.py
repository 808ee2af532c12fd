"""Steer on the page: its inputs follow the choice, App mode shows them, and blueprints are nodes like others."""
import json

import pytest
from helpers.frontend import DROP, FrontEnd
from helpers.graphs import page_of, posted

FOLLOWING = """() => {
    const node = app.graph.nodes.find(each => each.type == "PPAPSteer"), shown = {};
    const choice = node.widgets.find(each => each.name == "towards");
    for (const value of choice.options.values) {
        choice.value = value;
        shown[value] = [...new Set([...node.inputs, ...node.widgets].map(each => each.name))]
            .filter(name => name.startsWith("towards."));
    }
    return shown;
}"""


def test_the_page_queues_what_the_file_says(front: FrontEnd):
    workflow = page_of("steer")
    front.drop("steer", workflow)
    queued = front.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert {key: each["inputs"] for key, each in queued.items()} == {
        key: each["inputs"] for key, each in posted(workflow, front.server.get("/object_info")).items()}


def test_sockets_and_widgets_follow_the_choice(front: FrontEnd):
    front.drop("steer", page_of("steer"))
    shown = front.page.evaluate(FOLLOWING)
    options = front.server.get("/object_info/PPAPSteer")["PPAPSteer"]["input"]["required"]["towards"][1]["options"]
    assert {key: sorted(names) for key, names in shown.items()} == {
        each["key"]: sorted(f"towards.{name}" for part in each["inputs"].values() for name in part) for each in options}


@pytest.mark.parametrize("name, kind", [("Steer by palette", "PPAPPalette"),
                                        ("Steer by depth of an image", "PPAPLoadGuider"),
                                        ("Steer by your own classifier", "PPAPAimAtClass")])
def test_a_blueprint_is_found_and_becomes_a_node(front: FrontEnd, name: str, kind: str):
    with front.search() as search:
        assert search.names(name)[0] == name
        search.field.press("Enter")
        front.put_down()
    queued = front.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert {"PPAPApplyGuidance", "PPAPGuidanceTerm", kind} <= {each["class_type"] for each in queued.values()}


def test_app_mode_shows_what_steers(front: FrontEnd):
    """The last test: the page stays in App mode."""
    workflow = page_of("steer")
    workflow["extra"]["linearMode"] = True
    front.page.evaluate(DROP, ["app.json", json.dumps(workflow)])
    front.page.wait_for_function("words => words.every(word => document.body.innerText.split('\\n').includes(word))",
                                 arg=["Build an app", "towards", "palette", "strength", "factor"])
