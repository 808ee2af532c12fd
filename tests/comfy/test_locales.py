"""The translations: complete, of what the nodes say now, and readable for the page."""
import re
from typing import Any

import pytest

from tools import locales

NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def schemas(comfy: Any) -> dict[str, Any]:
    return {name: kind.define_schema() for name, kind in comfy.registered.items() if name.startswith("PPAP")}


def test_the_files_hold_what_table_and_nodes_say(schemas: dict[str, Any]):
    table = locales.read_table()
    written = {file: file.read_text(encoding="utf-8") for file in locales.LOCALES.rglob("*.json")}
    assert locales.updated(table, schemas) == table and list(table) == locales.texts(schemas), "run `make help-pages`"
    assert written == locales.files(table, schemas), "run `make help-pages`"


def test_complete_languages_have_every_text(schemas: dict[str, Any]):
    gaps = locales.missing(locales.updated(locales.read_table(), schemas))
    assert not gaps, "translate these in tools/translations.json, or take the language out of COMPLETE in tools/locales.py"


def test_a_new_text_is_a_gap_and_a_lost_one_is_dropped(schemas: dict[str, Any]):
    table = locales.read_table()
    gone = table.pop("Guidance Term")
    table["Nobody says this"] = gone
    table = locales.updated(table, schemas)
    assert [text for _, text in locales.missing(table)] == ["Guidance Term"] * len(locales.COMPLETE)
    assert "Nobody says this" not in table
    assert '"display_name": "Guidance Term"' not in str(locales.files(table, schemas)), "English is in the nodes alone"


def test_translations_keep_numbers_and_are_no_templates():
    """A neutral value is the same in every language; braces, at signs and bars would be read as the page's own syntax."""
    for text, translations in locales.read_table().items():
        for language, translation in translations.items():
            lost = set(NUMBER.findall(text)) - set(NUMBER.findall(translation))
            assert not lost and not set("{}@|") & set(translation), f"{language}: {translation}"


def test_the_server_offers_the_translations(server: Any):
    offered = server.get("/i18n")
    assert offered["ja"]["nodeDefs"]["PPAPGuidanceTerm"]["inputs"]["weight"]["tooltip"].count("0.7") == 1
    assert set(locales.COMPLETE) <= set(offered)
