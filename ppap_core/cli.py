"""The command line: ppap demo | bench | toy | costs | inspect."""
import argparse
import importlib
import json
import logging
import sys
import time
from pathlib import Path
from types import ModuleType


def main(arguments: list[str] | None = None) -> None:
    """Run one command; errors that a user can mend are one sentence without a traceback."""
    parser = argparse.ArgumentParser(prog="ppap", description="Plug-and-play guidance of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil five experts on the bundled world and guide with them")
    demo.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where pictures and tables go")
    bench = commands.add_parser("bench", help="measure every way to guide on the tiny world")
    bench.add_argument("table", nargs="?", default="class",
                       help="class, depth, segmentation, strength, improvements, original, autoguidance, "
                            "autoguidance_untold, autoguidance_made, prior; rules: symmetry and the like by a prior; "
                            "labelmaps: label maps found for pictures; tours: the travelling salesman; latent: the latent "
                            "world; speed: what a guided step costs networks of full size")
    bench.add_argument("--quick", action="store_true", help="class guidance in short, within 10 minutes on two cores")
    bench.add_argument("--row", action="append", default=[], help="only this row of the table; may be given again")
    bench.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where finished parts are kept")
    bench.add_argument("--out", type=Path, help="write table, plot and JSON here: runs/bench/<table>")
    toy = commands.add_parser("toy", help="autoguidance on points of the plane, as a picture and in numbers")
    toy.add_argument("--steps", type=int, default=2048, help="training steps of the good model")
    toy.add_argument("--out", type=Path, default=Path("runs/toy.png"), help="where the picture goes")
    costs = commands.add_parser("costs", help="memory, switching and time of a bank on a full-size network")
    costs.add_argument("--architecture", default="resnet50", help="a network of timm")
    costs.add_argument("--experts", type=int, default=10)
    costs.add_argument("--rank", type=int, default=8)
    inspect = commands.add_parser("inspect", help="print what a file of this pack says of itself")
    inspect.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        {"demo": _demo, "bench": _bench, "toy": _toy, "costs": _costs, "inspect": _inspect}[options.command](options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"ppap: {error}\n")


def _clock():
    started = time.monotonic()
    def report(line: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {line}", flush=True)
    return report


def _at_hand(name: str) -> ModuleType:
    """A module of the benchmarks or the examples, which lie beside the core in a clone and are not installed with it."""
    for root in (Path(__file__).parents[1], Path.cwd()):
        if (root / name.split(".")[0] / "__init__.py").is_file():
            if str(root) not in sys.path:
                sys.path.append(str(root))
            return importlib.import_module(name)
    raise ValueError(f"{name} is not at hand: run this command in a clone of the repository")


def _demo(options: argparse.Namespace) -> None:
    _at_hand("examples.demo").demo(options.folder, _clock())


def _bench(options: argparse.Namespace) -> None:
    _at_hand("benchmarks.cli").run(options, _clock())


def _toy(options: argparse.Namespace) -> None:
    from .tinyworld.toy2d import panels, picture
    from .viz.plots import save_picture

    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = panels(options.steps)
    save_picture(picture(found), options.out)
    for name, each in found.items():
        print(f"{name}: {each.outliers:.1%} outside, {each.overlap:.0%} of the branches met")


def _costs(options: argparse.Namespace) -> None:
    for name, value in _at_hand("benchmarks.costs").bank_costs(options.architecture, options.experts, options.rank).items():
        print(f"{name}: {value:.4g}")


def _inspect(options: argparse.Namespace) -> None:
    from .io.files import load_tensors

    tensors, about = load_tensors(options.file)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(json.dumps(about, indent=2))
    print(f"{len(tensors)} tensors, {numbers:,} numbers")
