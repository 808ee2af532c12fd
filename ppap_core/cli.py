"""The command line: ppap demo | bench | costs | inspect."""
import argparse
import json
import logging
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Run one command; errors that a user can mend are one sentence without a traceback."""
    parser = argparse.ArgumentParser(prog="ppap", description="Plug-and-play guidance of diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil five experts on the bundled world and guide with them")
    demo.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where pictures and tables go")
    bench = commands.add_parser("bench", help="measure every way to guide on the bundled world")
    bench.add_argument("--quick", action="store_true", help="fewer images, shorter training: under an hour on two cores")
    bench.add_argument("--speed", action="store_true", help="instead: what a guided step costs networks of full size")
    bench.add_argument("--latent", action="store_true", help="instead: class, depth and segmentation on the latent world")
    bench.add_argument("--folder", type=Path, help="where finished parts are kept: runs/bench or runs/bench_quick")
    bench.add_argument("--json", type=Path, help="also write the rows into this file")
    costs = commands.add_parser("costs", help="memory, switching and time of a bank on a full-size network")
    costs.add_argument("--architecture", default="resnet50", help="a network of timm")
    costs.add_argument("--experts", type=int, default=10)
    costs.add_argument("--rank", type=int, default=8)
    inspect = commands.add_parser("inspect", help="print what a file of this pack says of itself")
    inspect.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        {"demo": _demo, "bench": _bench, "costs": _costs, "inspect": _inspect}[options.command](options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"ppap: {error}\n")


def _clock():
    started = time.monotonic()
    def report(line: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {line}", flush=True)
    return report


def _demo(options: argparse.Namespace) -> None:
    from .tinyworld.demo import demo

    demo(options.folder, _clock())


def _bench(options: argparse.Namespace) -> None:
    if options.speed:
        return _speed(options)
    if options.latent:
        return _latent(options)
    from .files import write_json
    from .tinyworld.bench import FULL, QUICK, bench, table

    folder = options.folder or Path("runs/bench_quick" if options.quick else "runs/bench")
    rows = bench(QUICK if options.quick else FULL, folder, _clock())
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


def _latent(options: argparse.Namespace) -> None:
    from .files import write_json
    from .tinyworld.latent_bench import LatentBench, latent_bench, table

    rows = latent_bench(LatentBench(), options.folder or Path("runs/bench_latent"), _clock())
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


def _speed(options: argparse.Namespace) -> None:
    from .files import write_json
    from .speed import speed, table

    columns = speed(_clock())
    print(table(columns))
    if options.json:
        write_json(options.json, columns)


def _costs(options: argparse.Namespace) -> None:
    from .costs import bank_costs

    for name, value in bank_costs(options.architecture, options.experts, options.rank).items():
        print(f"{name}: {value:.4g}")


def _inspect(options: argparse.Namespace) -> None:
    from .files import load_tensors

    tensors, about = load_tensors(options.file)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(json.dumps(about, indent=2))
    print(f"{len(tensors)} tensors, {numbers:,} numbers")
