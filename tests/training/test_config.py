"""Runs' files: what is read, what is refused, and that every run of the repository is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blip_qformer.pipeline import new_pipeline
from blip_qformer.training.config import config_from, read_config
from blip_qformer.training.stages import find_stage, read_options
from mini.stages import STAGES
from tests import tiny
from tools.host import ROOT

PAPER_RUNS = sorted((ROOT / "blip_qformer" / "training" / "runs" / "blip_diffusion").glob("*.yaml"))
MODEL = ROOT / "mini" / "runs" / "model.yaml"
RUNS = [*PAPER_RUNS, *sorted(file for file in MODEL.parent.glob("*.yaml") if file != MODEL)]

TEXT = """
stage: subject
model: some/model
pairs: [some/pairs, "more/{000..291}.tar"]
output: some/output
steps: 5e3
batch_size: 16
learning_rate: 2e-6
mixed_precision: no
betas: [0.9, 98e-2]
gradient_checkpointing: true
networks: {unet: other/model}
options:
  data: {resolution: 256}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_becomes_settings(tmp_path):
    """YAML reads 2e-6 as text and no as false; here they are what is meant."""
    config = read_config(written(tmp_path, TEXT))
    assert (config.stage, config.model, config.output) == ("subject", "some/model", Path("some/output"))
    assert config.pairs == ("some/pairs", "more/{000..291}.tar")
    assert config.steps == 5000
    assert config.learning_rate == 2e-6
    assert config.mixed_precision == "no"
    assert config.betas == (0.9, 0.98)
    assert config.gradient_checkpointing is True
    assert config.networks == {"unet": "other/model"}
    assert config.options == {"data": {"resolution": 256}}
    assert config.schedule == "constant"


def test_one_place_of_pairs_needs_no_list():
    assert tiny.make_config(pairs="here").pairs == ("here",)


def test_the_sizes_of_a_model_may_lie_beside_the_run(tmp_path):
    (tmp_path / "model.yaml").write_text("vision: {width: 32}")
    config = read_config(written(tmp_path, TEXT.replace("some/model", "model.yaml")))
    assert config.model == {"vision": {"width": 32}}


def test_all_runs_of_the_repository_are_here():
    assert len(PAPER_RUNS) == 2
    assert len(RUNS) == 8


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.parent.name + "/" + file.stem)
def test_every_run_of_the_repository_fits_its_stage(file):
    config = read_config(file)
    read_options(find_stage(config.stage, STAGES), config)


def test_the_small_model_can_be_made(monkeypatch):
    monkeypatch.chdir(ROOT)  # where runs are started
    import yaml

    new_pipeline(yaml.safe_load(MODEL.read_text()), seed=0).check_widths()


def test_the_papers_own_runs():
    """The figures that the paper gives (arXiv 2305.14720, section 4.1), under the library's own stages."""
    first, second = map(read_config, PAPER_RUNS)
    assert (first.stage, second.stage) == ("multimodal", "subject")
    assert (second.steps, second.batch_size * 16, second.learning_rate) == (500_000, 16, 2e-6)
    options = read_options(find_stage("subject"), second)
    assert (options.data.resolution, options.dropout.subject, options.dropout.caption) == (512, 0.15, 0)
    assert (options.data.max_repetitions, options.dropout.projection, options.diffusion.min_snr_gamma) == (1, 0.1, 0)
    assert second.model == str(first.output / "model")


VALUES = {
    "stage": "subject",
    "model": "some/model",
    "pairs": "some/pairs",
    "output": "some/output",
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 1,
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"learning_rates": 1, "colour": 2},
            r"run.yaml sets colour, learning_rates \(did you mean learning_rate\?\), which a run does not have: choose",
        ),
        ({"steps": "many"}, "run.yaml sets steps to 'many', where a whole number, 1 or more, is needed."),
        ({"seed": "many"}, "run.yaml sets seed to 'many', where a whole number, 0 or more, is needed."),
        ({False: 1}, "run.yaml sets False, which a run does not have"),
        ({"steps": 1.5}, "sets steps to 1.5, where a whole number"),
        ({"steps": True}, "sets steps to True, where a whole number"),
        ({"steps": -1}, "sets steps to -1, where a whole number"),
        ({"steps": None}, "sets steps to None, where a whole number"),
        ({"steps": 0}, "sets steps to 0, where a whole number, 1 or more, is needed"),
        ({"batch_size": 0}, "sets batch_size to 0, where a whole number, 1 or more, is needed"),
        ({"gradient_accumulation": 0}, "sets gradient_accumulation to 0, where a whole number, 1 or more, is needed"),
        ({"seed": -1}, "sets seed to -1, where a whole number, 0 or more, is needed"),
        ({"learning_rate": "high"}, "sets learning_rate to 'high', where a number, 0 or more, is needed"),
        ({"learning_rate": float("nan")}, "sets learning_rate to nan, where a number"),
        ({"learning_rate": [1]}, r"sets learning_rate to \[1\], where a number"),
        ({"ema_decay": 1}, "sets ema_decay to 1, where a number, 0 or more and less than 1, is needed"),
        ({"betas": [0.9]}, r"sets betas to \[0.9\], where a list of two numbers is needed"),
        ({"betas": 0.9}, "sets betas to 0.9, where a list of two numbers is needed"),
        ({"schedule": "linear"}, "sets schedule to 'linear', where one of constant, cosine is needed"),
        ({"schedule": False}, "sets schedule to False, where one of constant, cosine is needed"),
        ({"mixed_precision": "fp8"}, "sets mixed_precision to 'fp8', where one of no, fp16, bf16 is needed"),
        ({"gradient_checkpointing": 1}, "sets gradient_checkpointing to 1, where true or false is needed"),
        ({"stage": 2}, "sets stage to 2, where a name is needed"),
        ({"model": 3}, "sets model to 3, where a folder, or a mapping of sizes, is needed"),
        ({"networks": {"unet": 3}}, r"sets networks to {'unet': 3}, where a mapping of names to folders is needed"),
        ({"pairs": []}, r"sets pairs to \[\], where a folder, a pattern of shards, or a list of them, is needed"),
        ({"pairs": [1]}, r"sets pairs to \[1\], where a folder, a pattern"),
        ({"output": 3}, "sets output to 3, where a folder is needed"),
        ({"options": [1]}, r"sets options to \[1\], where a mapping is needed"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_from(VALUES | changes, "run.yaml")


def test_what_is_missing_is_named():
    with pytest.raises(
        ValueError, match="run.yaml does not set batch_size, learning_rate, model, output, pairs, steps, w"
    ):
        config_from({"stage": "subject"}, "run.yaml")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"steps: [1", "is no YAML"),
        (b"- 1\n- 2", "is no mapping of names to values: see"),
        (b"\xff\xfe\x00", "is no YAML"),
    ],
)
def test_a_file_that_is_none_says_so(tmp_path, content, sentence):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_config(file)
    with pytest.raises(FileNotFoundError, match="There is no file .*gone.yaml: see blip_qformer/training/runs/"):
        read_config(tmp_path / "gone.yaml")


def test_a_missing_package_is_called_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ValueError, match="Reading a run's file needs the package pyyaml, .* run pip install pyyaml"):
        read_config(written(tmp_path, TEXT))


BILLION = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(10))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (BILLION, "stands for more than 10000 values, as its aliases"),
        ("model: &a [*a]", "is no YAML"),
        ("model: " + "[" * 20_000, "is no YAML"),
        ("gradient_checkpointing: !!bool x", "is no YAML"),
        ("steps: !!int x", "is no YAML"),
        ("steps: 2024-99-99", "is no YAML.*month must be in"),
        ("stage: !!python/name:os.system", "is no YAML"),
        ("stage: x\n" + "# \n" * 30_000, "more than 0.032 MB"),
        ("steps: " + "9" * 400, "sets steps to 9+.*, where a whole number, 1 or more"),
        ("learning_rate: 1" + "0" * 400, "sets learning_rate to 10+.*, where a number"),
        ("steps: 2024-01-02", "sets steps to datetime.date.*, where a whole number"),
        ("model: [a]", "sets model to .*, where a folder, or a mapping of sizes"),
        ("model: 5.yaml", "There is no file"),
    ],
)
def test_yaml_of_any_content_gives_one_sentence(tmp_path, line, sentence):
    file = written(tmp_path, TEXT + line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        read_config(file)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 500


def test_aliases_are_read(tmp_path):
    """A few of them are how people write what they need twice."""
    config = read_config(written(tmp_path, TEXT + "epsilon: &e 1e-7\nweight_decay: *e\n"))
    assert config.epsilon == config.weight_decay == 1e-7
