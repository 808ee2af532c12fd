"""Every class of models of the ComfyUI at hand: guided, distilled for and autoguided, or refused in one sentence.

PPAP_REFRESH_SWEEP=1 writes the answers into docs/compatibility.md instead of comparing them with it.
"""
import os
from collections.abc import Callable, Iterator

import pytest
from helpers import sweep
from helpers.every_class import BY_CLASS, names
from helpers.workbench import Workbench

REFRESH = bool(os.environ.get("PPAP_REFRESH_SWEEP"))


@pytest.fixture(scope="module")
def check(bench: Workbench) -> Iterator[Callable[[str], None]]:
    """check(name) asks a class, and compares its answers with the document's."""
    rows: dict[str, str] = {}

    def ask(name: str) -> None:
        if name not in names():
            pytest.skip(f"this ComfyUI has no {name}")
        row = sweep.row(name, sweep.ask(bench, name))
        if REFRESH:
            rows[name] = row
        else:
            assert sweep.is_as_documented(row), f"{row} is not in docs/compatibility.md: PPAP_REFRESH_SWEEP=1 writes it"
    yield ask
    if rows:
        sweep.write(rows)


def test_every_class_is_in_the_document(bench: Workbench):
    new = [name for name in names() if name not in sweep.documented()]
    if new and not REFRESH:
        pytest.skip(f"classes of this ComfyUI that were never tried: {', '.join(new)}; give them recipes "
                    "in helpers/every_class.py")


def test_what_diffuses_no_pictures_is_refused(check: Callable[[str], None]):
    for name in names():
        if name not in BY_CLASS and (REFRESH or name in sweep.documented()):
            check(name)


@pytest.mark.wide
@pytest.mark.parametrize("name", BY_CLASS)
def test_a_class_answers_as_the_document_says(check: Callable[[str], None], name: str):
    check(name)
