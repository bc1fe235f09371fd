"""`blip-qformer evaluate` as a person types it; what is drawn is small."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from blip_qformer.cli import command_line as cli
from blip_qformer.pipeline import save_pipeline
from mini.evaluation import judges, tuned
from mini.evaluation import report as mini
from tests import tiny
from tests.artwork import write_artwork


@pytest.fixture(scope="module")
def artwork(tmp_path_factory) -> Path:
    return write_artwork(tmp_path_factory.mktemp("artwork"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_pipeline(tiny.random_parts(), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    small = {"steps": 2, "edge": 64, "candidates": 4}
    monkeypatch.setattr(mini, "Settings", partial(mini.Settings, blends=2, **small))
    monkeypatch.setattr(tuned, "TunedSettings", partial(tuned.TunedSettings, every=1, rank=2, **small))
    monkeypatch.setattr(judges, "JudgesTraining", partial(judges.JudgesTraining, steps=3, batch_size=4))


def test_both_reports_are_written_and_the_judges_kept(artwork, model, tmp_path, capsys):
    target = tmp_path / "report"
    assert cli.main(["evaluate", "mini", str(model), str(artwork), str(target), "--things", "4", "--seed", "5"]) == 0
    text = (target / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("| drawn | identity, 1 of 4 | context, 1 of 8 | blending, steady |")
    assert "things 4, places 1, blends 2, steps 2" in text
    assert "seed 5." in text
    assert Image.open(target / "report.jpg").size == (4 * 128, 3 * 128)

    trained = (target / "judges.safetensors").read_bytes()
    assert cli.main(["evaluate", "mini", str(model), str(artwork), str(target), "--things", "4", "--seed", "5"]) == 0
    assert (target / "judges.safetensors").read_bytes() == trained
    assert (target / "report.md").read_text() == text
    assert "judges, step" not in capsys.readouterr().out

    given = ["--judges", str(target / "judges.safetensors"), "--things", "2"]
    assert cli.main(["evaluate", "tuned", str(model), str(artwork), str(target), *given]) == 0
    assert "| 0 (zero-shot) |" in (target / "tuned.md").read_text()
    assert Image.open(target / "tuned.jpg").size == (4 * 128, 2 * 128)


@pytest.mark.parametrize("what", ["mini", "tuned"])
def test_judges_that_are_not_there_get_one_sentence(artwork, model, tmp_path, capsys, what):
    missing = tmp_path / "judges.safetensors"
    assert cli.main(["evaluate", what, str(model), str(artwork), str(tmp_path), "--judges", str(missing)]) == 2
    assert f"No judges are at {missing}" in capsys.readouterr().err
    missing.write_bytes(b"half of them")
    assert cli.main(["evaluate", what, str(model), str(artwork), str(tmp_path), "--judges", str(missing)]) == 2
    assert f"{missing} does not hold these judges" in capsys.readouterr().err
