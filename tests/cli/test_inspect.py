"""``blip-qformer inspect``: what a path is and what it holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip_qformer.cli.command_line import main
from blip_qformer.cli.convert import CHECKPOINT_NAME


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
