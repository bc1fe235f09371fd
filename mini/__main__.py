"""The small model, from its artwork to its report: ``python -m mini COMMAND``.

``make mini`` runs the commands in turn, all but ``evaluate tuned``. Each can be interrupted and continues where it was.

Worker processes import this module again, so each command imports the trainer, diffusers and the like for itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from blip_qformer.atomic import atomic_files
from blip_qformer.cli.command_line import run_command

from .world.artwork import LISTING, SPLITS
from .world.fetch import REGISTRY, fill

if TYPE_CHECKING:
    from PIL import Image

    from .evaluation.fidelity import FidelityReport
    from .evaluation.judges import Judges
    from .evaluation.regions import RegionsReport
    from .evaluation.report import Report
    from .evaluation.tuned import TunedReport

REPORT, SHEET = "report.md", "report.jpg"
TUNED_REPORT, TUNED_SHEET = "tuned.md", "tuned.jpg"
FIDELITY_REPORT, FIDELITY_SHEET = "fidelity.md", "fidelity.jpg"
REGIONS_REPORT, REGIONS_SHEET, REGIONS_IMAGES = "regions.md", "regions.jpg", "regions"
JUDGES = "judges.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of this process if None.

    Returns:
        The exit code, see :func:`~blip_qformer.cli.command_line.run_command`.
    """
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mini", description="Make the small model, and measure it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    artwork = commands.add_parser("artwork", help="fill an artwork folder from the npm registry")
    artwork.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to fill, made if missing")
    artwork.add_argument("--registry", metavar="URL", default=REGISTRY, help=f"npm's, or a mirror of it ({REGISTRY})")
    artwork.set_defaults(command=_artwork)

    pairs = commands.add_parser("prepare", help="make training pairs of artwork, as shards")
    pairs.add_argument("artwork", metavar="ARTWORK", type=Path, help=f"an artwork folder, which holds {LISTING}")
    pairs.add_argument("target", metavar="DST", type=Path, help="the folder to write into, made if missing")
    pairs.add_argument("--count", metavar="N", type=int, default=10_000, help="how many pairs (10000)")
    pairs.add_argument("--edge", metavar="PIXELS", type=int, default=256, help="of the square targets (256)")
    pairs.add_argument("--split", choices=SPLITS, default="train", help="which words and styles (train)")
    pairs.add_argument("--alone", action="store_true", help="targets show the subject alone, for the appearance stage")
    pairs.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes (one a core)")
    pairs.add_argument("--seed", metavar="N", type=int, default=0, help="of what is random (0)")
    pairs.set_defaults(command=_prepare)

    pretrain = commands.add_parser(
        "pretrain",
        help="train a stage from a run's file",
        description="Train one stage, one of the paper's or of the small model's own, as a run's YAML file says. For "
        "several processes: accelerate launch -m mini pretrain CONFIG.",
    )
    pretrain.add_argument("config", metavar="CONFIG", type=Path, help="a file such as mini/runs/2-vision.yaml")
    pretrain.add_argument("--steps", metavar="N", type=int, help="stop there for today; without it, the run goes on")
    pretrain.set_defaults(command=_pretrain)

    queries = commands.add_parser("place-queries", help="let each query begin at its own region of the image")
    queries.add_argument("model", metavar="MODEL", type=Path, help="a model's folder, its image encoder trained")
    queries.add_argument("pairs", metavar="PAIRS", help="a folder of shards, or their names")
    queries.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    queries.set_defaults(command=_initialise_queries)

    _add_evaluate(commands)
    return parser


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    kinds = commands.add_parser(
        "evaluate",
        help="measure how well a model draws what it was shown",
        description="Draw things the small model never saw and judge the pictures.",
    ).add_subparsers(required=True, metavar="WHAT")

    report = kinds.add_parser("report", help="identity, context and blending, beside three baselines")
    tuned = kinds.add_parser("tuned", help="what fine-tuning on each held-out thing adds")
    fidelity = kinds.add_parser("fidelity", help="how far the scores of Subject Fidelity can be trusted")
    regions = kinds.add_parser("regions", help="several held-out things in one picture, beside the stock mask graph")
    for parser, files in (
        (report, f"{REPORT} and {SHEET}"),
        (tuned, f"{TUNED_REPORT} and {TUNED_SHEET}"),
        (fidelity, f"{FIDELITY_REPORT} and {FIDELITY_SHEET}"),
        (regions, f"{REGIONS_REPORT}, {REGIONS_SHEET} and the pictures"),
    ):
        parser.add_argument("model", metavar="MODEL", type=Path, help="its folder, in the Hub layout")
        parser.add_argument("artwork", metavar="ARTWORK", type=Path, help="an artwork folder")
        parser.add_argument("target", metavar="DST", type=Path, help=f"the folder for {files}")

    report.add_argument("--judges", metavar="FILE", type=Path, help=f"trained judges; without, DST/{JUDGES} is trained")
    report.add_argument("--things", metavar="N", type=int, default=60, help="held-out things to draw (60)")
    report.add_argument("--seed", metavar="N", type=int, default=11, help="of what is drawn (11)")
    report.set_defaults(command=_evaluate_report)

    tuned.add_argument("--judges", metavar="FILE", type=Path, required=True, help="what evaluate report has trained")
    tuned.add_argument("--things", metavar="N", type=int, default=16, help="held-out things to learn (16)")
    tuned.add_argument("--learning-rate", type=float, default=5e-5, help="of the fine-tuning (5e-5)")
    tuned.set_defaults(command=_evaluate_tuned)

    fidelity.add_argument("--judges", metavar="FILE", type=Path, required=True, help="what evaluate report has trained")
    fidelity.add_argument("--things", metavar="N", type=int, default=60, help="held-out things to draw (60)")
    fidelity.set_defaults(command=_evaluate_fidelity)

    regions.add_argument(
        "--judges", metavar="FILE", type=Path, help=f"trained judges; without, DST/{JUDGES} is trained"
    )
    regions.add_argument("--pictures", metavar="N", type=int, default=20, help="of two things, and of three each (20)")
    regions.set_defaults(command=_evaluate_regions)


def _artwork(arguments: argparse.Namespace) -> None:
    try:
        count = fill(arguments.folder, registry=arguments.registry)
    except (OSError, HTTPException, ValueError, tarfile.TarError) as error:
        raise ValueError(f"The artwork could not be fetched: {error}") from error
    print(f"{count} pictures in {arguments.folder}")


def _prepare(arguments: argparse.Namespace) -> None:
    from blip_qformer.data.prepare import prepare

    from .world.source import World

    world = World(arguments.artwork, arguments.split, arguments.count, arguments.edge, arguments.alone)
    made = prepare(world, arguments.target, arguments.seed, arguments.workers, settings=world.settings)
    print(f"Wrote {made.pairs} pairs in {made.shards} shards to {arguments.target}.")
    for reason, count in made.skipped.items():
        print(f"Skipped {count}: {reason}.")


def _pretrain(arguments: argparse.Namespace) -> None:
    from blip_qformer.training.config import read_config
    from blip_qformer.training.trainer import train

    from .init import initialise
    from .stages import STAGES
    from .stages.cpu_attention import fast_attention

    config = read_config(arguments.config)
    model = train(config, arguments.steps, stages=STAGES, initialise=initialise, step_context=fast_attention)
    print(f"The trained model is in {model}.")


def _initialise_queries(arguments: argparse.Namespace) -> None:
    from .init.placed_queries import initialise_saved_model

    initialise_saved_model(arguments.model, arguments.pairs, arguments.target)
    print(f"The model whose queries begin at their own regions of the image is in {arguments.target}.")


def _evaluate_report(arguments: argparse.Namespace) -> None:
    from blip_qformer.pipeline import load_pipeline

    from .evaluation.report import ReportSettings, evaluate

    arguments.target.mkdir(parents=True, exist_ok=True)
    judges = _judges(arguments.judges, arguments.artwork, arguments.target)
    pipeline = load_pipeline(arguments.model)
    for network in pipeline.networks.values():
        network.eval().requires_grad_(False)
    settings = ReportSettings(things=arguments.things, seed=arguments.seed)
    report, sheet = evaluate(pipeline, judges, arguments.artwork, settings)
    _write(report, sheet, arguments.target / REPORT, arguments.target / SHEET)


def _judges(given: Path | None, artwork: Path, target: Path) -> Judges:
    """Load the judges that were named, or else those kept beside the report, which are trained the first time."""
    from .evaluation.judges import JudgesTraining, load_judges, save_judges, train_judges

    if given and not given.is_file():
        raise ValueError(f"No judges are at {given}: leave --judges out, and they are trained.")
    file = given or target / JUDGES
    if not file.is_file():
        save_judges(train_judges(artwork, JudgesTraining()), file)
    return load_judges(file)


def _evaluate_tuned(arguments: argparse.Namespace) -> None:
    from blip_qformer.pipeline import load_pipeline

    from .evaluation.judges import load_judges
    from .evaluation.tuned import TunedSettings, evaluate_tuned

    if not arguments.judges.is_file():
        raise ValueError(f"No judges are at {arguments.judges}: evaluate report trains them.")
    arguments.target.mkdir(parents=True, exist_ok=True)
    settings = TunedSettings(things=arguments.things, learning_rate=arguments.learning_rate)
    judges = load_judges(arguments.judges)
    report, sheet = evaluate_tuned(load_pipeline(arguments.model), judges, arguments.artwork, settings)
    _write(report, sheet, arguments.target / TUNED_REPORT, arguments.target / TUNED_SHEET)


def _evaluate_fidelity(arguments: argparse.Namespace) -> None:
    from blip_qformer.pipeline import load_pipeline

    from .evaluation.fidelity import FidelitySettings, evaluate_fidelity
    from .evaluation.judges import load_judges

    if not arguments.judges.is_file():
        raise ValueError(f"No judges are at {arguments.judges}: evaluate report trains them.")
    arguments.target.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(arguments.model)
    for network in pipeline.networks.values():
        network.eval().requires_grad_(False)
    settings = FidelitySettings(things=arguments.things)
    judges = load_judges(arguments.judges)
    report, sheet = evaluate_fidelity(pipeline, judges, arguments.artwork, settings, arguments.target)
    _write(report, sheet, arguments.target / FIDELITY_REPORT, arguments.target / FIDELITY_SHEET)


def _evaluate_regions(arguments: argparse.Namespace) -> None:
    from blip_qformer.pipeline import load_pipeline

    from .evaluation.regions import RegionsSettings, evaluate_regions

    images = arguments.target / REGIONS_IMAGES
    images.mkdir(parents=True, exist_ok=True)
    judges = _judges(arguments.judges, arguments.artwork, arguments.target)
    pipeline = load_pipeline(arguments.model)
    for network in pipeline.networks.values():
        network.eval().requires_grad_(False)
    settings = RegionsSettings(pictures=arguments.pictures)
    report, sheet = evaluate_regions(pipeline, judges, arguments.artwork, images, settings)
    _write(report, sheet, arguments.target / REGIONS_REPORT, arguments.target / REGIONS_SHEET)


def _write(
    report: Report | TunedReport | FidelityReport | RegionsReport,
    sheet: Image.Image,
    table_file: Path,
    sheet_file: Path,
) -> None:
    """Write the table with its settings, print it too, and write the contact sheet."""
    settings = ", ".join(f"{name} {value}" for name, value in asdict(report.settings).items())
    text = f"{report.table()}\n\nSettings: {settings}.\n"
    with atomic_files([table_file, sheet_file]) as (table, image):
        table.write_text(text, encoding="utf-8")
        sheet.save(image, format="JPEG", quality=90)  # the temporary name has another suffix
    print(text)


if __name__ == "__main__":
    sys.exit(main())
