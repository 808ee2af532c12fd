"""ComfyUI's page in a real browser: `make test-frontend`. Not part of the suite, since a browser takes its time."""
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.comfy_server import Server, find_comfyui, running
from helpers.frontend import FrontEnd, browser_page

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, and let them share one server and one browser."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("frontend")
            item.add_marker(pytest.mark.xdist_group("frontend"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("comfyui_frontend_package", reason="no front end: install what ComfyUI requires")
    with running(find_comfyui(), tmp_path_factory.mktemp("frontend"), {"Comfy.TutorialCompleted": True}) as server:
        yield server


@pytest.fixture(scope="session")
def front(server: Server) -> Iterator[FrontEnd]:
    with browser_page() as page:
        front = FrontEnd(page, server)
        front.load()
        yield front


@pytest.fixture(autouse=True)
def picture_of_failure(request: pytest.FixtureRequest, front: FrontEnd, tmp_path: Path) -> Iterator[None]:
    """Keep a picture of the page where a test failed, and say where it is."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        front.page.screenshot(path=tmp_path / "page.png")
        print(f"The page: {tmp_path / 'page.png'}")
