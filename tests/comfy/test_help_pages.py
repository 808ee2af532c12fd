"""The help pages say what the schemas say."""
from tools.help_pages import PAGES, page, prose, read


def test_the_help_pages_agree_with_the_schemas(comfy):
    kinds = {name: kind for name, kind in comfy.registered.items() if name.startswith("PPAP")}
    stale = [name for name, kind in kinds.items() if page(kind.define_schema(), read(name)) != read(name)]
    assert not stale, "run `make help-pages`"
    assert {file.stem for file in PAGES.glob("*.md")} == set(kinds)


def test_a_page_keeps_its_prose_when_it_is_written_again():
    text = "# A\n\nWhat it is.\n\nBy hand.\n\n- more\n\n## Inputs\n\n- **x**: y\n\n## Outputs\n\n- **z**: w\n"
    assert prose(text) == "By hand.\n\n- more"
    assert prose("") == prose("# A\n\nWhat it is.\n") == ""
