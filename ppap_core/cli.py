"""The command line: ppap demo | bench | toy | costs | distill | inspect | samples."""
import argparse
import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from . import cli_distill

BENCHMARKS = ("class, depth, segmentation, strength, falling, falling_depth, improvements, rivals_class, rivals_depth, "
              "original, autoguidance, autoguidance_untold, autoguidance_made, prior; rules: symmetry and the like by a "
              "prior; labelmaps: label maps found for pictures; photographs: a real network under noise; faces: a real "
              "model and real networks; restoration: faces from measurements of them; copies: scenes from grey, small, "
              "blurred and torn copies; exact: rules met to the last bit; tours: the travelling salesman; latent: the "
              "latent world; choosing: best of several, best seeds and particles at equal passes; fewsteps: a flow and "
              "its turbo LoRA in 4, 8 and 16 steps; transfer: experts of one model guide another; speed: the cost of a "
              "guided step at full size; throughput: images a second of distillation; taste: guiders trained on a few "
              "pictures")


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error that a user can mend is one sentence without a traceback, with exit status 1.

    arguments: those after the name of the program; None takes them from the command line.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        COMMANDS[options.command](options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"ppap: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ppap", description="Plug-and-play guidance of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil five experts on the bundled world and guide with them")
    demo.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where pictures and tables go")
    bench = commands.add_parser("bench", help="measure every way to guide on the tiny world")
    bench.add_argument("table", nargs="?", default="class", help=BENCHMARKS)
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
    distill = commands.add_parser("distill", help="distill experts of generated images, such as ppap_samples/<name>; as "
                                  "several processes where `accelerate launch -m ppap_core.cli` or torchrun starts it")
    cli_distill.add_arguments(distill)
    inspect = commands.add_parser("inspect", help="print the description in a file of this pack")
    inspect.add_argument("file", type=Path)
    samples = commands.add_parser("samples", help="look after a folder of generated images, such as ppap_samples/<name>")
    samples.add_argument("action", choices=SAMPLES, help="inspect: print what is there and which files are not whole; "
                         "verify: read all of it and compare checksums; merge: copy what this folder lacks from others")
    samples.add_argument("folder", type=Path)
    samples.add_argument("others", type=Path, nargs="*", help="folders to take images from, for merge")
    samples.add_argument("--delete", action="store_true", help="delete what verify finds damaged, so that it is made again")
    return parser


def _clock() -> Callable[[str], None]:
    """A function that prints a line with the seconds since now."""
    return partial(_print_after, time.monotonic())


def _print_after(started: float, line: str) -> None:
    print(f"[{time.monotonic() - started:6.0f} s] {line}", flush=True)


def _import_from_clone(name: str) -> ModuleType:
    """A module of the benchmarks or the examples, which lie beside the core in a clone and are not installed with it."""
    for root in (Path(__file__).parents[1], Path.cwd()):
        if (root / name.split(".")[0] / "__init__.py").is_file():
            if str(root) not in sys.path:
                sys.path.append(str(root))
            return importlib.import_module(name)
    raise ValueError(f"{name} is not at hand: run this command in a clone of the repository")


def _demo(options: argparse.Namespace) -> None:
    _import_from_clone("examples.demo").demo(options.folder, _clock())


def _bench(options: argparse.Namespace) -> None:
    _import_from_clone("benchmarks.cli").run(options, _clock())


def _toy(options: argparse.Namespace) -> None:
    from .tinyworld.toy2d import panels, picture
    from .viz.drawing import save_picture

    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = panels(options.steps)
    save_picture(picture(results), options.out)
    for name, panel in results.items():
        print(f"{name}: {panel.outliers:.1%} outside, {panel.overlap:.0%} of the branches met")


def _costs(options: argparse.Namespace) -> None:
    bank_costs = _import_from_clone("benchmarks.costs").bank_costs
    for name, value in bank_costs(options.architecture, options.experts, options.rank).items():
        print(f"{name}: {value:.4g}")


def _distill(options: argparse.Namespace) -> None:
    cli_distill.run(options, _clock())


def _inspect(options: argparse.Namespace) -> None:
    from .io.files import read_description

    shapes, description = read_description(options.file)
    print(json.dumps(description, indent=2))
    print(f"{len(shapes)} tensors, {sum(map(math.prod, shapes.values())):,} numbers")


def _samples(options: argparse.Namespace) -> None:
    SAMPLES[options.action](options)


def _inspect_samples(options: argparse.Namespace) -> None:
    from .experts.upkeep import describe_store, open_store

    store = open_store(options.folder)
    print(json.dumps(store.manifest, indent=2))
    print(describe_store(store))


def _verify_samples(options: argparse.Namespace) -> None:
    from .experts.upkeep import open_store, verify_store

    store = open_store(options.folder)
    damages = list(verify_store(store, options.delete))
    if damages:
        raise ValueError(" ".join([*damages, "Deleted: generate samples again to make them anew." if options.delete else
                                   "Delete them, by --delete, and generate samples again to make them anew."]))
    print(f"{len(store)} images are whole")


def _merge_samples(options: argparse.Namespace) -> None:
    from .experts.upkeep import merge_stores, open_store

    store = open_store(options.folder)
    for other in options.others:
        print(f"{merge_stores(store, open_store(other))} files from {other}")
    print(f"{len(store)} images")


SAMPLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": _inspect_samples, "verify": _verify_samples, "merge": _merge_samples}
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo, "bench": _bench, "toy": _toy, "costs": _costs, "distill": _distill, "inspect": _inspect,
    "samples": _samples}

if __name__ == "__main__":
    main()
