"""`blip-qformer finetune`: the node's numbers from the command line, and files that the stock nodes load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip_qformer.cli.command_line import main as blip_qformer
from blip_qformer.cli.output import format_bytes
from blip_qformer.finetune import snapshots
from blip_qformer.finetune.loop import SubjectTuning
from blip_qformer.pipeline import save_pipeline, subject_finetune
from blip_qformer.subject import load_subject
from tests import tiny
from tests.images import bomb, damaged_avif

EDGE, STEPS, RATE = 64, 3, 1e-4
OPTIONS = [
    "--word",
    "dog",
    "--steps",
    str(STEPS),
    "--resolution",
    str(EDGE),
    "--learning-rate",
    str(RATE),
    "--rank",
    "2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model in the Hub layout."""
    return save_pipeline(tiny.random_pipeline(), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Three image files."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def finetune(model: Path, images: list[Path], output: Path, *options: str) -> int:
    """Run the command."""
    return blip_qformer(["finetune", str(model), *map(str, images), "--output", str(output), *OPTIONS, *options])


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_it_does_what_the_node_does(host, model, images, tmp_path, capsys, trains):
    assert finetune(model, images, tmp_path, "--validate-every", "0", "--trains", trains) == 0
    size = format_bytes((tmp_path / "dog.safetensors").stat().st_size)
    assert size.endswith(" kB")  # which as megabytes were "0.0 MB"
    assert f"Wrote {tmp_path / 'dog.safetensors'} ({size})." in capsys.readouterr().out
    (host.base / "models" / "blip_diffusion" / "finetuned").unlink(missing_ok=True)
    (host.base / "models" / "blip_diffusion" / "finetuned").symlink_to(model)
    loaded = dict(
        zip(("model", "clip", "vae", "qformer"), host.run("BLIPDiffusionLoader", checkpoint="finetuned"), strict=True)
    )
    image = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in images]) / 255
    options = {"steps": STEPS, "resolution": EDGE, "learning_rate": RATE, "rank": 2, "look_every": 0}
    _, subject, weights, *_ = host.run(
        "BLIPDiffusionSubjectFinetune", **loaded, image=image, subject_word="dog", trains=trains, **options
    )
    tuned = load_subject(tmp_path / "dog.safetensors")
    assert tuned.word == "dog"
    torch.testing.assert_close(tuned.vectors, subject.vectors, atol=1e-5, rtol=0)
    if trains == "low-rank":
        file = load_file(tmp_path / "dog-lora.safetensors")
        assert file.keys() == weights.keys()
        for name, tensor in file.items():  # AdamW's first steps blow rounding up, so that single numbers differ more
            assert (tensor - weights[name]).float().norm() <= 1e-2 * weights[name].float().norm(), name
        assert max(tensor.abs().max() for name, tensor in file.items() if "lora_up" in name) > 1e-3
        return
    checkpoint = load_file(tmp_path / "dog-checkpoint.safetensors")
    name = "input_blocks.0.0.weight"
    before = loaded["model"].model.diffusion_model.get_parameter(name)
    expected = before + weights["lora_unet_conv_in.diff"].float()
    torch.testing.assert_close(checkpoint[f"model.diffusion_model.{name}"].float(), expected, atol=5e-4, rtol=1e-3)


def test_it_writes_images_of_how_it_went(model, images, tmp_path, capsys):
    assert finetune(model, images, tmp_path, "--validate-every", "2", "--name", "rex") == 0
    assert Image.open(tmp_path / "rex-previews.png").size == (3 * EDGE, 3 * EDGE)  # before, after two and after three
    assert Image.open(tmp_path / "rex-curve.png").size == (768, 384)
    printed = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'rex-lora.safetensors'}" in printed
    assert [line.split(":")[0] for line in printed.splitlines() if "likeness" in line] == ["step 0", "step 2", "step 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "is no picture that can be read (cannot identify image file"),
        (b"", "is no picture that can be read (cannot identify image file"),
        ("truncated", "is no picture that can be read (image file is truncated"),
        (bomb(20_000), "has more than 179 million pixels: scale it down, or leave it out."),
        (damaged_avif(), "is no picture that can be read ("),
        (None, "check its name, or leave it out"),
        (b"<!DOCTYPE html>", "bad.png is a web page that was saved in place of the file itself: download"),
    ],
)
def test_a_file_that_is_no_image_is_named(model, images, tmp_path, capsys, content, message):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(images[0].read_bytes()[:3000] if content == "truncated" else content)
    assert finetune(model, [*images, bad], tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(bad) in error
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_to_is_named_before_the_training(model, images, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("blip_qformer.pipeline.subject_finetune.FinetuneRun.tune", lambda *_: pytest.fail("it trained"))
    for output in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert finetune(model, images, output) == 2
        assert f"{output} could not be written" in (error := capsys.readouterr().err)
        assert "a file is in the way: choose another folder." in error


def test_a_tiny_image_is_refused(model, tmp_path, capsys):
    Image.new("RGB", (40, 80)).save(tmp_path / "small.png")
    assert finetune(model, [tmp_path / "small.png"], tmp_path) == 2
    assert f"{tmp_path / 'small.png'}: The pictures are 40 x 80 pixels" in capsys.readouterr().err


def test_a_run_that_was_ended_goes_on(model, images, tmp_path, monkeypatch, capsys):
    """By Ctrl+C in the third step, and then on a full disk: nothing is lost before the files are written."""
    assert finetune(model, images, tmp_path / "whole", "--validate-every", "1") == 0
    monkeypatch.setattr(snapshots, "COST", float("inf"))  # one after each step, however fast they are
    monkeypatch.setattr(snapshots, "SECONDS", 0)
    loss = SubjectTuning.loss

    def interrupted(self, batch):
        if len(self.losses) == 2:
            raise KeyboardInterrupt
        return loss(self, batch)

    output = tmp_path / "ended"
    with monkeypatch.context() as patched:
        patched.setattr(SubjectTuning, "loss", interrupted)
        assert finetune(model, images, output, "--validate-every", "1") == 130
    with monkeypatch.context() as patched:
        patched.setattr(subject_finetune, "save_subject", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        assert finetune(model, images, output, "--validate-every", "1") == 2
    monkeypatch.setattr(SubjectTuning, "loss", lambda *_: pytest.fail("a step was made twice"))
    assert finetune(model, images, output, "--validate-every", "1") == 0
    assert sorted(path.name for path in output.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for path in output.glob("*.safetensors"):
        expected = load_file(tmp_path / "whole" / path.name)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())
    assert (output / "dog-curve.png").read_bytes() == (tmp_path / "whole" / "dog-curve.png").read_bytes()
