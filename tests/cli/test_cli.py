"""The command line: what it writes, what it says, and what it leaves alone."""

import builtins
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from blip_qformer.checkpoint import open_checkpoint
from blip_qformer.checkpoint.ldm_keys import controlnet_to_ldm, stable_diffusion_checkpoint
from blip_qformer.cli.command_line import CHECKPOINT_NAME, CONTROLNET_NAME, QFORMER_NAME, main
from tests import oracle
from tests.random_weights import write_finetuned, write_hub_folder, write_lavis_folder
from tools.host import comfyui_path

ROOT = Path(__file__).resolve().parent.parent
BOTH = sorted([CHECKPOINT_NAME, QFORMER_NAME])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small reference pipeline with random weights."""
    return oracle.pipeline(oracle.SMALL, tmp_path_factory.mktemp("tokenizer"), comfyui_path())


@pytest.fixture(scope="module")
def sources(pipeline, tmp_path_factory):
    """The same weights in the three published layouts, and a Q-Former alone."""
    folder = tmp_path_factory.mktemp("sources")
    subject = torch.randn(1, 16, oracle.SMALL.width)
    hub = write_hub_folder(pipeline, folder / "hub")
    assert main(["convert", str(hub), str(folder / "converted")]) == 0
    (folder / "converted" / QFORMER_NAME).rename(folder / "q-former.safetensors")
    return {
        "Hub folder": hub,
        "original (LAVIS) folder": write_lavis_folder(pipeline, folder / "lavis", subject),
        "fine-tuned file": write_finetuned(pipeline, folder / "checkpoint_40.pth", subject),
        "BLIP-2 Q-Former file": folder / "q-former.safetensors",
    }


@pytest.fixture(scope="module")
def with_controlnet(pipeline, tmp_path_factory):
    """The Hub folder that brings a ControlNet."""
    return write_hub_folder(
        pipeline, tmp_path_factory.mktemp("canny") / "hub", controlnet=oracle.controlnet(oracle.SMALL)
    )


@pytest.fixture
def hub(sources, tmp_path):
    """A Hub folder that a test may damage."""
    return Path(shutil.copytree(sources["Hub folder"], tmp_path / "hub"))


def assert_one_line_refusal(code: int, capsys: pytest.CaptureFixture, *words: str) -> None:
    """The command failed with one line on stderr that holds these words, and printed nothing else."""
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("blip-qformer: ")
    for word in words:
        assert word in printed.err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_convert_writes_both_files_in_the_asked_precision(pipeline, sources, tmp_path, capsys, dtype):
    options = [] if dtype == "float16" else ["--dtype", dtype]  # float16 is the default
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path / "new" / "folder"), *options]) == 0
    folder, torch_dtype = tmp_path / "new" / "folder", getattr(torch, dtype)
    assert sorted(os.listdir(folder)) == BOTH

    expected = stable_diffusion_checkpoint(
        pipeline.unet.state_dict(), pipeline.text_encoder.state_dict(), pipeline.vae.state_dict()
    )
    written = load_file(folder / CHECKPOINT_NAME)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor.to(torch_dtype)) for name, tensor in expected.items())

    source, qformer = open_checkpoint(sources["Hub folder"]), open_checkpoint(folder / QFORMER_NAME)
    assert qformer.format == "BLIP-2 Q-Former file"
    assert qformer.encoder_config == source.encoder_config
    assert qformer.encoder_weights.keys() == source.encoder_weights.keys()
    for name, tensor in source.encoder_weights.items():
        assert torch.equal(qformer.encoder_weights[name], tensor.to(torch_dtype))

    printed = capsys.readouterr().out
    assert f"Wrote {folder / CHECKPOINT_NAME} (" in printed
    assert f"Wrote {folder / QFORMER_NAME} (" in printed
    assert f", {dtype})." in printed


def test_every_layout_converts_to_the_same_bytes(sources, tmp_path, capsys):
    for number, layout in enumerate(["Hub folder", "original (LAVIS) folder", "fine-tuned file"]):
        capsys.readouterr()
        assert main(["convert", str(sources[layout]), str(tmp_path / str(number))]) == 0
        for name in BOTH:
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
        subject = f"{sources[layout]} also holds a tuned subject [1, 16, {oracle.SMALL.width}]"
        assert (subject in capsys.readouterr().out) == (layout != "Hub folder")


def test_convert_says_that_a_small_model_is_not_for_the_stock_loader(sources, tmp_path, capsys):
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path)]) == 0
    assert (
        "Note: CheckpointLoaderSimple loads only SD1.5's own sizes, and this has U-Net width 32 instead of 320, U-Net"
        in (capsys.readouterr().out)
    )


def test_convert_writes_a_controlnet_for_the_stock_loader_and_says_where_it_goes(with_controlnet, tmp_path, capsys):
    assert main(["convert", str(with_controlnet), str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted([*BOTH, CONTROLNET_NAME])
    written = load_file(tmp_path / CONTROLNET_NAME)
    expected = controlnet_to_ldm(oracle.controlnet(oracle.SMALL).state_dict())
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in expected.items())
    printed = capsys.readouterr().out
    assert f"Wrote {tmp_path / CONTROLNET_NAME} (" in printed
    assert f"{CONTROLNET_NAME} goes into models/controlnet, for the stock ControlNetLoader." in printed


def test_an_existing_controlnet_stops_all_unless_forced(with_controlnet, tmp_path, capsys):
    (tmp_path / CONTROLNET_NAME).write_bytes(b"mine")
    code = main(["convert", str(with_controlnet), str(tmp_path)])
    assert_one_line_refusal(code, capsys, str(tmp_path / CONTROLNET_NAME), "exists already", "--force")
    assert os.listdir(tmp_path) == [CONTROLNET_NAME]
    assert main(["convert", str(with_controlnet), str(tmp_path), "--force"]) == 0
    assert load_file(tmp_path / CONTROLNET_NAME)


def test_room_is_looked_for_with_the_controlnet(sources, with_controlnet, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = sum(file.stat().st_size for file in sources["Hub folder"].glob("*/*.bin")) // 2 + 10**5  # enough for two
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free, 0, free))
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path / "two")]) == 0
    capsys.readouterr()
    code = main(["convert", str(with_controlnet), str(tmp_path / "three")])
    assert_one_line_refusal(code, capsys, f"{tmp_path} has {free} bytes free and ", "make room")
    assert os.listdir(tmp_path) == ["two"]


def test_a_controlnet_that_lacks_tensors_is_refused_before_anything_is_written(with_controlnet, tmp_path, capsys):
    hub = shutil.copytree(with_controlnet, tmp_path / "hub")
    file = hub / "controlnet" / "diffusion_pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    del weights["controlnet_mid_block.weight"]
    torch.save(weights, file)
    code = main(["convert", str(hub), str(tmp_path / "new")])
    assert_one_line_refusal(code, capsys, "The ControlNet lacks tensors", "controlnet_mid_block.weight")
    assert not (tmp_path / "new").exists()


def test_a_controlnet_that_cannot_be_read_is_told_of(with_controlnet, tmp_path, capsys):
    hub = shutil.copytree(with_controlnet, tmp_path / "hub")
    file = hub / "controlnet" / "diffusion_pytorch_model.bin"
    file.write_bytes(b"")
    assert main(["convert", str(hub), str(tmp_path / "new")]) == 0
    assert sorted(os.listdir(tmp_path / "new")) == BOTH
    assert f"Note: {file} is empty" in capsys.readouterr().out


def test_the_stock_loader_takes_a_converted_controlnet_with_nothing_missing_or_left_over(host, caplog):
    """At SD1.5's own size, every weight a view of one number: what is built and loaded is the host's affair."""
    import comfy.controlnet

    with torch.device("meta"):
        weights = ControlNetModel(cross_attention_dim=768).state_dict()
    converted = {
        name: torch.tensor(number / 1024, dtype=torch.float16).expand(tensor.shape)
        for number, (name, tensor) in enumerate(controlnet_to_ldm(weights).items(), start=1)
    }
    caplog.set_level(logging.DEBUG)
    loaded = comfy.controlnet.load_controlnet_state_dict(dict(converted)).control_model.state_dict()
    assert [line for line in caplog.messages if "controlnet keys" in line or "leftover" in line] == []
    assert {name: tensor.shape for name, tensor in loaded.items()} == {n: t.shape for n, t in converted.items()}
    assert all(loaded[name].flatten()[0] == tensor.flatten()[0] for name, tensor in converted.items())


def test_a_qformer_alone_converts_to_a_qformer_alone_and_says_so(sources, tmp_path, capsys):
    source = sources["BLIP-2 Q-Former file"]
    assert main(["convert", str(source), str(tmp_path), "--dtype", "bfloat16"]) == 0
    assert os.listdir(tmp_path) == [QFORMER_NAME]
    assert {tensor.dtype for tensor in load_file(tmp_path / QFORMER_NAME).values()} == {torch.bfloat16}
    printed = capsys.readouterr().out
    assert f"{source} (BLIP-2 Q-Former file) has no U-Net, so there is no {CHECKPOINT_NAME} to write." in printed


@pytest.mark.parametrize("existing", BOTH)
def test_one_existing_target_stops_both_unless_forced(sources, tmp_path, capsys, existing):
    (tmp_path / existing).write_bytes(b"mine")
    code = main(["convert", str(sources["Hub folder"]), str(tmp_path)])
    assert_one_line_refusal(code, capsys, str(tmp_path / existing), "exists already", "--force")
    assert os.listdir(tmp_path) == [existing]
    assert (tmp_path / existing).read_bytes() == b"mine"

    assert main(["convert", str(sources["Hub folder"]), str(tmp_path), "--force"]) == 0
    assert sorted(os.listdir(tmp_path)) == BOTH
    assert load_file(tmp_path / existing)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_folder_should_be_is_refused(sources, tmp_path, capsys, below):
    (tmp_path / "taken").write_bytes(b"mine")
    code = main(["convert", str(sources["Hub folder"]), str(tmp_path / "taken" / below)])
    assert_one_line_refusal(code, capsys, f"{tmp_path / 'taken'} is a file", "choose another name")
    assert (tmp_path / "taken").read_bytes() == b"mine"


def test_room_for_both_files_is_looked_for_before_the_folder_is_made(sources, tmp_path, capsys, monkeypatch):
    free = sum(file.stat().st_size for file in [*sources["Hub folder"].glob("*/*.bin")]) // 2 - 10**6
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free, 0, free))
    code = main(["convert", str(sources["Hub folder"]), str(tmp_path / "new")])
    assert_one_line_refusal(code, capsys, f"{tmp_path} has {free} bytes free and ", "make room")
    assert os.listdir(tmp_path) == []


def test_a_folder_without_a_vae_is_refused_before_anything_is_written(hub, tmp_path, capsys):
    shutil.rmtree(hub / "vae")
    assert_one_line_refusal(main(["convert", str(hub), str(tmp_path / "new")]), capsys, str(hub), "has no vae")
    assert not (tmp_path / "new").exists()


def test_networks_that_cannot_be_read_are_not_mistaken_for_a_qformer_alone(hub, tmp_path, capsys):
    for file in hub.glob("[uvt]*/*.bin"):
        file.write_bytes(file.read_bytes()[:1000])
    unet = str(hub / "unet" / "diffusion_pytorch_model.bin")
    assert_one_line_refusal(main(["convert", str(hub), str(tmp_path / "new")]), capsys, unet)
    assert not (tmp_path / "new").exists()


def test_a_unet_of_another_kind_is_refused_before_anything_is_written(hub, tmp_path, capsys):
    file = hub / "unet" / "diffusion_pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | {"add_embedding.linear_1.weight": torch.zeros(2, 2)}, file)
    code = main(["convert", str(hub), str(tmp_path / "new")])
    assert_one_line_refusal(code, capsys, "add_embedding.linear_1.weight", "U-Net")
    assert not (tmp_path / "new").exists()


def test_a_weight_too_large_for_float16_is_refused_and_float32_takes_it(hub, tmp_path, capsys):
    file = hub / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    weights["conv_in.bias"][0] = 1e6
    torch.save(weights, file)
    assert main(["convert", str(hub), str(tmp_path / "half")]) == 2
    assert "input_blocks.0.0.bias holds 1e+06, too large for torch.float16" in capsys.readouterr().err
    assert os.listdir(tmp_path / "half") == []
    assert main(["convert", str(hub), str(tmp_path / "full"), "--dtype", "float32"]) == 0
    assert load_file(tmp_path / "full" / CHECKPOINT_NAME)["model.diffusion_model.input_blocks.0.0.bias"][0] == 1e6


def test_an_interruption_leaves_nothing_half_written(sources, tmp_path, capsys, monkeypatch):
    def interrupt(descriptor):
        assert len(os.listdir(tmp_path)) == 1  # the temporary file
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path)]) == 130
    assert "interrupted; nothing half-written was left behind.\n" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_progress_is_a_bar_that_ends_full(sources, tmp_path, capsys):
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path)]) == 0
    bars = capsys.readouterr().err.strip().split("\r")
    for name in BOTH:
        assert [bar for bar in bars if bar.startswith(f"{name}: 100%")]


def test_progress_is_lines_where_there_is_no_tqdm(sources, tmp_path, capsys, monkeypatch):
    real_import = builtins.__import__

    def without_tqdm(name, *arguments, **options):
        if name == "tqdm":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / QFORMER_NAME).values()) / 1e6
    assert lines[-1] == f"{QFORMER_NAME}: {size:.3g} MB of {size:.3g} MB"
    assert 2 < len(lines) <= 20


def table(printed: str) -> dict[str, list[str]]:
    """The rows of inspect's table, split at runs of two spaces, by their first cell."""
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) > 3}


@pytest.mark.parametrize("layout", ["Hub folder", "original (LAVIS) folder", "fine-tuned file", "BLIP-2 Q-Former file"])
def test_inspect_says_what_it_is_and_what_is_in_it(pipeline, sources, capsys, layout):
    assert main(["inspect", str(sources[layout])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{sources[layout]}: {layout}\n")
    assert "  vision: image_size 56, patch_size 14, width 128, layers 3, heads 2," in printed
    assert "  qformer: width 64, layers 2, heads 1," in printed
    rows = table(printed)
    assert rows.pop("part") == ["file", "tensors", "parameters", "dtype", "size"]

    weights = dict(pipeline.qformer.named_parameters())
    parameters = sum(tensor.numel() for tensor in weights.values())
    alone = layout == "BLIP-2 Q-Former file"
    dtype, size = ("float16", 2 * parameters) if alone else ("float32", 4 * parameters)
    assert rows.pop("subject encoder")[-4:] == [str(len(weights)), f"{parameters:,}", dtype, f"{size / 1e6:.3g} MB"]
    if alone:
        assert rows == {}
        return

    unet = rows["U-Net"]
    assert unet[0] == (
        "checkpoint_40.pth" if layout == "fine-tuned file" else str(Path("unet") / "diffusion_pytorch_model.bin")
    )
    assert unet[2] == f"{sum(parameter.numel() for parameter in pipeline.unet.parameters()):,}"
    assert unet[3] == "float32"
    assert rows.keys() - {"tuned subject"} == {"U-Net", "text encoder", "VAE"}
    assert ("tuned subject" in rows) == (layout != "Hub folder")


def test_inspect_shows_a_controlnet_and_what_could_not_be_read(hub, capsys):
    (hub / "controlnet").mkdir()
    save_file(
        {"controlnet_cond_embedding.conv_in.weight": torch.zeros(16, 3, 3, 3)}, hub / "controlnet" / "model.safetensors"
    )
    (hub / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert main(["inspect", str(hub)]) == 0
    printed = capsys.readouterr().out
    assert table(printed)["ControlNet"] == ["controlnet/model.safetensors", "1", "432", "float32", "1.73 kB"]
    assert "VAE" not in table(printed)
    assert f"Note: {hub / 'vae' / 'diffusion_pytorch_model.bin'} is empty" in printed


def test_inspect_says_what_another_file_of_tensors_is(sources, tmp_path, capsys):
    assert main(["convert", str(sources["Hub folder"]), str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / CHECKPOINT_NAME)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / CHECKPOINT_NAME}: a Stable Diffusion checkpoint\n")
    count = len(load_file(tmp_path / CHECKPOINT_NAME))
    assert table(printed)["all of it"][:2] == [CHECKPOINT_NAME, str(count)]


@pytest.mark.parametrize("command", [["inspect"], ["convert", "out"]])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys, command):
    (tmp_path / "text.bin").write_text("not a checkpoint")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{")
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name in ("nothing there", "text.bin", "empty.safetensors", "cut.safetensors", "folder"):
        path = tmp_path / name
        arguments = [command[0], str(path), *(str(tmp_path / word) for word in command[1:])]
        assert_one_line_refusal(main(arguments), capsys, str(path))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("words", [[], ["translate"], ["convert", "a"], ["convert", "a", "b", "--dtype", "int8"]])
def test_words_it_does_not_know_end_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: blip-qformer" in capsys.readouterr().err


def test_it_runs_as_a_module_from_the_packs_folder(sources, tmp_path):
    words = [sys.executable, "-m", "blip_qformer", "inspect"]
    fine = subprocess.run([*words, sources["Hub folder"]], cwd=ROOT, capture_output=True, text=True)
    assert fine.returncode == 0
    assert "Hub folder" in fine.stdout
    wrong = subprocess.run([*words, tmp_path / "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("blip-qformer: ") and wrong.stderr.count("\n") == 1
