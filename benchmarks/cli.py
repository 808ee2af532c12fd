"""The command `ppap bench`: one benchmark by its name, printed and written as Markdown and JSON."""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import label_maps, latent, rules, speed, tables, tours
from .report import Report, Row, write_report
from .runs import run_table


class Benchmark(NamedTuple):
    """A benchmark outside the tables of rows/*.json: (folder, report) -> rows, and the rows in Markdown."""

    measure: Callable[[Path, Report], list[Row]]
    table: Callable[[Sequence[Row]], str]


BENCHMARKS = {
    "labelmaps": Benchmark(lambda folder, report: label_maps.label_bench(label_maps.LabelBench(), report), label_maps.table),
    "latent": Benchmark(lambda folder, report: latent.latent_bench(latent.LatentBench(), folder / "latent", report),
                        latent.table),
    "rules": Benchmark(lambda folder, report: rules.rules_bench(rules.RulesBench(), report), rules.table),
    "speed": Benchmark(lambda folder, report: speed.speed(report), speed.table),
    "tours": Benchmark(lambda folder, report: tours.tour_bench(tours.TourBench(), report), tours.table),
}


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure a benchmark, or resume it, then write and print its table."""
    name = "quick" if options.quick else options.table
    out = options.out or options.folder / name
    if name in BENCHMARKS:
        rows = BENCHMARKS[name].measure(options.folder, report)
        text = BENCHMARKS[name].table(rows)
        write_report(out, rows, text)
    else:
        text = tables.write_table(name, run_table(tables.read_table(name), options.folder, report, options.row), out)
    print(text)
