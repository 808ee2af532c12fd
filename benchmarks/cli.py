"""The command `ppap bench`: one benchmark by its name, printed and written as Markdown and JSON."""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ppap_core.viz.drawing import save_picture

from . import label_maps, latent, photographs, rules, speed, tables, tours
from .report import Report, Row, write_report
from .runs import run_table


class Benchmark(NamedTuple):
    """A benchmark outside the tables of rows/*.json: (folder, report) -> rows, and the rows in Markdown and as a plot."""

    measure: Callable[[Path, Report], list[Row]]
    table: Callable[[Sequence[Row]], str]
    plot: Callable[[Sequence[Row]], Tensor] | None = None


BENCHMARKS = {
    "labelmaps": Benchmark(lambda folder, report: label_maps.label_bench(label_maps.LabelBench(), report), label_maps.table),
    "latent": Benchmark(lambda folder, report: latent.latent_bench(latent.LatentBench(), folder / "latent", report),
                        latent.table),
    "photographs": Benchmark(lambda folder, report: photographs.photograph_bench(
        photographs.PhotographBench(), folder / "photographs", report), photographs.table, photographs.plot),
    "rules": Benchmark(lambda folder, report: rules.rules_bench(rules.RulesBench(), report), rules.table),
    "speed": Benchmark(lambda folder, report: speed.speed(report), speed.table),
    "tours": Benchmark(lambda folder, report: tours.tour_bench(tours.TourBench(), report), tours.table),
}


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure a benchmark, or resume it, then write and print its table."""
    name = "quick" if options.quick else options.table
    out = options.out or options.folder / name
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        rows = benchmark.measure(options.folder, report)
        text = benchmark.table(rows)
        write_report(out, rows, text)
        if benchmark.plot:
            save_picture(benchmark.plot(rows), out.with_suffix(".png"))
    else:
        text = tables.write_table(name, run_table(tables.read_table(name), options.folder, report, options.row), out)
    print(text)
