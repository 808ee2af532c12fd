"""The door of `ppap bench`: one table by its name, written as Markdown and JSON."""
import argparse

from ppap_core.io.files import write_bytes, write_json

from . import label_maps, latent, rules, speed, tables, tours
from .training import Report


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure a table, or go on with it, and write and print it."""
    name = "quick" if options.quick else options.table
    out = options.out or options.folder / name
    if name == "speed":
        rows, table = speed.speed(report), speed.table
    elif name == "latent":
        rows, table = latent.latent_bench(latent.LatentBench(), options.folder / "latent", report), latent.table
    elif name == "tours":
        rows, table = tours.tour_bench(tours.TourBench(), report), tours.table
    elif name == "labelmaps":
        rows, table = label_maps.label_bench(label_maps.LabelBench(), report), label_maps.table
    elif name == "rules":
        rows, table = rules.rules_bench(rules.RulesBench(), report), rules.table
    else:
        about = tables.read_table(name)
        rows = tables.bench(about, options.folder, report, options.row)
        tables.write_table(about, rows, out)
        print(tables.markdown(about, rows))
        return
    write_json(out.with_suffix(".json"), rows)
    write_bytes(out.with_suffix(".md"), table(rows).encode())
    print(table(rows))
