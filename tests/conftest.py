"""Where the tests import from, and how they share the processors."""
import os
import sys
from pathlib import Path

# The repository's root goes to the end of the path: its `nodes/` must not hide ComfyUI's `nodes.py`.
sys.path.append(str(Path(__file__).parent.parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # workers with several threads each would slow one another down
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    from helpers.ids import case_id  # here, after the number of threads is set

    return case_id(val, argname)
