"""The command `ppap bench`: one benchmark by its name, printed and written as Markdown and JSON."""
import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ppap_core.viz.drawing import save_picture

from . import (
    baking,
    choosing,
    copies,
    exact,
    face_sheet,
    faces,
    few_steps,
    label_maps,
    latent,
    photographs,
    restoration,
    rules,
    speed,
    tables,
    taste,
    throughput,
    tours,
    transfer,
    variety,
)
from .report import Report, Row, write_report
from .runs import run_table


class Benchmark(NamedTuple):
    """A benchmark outside the tables of rows/*.json: how it is measured, and its rows in Markdown and as a plot."""

    measure: Callable[[Path, Report, Sequence[str]], list[Row]]  # (folder, report, names of the only rows to run; (): all)
    table: Callable[[Sequence[Row]], str]
    plot: Callable[[Sequence[Row]], Tensor] | None = None
    sheet: Callable[[Path, Report], Tensor] | None = None  # a picture of images: (own folder, report)


BENCHMARKS = {
    "baking": Benchmark(lambda folder, report, only: baking.baking_bench(
        baking.BakingBench(), folder / "baking", report, only), baking.table),
    "choosing": Benchmark(lambda folder, report, only: choosing.choosing_bench(
        choosing.ChoosingBench(), folder / "choosing", report, only), choosing.table),
    "copies": Benchmark(lambda folder, report, only: copies.copies_bench(
        copies.CopiesBench(), folder / "copies", report, only), copies.table),
    "exact": Benchmark(lambda folder, report, only: exact.exact_bench(
        exact.ExactBench(), folder / "exact", report, only), exact.table),
    "faces": Benchmark(lambda folder, report, only: faces.face_bench(faces.FaceBench(), folder / "faces", report, only),
                       faces.table, faces.plot, partial(face_sheet.face_sheet, faces.FaceBench())),
    "fewsteps": Benchmark(lambda folder, report, only: few_steps.few_step_bench(
        few_steps.FewStepBench(), folder / "fewsteps", report, only), few_steps.table),
    "labelmaps": Benchmark(lambda folder, report, only: label_maps.label_bench(label_maps.LabelBench(), report),
                           label_maps.table),
    "latent": Benchmark(lambda folder, report, only: latent.latent_bench(latent.LatentBench(), folder / "latent", report),
                        latent.table),
    "photographs": Benchmark(lambda folder, report, only: photographs.photograph_bench(
        photographs.PhotographBench(), folder / "photographs", report), photographs.table, photographs.plot),
    "restoration": Benchmark(lambda folder, report, only: restoration.restoration_bench(
        restoration.RestorationBench(), folder / "restoration", report), restoration.table, restoration.sheet),
    "rules": Benchmark(lambda folder, report, only: rules.rules_bench(rules.RulesBench(), report), rules.table),
    "speed": Benchmark(lambda folder, report, only: speed.speed(report), speed.table),
    "taste": Benchmark(lambda folder, report, only: taste.taste_bench(taste.TasteBench(), folder / "taste", report),
                       taste.table),
    "throughput": Benchmark(lambda folder, report, only: throughput.throughput_bench(
        throughput.ThroughputBench(), folder / "throughput", report), throughput.table),
    "tours": Benchmark(lambda folder, report, only: tours.tour_bench(tours.TourBench(), report), tours.table),
    "transfer": Benchmark(lambda folder, report, only: transfer.transfer_bench(
        transfer.TransferBench(), folder / "transfer", report, only), transfer.table, transfer.plot),
    "variety": Benchmark(lambda folder, report, only: variety.variety_bench(
        variety.VarietyBench(), folder / "variety", report), variety.table),
}


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure a benchmark, or resume it, then write and print its table."""
    name = "quick" if options.quick else options.table
    out = options.out or options.folder / name
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        rows = benchmark.measure(options.folder, report, options.row)
        text = benchmark.table(rows)
        write_report(out, rows, text)
        if benchmark.plot:
            save_picture(benchmark.plot(rows), out.with_suffix(".png"))
        if benchmark.sheet and not options.row:
            save_picture(benchmark.sheet(options.folder / name, report), out.with_name(f"{out.stem}_sheet.png"))
    else:
        text = tables.write_table(name, run_table(tables.read_table(name), options.folder, report, options.row), out)
    print(text)
