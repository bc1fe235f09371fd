"""`python -m mini` as a person types it; what is drawn and trained is small."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip_qformer.data.stream import PairStream
from blip_qformer.pipeline import load_pipeline, new_pipeline, save_pipeline
from mini.__main__ import main
from mini.evaluation import judges, report, tuned
from tests import tiny
from tests.artwork import TRAINED, write_artwork
from tests.mini.world.test_fetch import registry


@pytest.fixture(scope="module")
def artwork(tmp_path_factory) -> Path:
    return write_artwork(tmp_path_factory.mktemp("artwork"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_pipeline(tiny.random_pipeline(), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    small = {"steps": 2, "edge": 64, "candidates": 4}
    monkeypatch.setattr(report, "ReportSettings", partial(report.ReportSettings, blends=2, **small))
    monkeypatch.setattr(tuned, "TunedSettings", partial(tuned.TunedSettings, validate_every=1, rank=2, **small))
    monkeypatch.setattr(judges, "JudgesTraining", partial(judges.JudgesTraining, steps=3, batch_size=4))


def test_both_reports_are_written_and_the_judges_kept(artwork, model, tmp_path, capsys):
    target = tmp_path / "report"
    assert main(["evaluate", "report", str(model), str(artwork), str(target), "--things", "4", "--seed", "5"]) == 0
    text = (target / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("| drawn | identity, 1 of 4 | context, 1 of 8 | blending, steady |")
    assert "things 4, backgrounds 1, blends 2, steps 2" in text
    assert "seed 5." in text
    assert Image.open(target / "report.jpg").size == (4 * 128, 3 * 128)

    trained = (target / "judges.safetensors").read_bytes()
    assert main(["evaluate", "report", str(model), str(artwork), str(target), "--things", "4", "--seed", "5"]) == 0
    assert (target / "judges.safetensors").read_bytes() == trained
    assert (target / "report.md").read_text() == text
    assert "judges, step" not in capsys.readouterr().out

    given = ["--judges", str(target / "judges.safetensors"), "--things", "2"]
    assert main(["evaluate", "tuned", str(model), str(artwork), str(target), *given]) == 0
    assert "| 0 (zero-shot) |" in (target / "tuned.md").read_text()
    assert Image.open(target / "tuned.jpg").size == (4 * 128, 2 * 128)


@pytest.mark.parametrize("what", ["report", "tuned", "regions", "fidelity"])
def test_judges_that_are_not_there_get_one_sentence(artwork, model, tmp_path, capsys, what):
    missing = tmp_path / "judges.safetensors"
    assert main(["evaluate", what, str(model), str(artwork), str(tmp_path), "--judges", str(missing)]) == 2
    assert f"No judges are at {missing}" in capsys.readouterr().err
    missing.write_bytes(b"half of them")
    assert main(["evaluate", what, str(model), str(artwork), str(tmp_path), "--judges", str(missing)]) == 2
    assert f"{missing} does not hold these judges" in capsys.readouterr().err


def test_artwork_says_in_one_line_what_went_wrong(tmp_path, capsys):
    with registry({}) as url:
        assert main(["artwork", str(tmp_path), "--registry", url]) == 2
    assert capsys.readouterr().err == "python -m mini: The artwork could not be fetched: HTTP Error 404: Not Found\n"


def test_prepare_makes_pairs_of_artwork(artwork, tmp_path, capsys):
    words = ["--count", "4", "--edge", "32", "--seed", "3", "--workers", "1", "--alone"]
    assert main(["prepare", str(artwork), str(tmp_path), *words]) == 0
    assert "Wrote 4 pairs in 1 shards" in capsys.readouterr().out
    settings = json.loads((tmp_path / "index.json").read_text())["settings"]
    assert (settings["edge"], settings["seed"], settings["alone"], settings["source_size"]) == (32, 3, True, 4)
    assert next(iter(PairStream(tmp_path))).word in TRAINED


def test_prepare_of_another_folder_gets_one_sentence(tmp_path, capsys):
    assert main(["prepare", str(tmp_path), str(tmp_path / "pairs")]) == 2
    assert "fill it with 'python -m mini artwork" in capsys.readouterr().err


def test_pretrain_runs_a_stage_of_the_small_model(tmp_path, capsys):
    run = {"stage": "vision", "model": tiny.SIZES, "pairs": str(tiny.write_pairs(tmp_path / "pairs"))}
    run |= {"output": str(tmp_path / "out"), "steps": 2, "batch_size": 4, "learning_rate": 1e-4, "num_workers": 0}
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # all JSON is YAML
    tiny.reset_accelerate()
    assert main(["pretrain", str(tmp_path / "run.yaml"), "--steps", "1"]) == 0
    assert f"The trained model is in {tmp_path / 'out' / 'model'}" in capsys.readouterr().out
    load_pipeline(tmp_path / "out" / "model")


def test_place_queries_writes_a_model(tmp_path, capsys):
    sizes = tiny.SIZES | {"vision": {**tiny.SIZES["vision"], "image_size": 56}}  # 4 x 4 patches for 16 queries
    save_pipeline(new_pipeline(sizes, seed=0), tmp_path / "model")
    pairs = tiny.write_pairs(tmp_path / "pairs")
    assert main(["place-queries", str(tmp_path / "model"), str(pairs), str(tmp_path / "placed")]) == 0
    assert "placed" in capsys.readouterr().out
    before, after = (load_pipeline(tmp_path / name).encoder.state_dict() for name in ("model", "placed"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    linear = ("query", "key", "value", "output")
    assert {key.split(".")[-2] for key in changed} == set(linear)
    assert all(key.startswith("qformer.") and ".cross_attention." in key for key in changed)


def test_place_queries_says_what_does_not_fit(tmp_path, capsys):
    save_pipeline(new_pipeline(tiny.SIZES, seed=0), tmp_path / "model")
    pairs = tiny.write_pairs(tmp_path / "pairs")
    assert main(["place-queries", str(tmp_path / "model"), str(pairs), str(tmp_path / "placed")]) == 2
    assert capsys.readouterr().err.startswith("python -m mini: 16 queries cannot share out 2 x 2 patches")
    assert not (tmp_path / "placed").exists()
