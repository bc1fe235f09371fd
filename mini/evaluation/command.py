"""`blip-qformer evaluate mini | tuned`: what the small model, and fine-tuning it, is worth."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from blip_qformer.extras import import_extra

if TYPE_CHECKING:
    from .report import Report
    from .tuned import TunedReport


REPORT = "report.md"


SHEET = "report.jpg"


JUDGES = "judges.safetensors"


TUNED_REPORT, TUNED_SHEET = "tuned.md", "tuned.jpg"


def add_evaluate_command(commands: argparse._SubParsersAction) -> None:
    """Add `evaluate` to a parser's commands."""
    parser = commands.add_parser(
        "evaluate",
        help="measure how well a model draws what it was shown",
        description="Draw things the small model never saw and judge the pictures: identity, context and blending, "
        "beside three baselines.",
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    mini = kinds.add_parser("mini", help="the small model, on the held-out things of its world")
    mini.add_argument("model", metavar="MODEL", type=Path, help="its folder, in the Hub layout")
    mini.add_argument("artwork", metavar="ARTWORK", type=Path, help="an artwork folder, from mini/world/fetch.py")
    mini.add_argument("target", metavar="DST", type=Path, help=f"the folder for {REPORT} and {SHEET}")
    mini.add_argument("--judges", metavar="FILE", type=Path, help=f"trained judges; without, DST/{JUDGES} is trained")
    mini.add_argument("--things", metavar="N", type=int, default=60, help="held-out things to draw (60)")
    mini.add_argument("--seed", metavar="N", type=int, default=11, help="of what is drawn (11)")
    mini.set_defaults(command=_evaluate_mini)

    tuned = kinds.add_parser("tuned", help="fine-tuning of the small model, on held-out things of its world")
    tuned.add_argument("model", metavar="MODEL", type=Path, help="its folder, in the Hub layout")
    tuned.add_argument("artwork", metavar="ARTWORK", type=Path, help="an artwork folder, from mini/world/fetch.py")
    tuned.add_argument("target", metavar="DST", type=Path, help=f"the folder for {TUNED_REPORT} and {TUNED_SHEET}")
    tuned.add_argument("--judges", metavar="FILE", type=Path, required=True, help="what evaluate mini has trained")
    tuned.add_argument("--things", metavar="N", type=int, default=16, help="held-out things to learn (16)")
    tuned.add_argument("--learning-rate", type=float, default=5e-5, help="of the fine-tuning (5e-5)")
    tuned.set_defaults(command=_evaluate_tuned)


def _evaluate_mini(arguments: argparse.Namespace) -> None:
    """`evaluate mini`: draw, judge, write the report."""
    import_extra("diffusers", "Evaluating")
    from blip_qformer.pipeline import load_pipeline

    from .judges import JudgesTraining, load_judges, save_judges, train_judges
    from .report import Settings, evaluate

    arguments.target.mkdir(parents=True, exist_ok=True)
    file = arguments.judges or arguments.target / JUDGES
    if not file.is_file():
        if arguments.judges:
            raise ValueError(f"No judges are at {file}: leave --judges out, and they are trained.")
        save_judges(train_judges(arguments.artwork, JudgesTraining()), file)
    pipeline = load_pipeline(arguments.model)
    for network in pipeline.networks.values():
        network.eval().requires_grad_(False)
    settings = Settings(things=arguments.things, seed=arguments.seed)
    report, sheet = evaluate(pipeline, load_judges(file), arguments.artwork, settings)
    _write(report, sheet, arguments.target / REPORT, arguments.target / SHEET)


def _evaluate_tuned(arguments: argparse.Namespace) -> None:
    """`evaluate tuned`: fine-tune, judge, write the report."""
    for name in ("diffusers", "accelerate"):
        import_extra(name, "Evaluating")
    from blip_qformer.pipeline import load_pipeline

    from .judges import load_judges
    from .tuned import TunedSettings, evaluate_tuned

    if not arguments.judges.is_file():
        raise ValueError(f"No judges are at {arguments.judges}: evaluate mini trains them.")
    arguments.target.mkdir(parents=True, exist_ok=True)
    settings = TunedSettings(things=arguments.things, learning_rate=arguments.learning_rate)
    judges = load_judges(arguments.judges)
    report, sheet = evaluate_tuned(load_pipeline(arguments.model), judges, arguments.artwork, settings)
    _write(report, sheet, arguments.target / TUNED_REPORT, arguments.target / TUNED_SHEET)


def _write(report: Report | TunedReport, sheet: Image.Image, table_file: Path, sheet_file: Path) -> None:
    """The table with its settings, which is printed too, and the contact sheet."""
    settings = ", ".join(f"{name} {value}" for name, value in asdict(report.settings).items())
    text = f"{report.table()}\n\nSettings: {settings}.\n"
    table_file.write_text(text, encoding="utf-8")
    sheet.save(sheet_file, quality=90)
    print(text)
