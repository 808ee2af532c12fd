"""The page in other languages."""
from collections.abc import Iterator

import pytest
from helpers.frontend import FrontEnd
from helpers.graphs import page_of

from tools.locales import read_table

OFFERED = ("ja", "zh", "ko")  # of our languages, by the page of ComfyUI 0.33


@pytest.fixture(params=OFFERED)
def language(request: pytest.FixtureRequest, front: FrontEnd) -> Iterator[str]:
    front.load(Comfy_Locale=request.param, Comfy_VueNodes_Enabled=True)
    yield request.param
    front.load(Comfy_Locale="en", Comfy_VueNodes_Enabled=False)


def test_nodes_speak_the_language_of_the_page(front: FrontEnd, language: str):
    table = read_table()
    front.drop("rules", page_of("rules"))
    term = front.page.locator("[data-node-id]").filter(has_text=table["start_percent"][language]).first
    term.get_by_text(table["weight"][language], exact=True).wait_for()
    with front.search() as search:
        assert table["Guidance Term"][language] in search.names("PPAPGuidanceTerm")
        assert table["Rule"][language] in search.names("color match"), "phrases find nodes in every language"
