"""The repository's root goes to the end of the path: its `nodes/` must not hide ComfyUI's `nodes.py`."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
