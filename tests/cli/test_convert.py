"""``blip-qformer convert``: what it writes, what it says, and what it leaves alone."""

import builtins
import logging
import os
import shutil
from collections import namedtuple

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file

from blip_qformer.checkpoint import open_checkpoint
from blip_qformer.checkpoint.ldm_keys import controlnet_to_ldm, stable_diffusion_checkpoint
from blip_qformer.cli.command_line import main
from blip_qformer.cli.convert import CHECKPOINT_NAME, CONTROLNET_NAME, QFORMER_NAME
from tests import oracle
from tests.cli.refusal import assert_one_line_refusal

BOTH = sorted([CHECKPOINT_NAME, QFORMER_NAME])


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
    assert qformer.encoder_state_dict.keys() == source.encoder_state_dict.keys()
    for name, tensor in source.encoder_state_dict.items():
        assert torch.equal(qformer.encoder_state_dict[name], tensor.to(torch_dtype))

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


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.bin", "qformer/pytorch_model.bin"])
def test_weights_that_are_no_numbers_are_refused_before_anything_is_written(hub, tmp_path, capsys, part):
    weights = torch.load(hub / part, weights_only=True)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    torch.save(weights, hub / part)
    code = main(["convert", str(hub), str(tmp_path / "new")])
    assert_one_line_refusal(code, capsys, str(hub / part), "NaN or infinity")
    assert not (tmp_path / "new").exists()


def test_an_interruption_leaves_nothing_half_written(sources, tmp_path, capsys, monkeypatch):
    def interrupt(descriptor):
        assert len([name for name in os.listdir(tmp_path) if not name.endswith(".lock")]) == 1  # the temporary file
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
