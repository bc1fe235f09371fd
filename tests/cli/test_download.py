"""``blip-qformer download`` from a Hub of our own: what is in the models folders afterwards, and what never is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from blip_qformer.checkpoint import open_checkpoint
from blip_qformer.checkpoint.convert import CHECKPOINT_NAME, CONTROLNET_NAME, QFORMER_NAME
from blip_qformer.checkpoint.ldm_keys import controlnet_to_ldm, stable_diffusion_checkpoint
from blip_qformer.cli.command_line import main
from blip_qformer.download import comfyui, find_comfyui, hub
from blip_qformer.download.hub import RemoteFile
from blip_qformer.download.model import CONTROLNET, MODEL, needed_files
from tests import oracle
from tests.cli.refusal import assert_one_line_refusal
from tests.download.hub_server import broken_off, content_of, hub_server, status
from tools.host import ROOT

WEIGHTS = "unet/diffusion_pytorch_model.bin"
WANTED = {
    f"{component}/{file}"
    for component, weights in {
        "qformer": "pytorch_model.bin",
        "text_encoder": "pytorch_model.bin",
        "unet": "diffusion_pytorch_model.bin",
        "vae": "diffusion_pytorch_model.bin",
    }.items()
    for file in ("config.json", weights)
}


@pytest.fixture(scope="session")
def published(sources, with_controlnet, tmp_path_factory):
    """Both repositories as they are published, with what is of no use to us."""
    folder = tmp_path_factory.mktemp("published")
    for name, source in ((MODEL, sources["Hub folder"]), (CONTROLNET, with_controlnet)):
        shutil.copytree(source, folder / name)
    for name in ("vision_encoder/pytorch_model.bin", "controlnet/diffusion_pytorch_model.bin", "unet/x.non_ema.bin"):
        (folder / MODEL / name).parent.mkdir(exist_ok=True)
        (folder / MODEL / name).write_bytes(b"of no use")
    return folder


@pytest.fixture
def server(monkeypatch, published):
    with hub_server(monkeypatch, hub) as server:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
        for name in (MODEL, CONTROLNET):
            server.add(name, published / name)
        yield server


@pytest.fixture
def comfy(tmp_path):
    """A fresh ComfyUI."""
    for name in ("custom_nodes", "models/checkpoints"):
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    return tmp_path / "ComfyUI"


def files_of(comfy: Path) -> set[str]:
    """All files in the models folders; empty folders do not count, and locks neither."""
    files = (file for file in (comfy / "models").rglob("*") if file.is_file() and not file.name.endswith(".lock"))
    return {file.relative_to(comfy / "models").as_posix() for file in files}


CONVERTED = {f"checkpoints/{CHECKPOINT_NAME}", f"blip_diffusion/{QFORMER_NAME}"}


def test_the_two_files_are_those_that_converting_the_folder_gives(server, pipeline, sources, comfy, capsys):
    assert main(["download", "--comfyui", str(comfy)]) == 0
    assert files_of(comfy) == CONVERTED
    assert set(server.ranges) == WANTED

    written = load_file(comfy / "models" / "checkpoints" / CHECKPOINT_NAME)
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    expected = stable_diffusion_checkpoint(*(network.state_dict() for network in networks))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in expected.items())
    qformer = open_checkpoint(comfy / "models" / "blip_diffusion" / QFORMER_NAME)
    source = open_checkpoint(sources["Hub folder"])
    assert qformer.encoder_config == source.encoder_config
    for name, tensor in source.encoder_state_dict.items():
        assert torch.equal(qformer.encoder_state_dict[name], tensor.half())
    printed = capsys.readouterr()
    assert f"Wrote {comfy / 'models' / 'checkpoints' / CHECKPOINT_NAME}." in printed.out
    assert printed.out.endswith("Press R in ComfyUI, and choose blipdiffusion in Load BLIP-Diffusion.\n")
    assert f"{WEIGHTS}: 100%" in printed.err

    server.ranges.clear()
    server.tokens.clear()
    assert main(["download", "--comfyui", str(comfy)]) == 0
    assert f"{QFORMER_NAME}: there already." in capsys.readouterr().out
    assert server.tokens == []  # nobody was asked


def test_a_mirror_and_the_folder_around_the_pack_are_found_by_a_real_process(server, comfy):
    pack = comfy / "custom_nodes" / "pack"
    pack.mkdir()
    (pack / "blip_qformer").symlink_to(ROOT / "blip_qformer")
    (pack / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1", "PWD": str(pack), "PYTHONPATH": ""}
    command = [sys.executable, "-m", "blip_qformer", "download", "--keep-original", "--controlnet"]
    done = subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {f"blip_diffusion/blipdiffusion/{name}" for name in WANTED}
    assert files_of(comfy) == CONVERTED | {f"controlnet/{CONTROLNET_NAME}"} | kept
    open_checkpoint(comfy / "models" / "blip_diffusion" / "blipdiffusion").require("unet")
    written = load_file(comfy / "models" / "controlnet" / CONTROLNET_NAME)
    expected = controlnet_to_ldm(oracle.controlnet(oracle.SMALL).state_dict())
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in expected.items())


def test_what_failed_goes_on_where_it_was(server, comfy, capsys, monkeypatch):
    size = len(server.repositories[MODEL][WEIGHTS])
    server.faults[WEIGHTS] = [broken_off(size // 2), *[status(429)] * 99]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["download", "--comfyui", str(comfy)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"blip-qformer: {WEIGHTS} of {MODEL} was not downloaded, because the server answered 429")
    assert not CONVERTED & files_of(comfy)
    assert all(name.startswith("blip_diffusion/.blipdiffusion.download/") for name in files_of(comfy))
    server.faults.clear()
    server.ranges.clear()
    assert main(["download", "--comfyui", str(comfy)]) == 0
    assert server.ranges[WEIGHTS][0] == size // 2 // 100_000 * 100_000
    assert not {"qformer/pytorch_model.bin", "qformer/config.json"} & set(server.ranges)  # they were there whole
    assert files_of(comfy) == CONVERTED


def test_an_interruption_is_gone_on_from_as_well(server, comfy, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("blip_qformer.download.model.save_qformer", interrupt)
        assert main(["download", "--comfyui", str(comfy)]) == 130
    assert "it goes on where it was" in capsys.readouterr().out
    assert CONVERTED & files_of(comfy) == {f"checkpoints/{CHECKPOINT_NAME}"}  # whole, as it was converted first
    before = (comfy / "models" / "checkpoints" / CHECKPOINT_NAME).stat()
    server.ranges.clear()
    assert main(["download", "--comfyui", str(comfy)]) == 0
    assert server.ranges == {}
    assert files_of(comfy) == CONVERTED
    assert (comfy / "models" / "checkpoints" / CHECKPOINT_NAME).stat().st_ino == before.st_ino


def test_weights_that_were_changed_on_their_way_are_converted_by_nobody(server, comfy, capsys):
    server.faults[WEIGHTS] = [content_of(lambda content: content[:-1] + b"?")]
    assert main(["download", "--comfyui", str(comfy)]) == 2
    assert f"{WEIGHTS} of {MODEL} came with the SHA-256 " in capsys.readouterr().err
    assert not CONVERTED & files_of(comfy)


def test_room_for_download_and_conversion_is_looked_for_first(server, comfy, capsys, monkeypatch):
    sizes = {name: len(content) for name, content in server.repositories[MODEL].items() if name in WANTED}
    total = sum(sizes.values())
    needed = total + sum(sizes[name] for name in sizes if name.startswith("qformer")) // 2
    needed += total // 2 - sum(sizes[name] for name in sizes if name.startswith("qformer")) // 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed - 1, 0, needed - 1))
    assert main(["download", "--comfyui", str(comfy)]) == 2
    error = capsys.readouterr().err
    assert f"{total / 1e9:.2f} GB to download and {(needed - total) / 1e9:.2f} GB for the converted files" in error
    assert set(server.ranges) == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed, 0, needed))
    assert main(["download", "--comfyui", str(comfy)]) == 0


def test_a_folder_that_was_downloaded_by_other_means_is_taken(server, published, comfy):
    folder = shutil.copytree(published / MODEL, comfy / "models" / "blip_diffusion" / "blipdiffusion")
    before = files_of(comfy)
    assert main(["download", "--comfyui", str(comfy)]) == 0
    assert server.ranges == {}
    assert files_of(comfy) == CONVERTED | before
    assert (folder / WEIGHTS).read_bytes() == (published / MODEL / WEIGHTS).read_bytes()


def test_a_file_that_is_not_whole_is_the_users_and_stays(server, comfy, capsys):
    target = comfy / "models" / "checkpoints" / CHECKPOINT_NAME
    target.write_bytes(b"mine")
    code = main(["download", "--comfyui", str(comfy)])
    assert_one_line_refusal(code, capsys, f"{target} is there already and is not whole", "move or delete it")
    assert target.read_bytes() == b"mine"
    assert server.tokens == []


def test_a_folder_that_cannot_be_made_is_named(server, comfy, capsys):
    (comfy / "models" / "blip_diffusion").write_bytes(b"mine")
    code = main(["download", "--comfyui", str(comfy)])
    assert_one_line_refusal(code, capsys, str(comfy / "models" / "blip_diffusion"), "a file is in the way")
    assert server.tokens == []


@pytest.mark.parametrize(
    ("repository", "code", "words"), [(MODEL, 404, "it is not there"), (MODEL, 429, "wait some minutes")]
)
def test_a_hub_that_refuses_is_a_sentence(server, comfy, capsys, monkeypatch, repository, code, words):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    del server.repositories[repository]
    server.changes[repository] = {"status": code}
    assert main(["download", "--comfyui", str(comfy)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{repository} at {server.url} was not downloaded, because the server answered {code}: " in error
    assert words in error


def test_two_downloads_at_once_are_one(server, comfy, capsys):
    from blip_qformer.atomic import only_writer

    with only_writer(comfy / "models" / "blip_diffusion" / ".blipdiffusion.download", "download"):
        assert main(["download", "--comfyui", str(comfy)]) == 2
    assert "Another download is writing into" in capsys.readouterr().err


def remote(*names: str, size: int = 100) -> list[RemoteFile]:
    return [RemoteFile("a/b", "c", name, size + number, None) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (["unet/a.bin", "unet/a.safetensors", "unet/config.json"], ["unet/config.json", "unet/a.safetensors"]),
        (["unet/a.non_ema.bin", "unet/a.bin"], ["unet/a.bin"]),
        (["unet/a.bin", "unet/a.fp16.bin", "vae/a.bin"], ["unet/a.fp16.bin"]),  # which is the larger here
        (["unet/a-00001-of-00002.bin", "unet/a-00002-of-00002.bin"],) * 2,
        (["unet/deeper/b.bin", "unet/a.bin", "unet/readme.md"], ["unet/a.bin"]),
    ],
)
def test_of_the_same_weights_one_is_needed(names, needed):
    assert [file.name for file in needed_files(remote(*names), ["unet"])] == needed


def test_a_repository_without_weights_is_a_sentence():
    with pytest.raises(ValueError, match=r"a/b holds no weights in vae, where they were published: it has changed"):
        needed_files(remote("unet/a.bin"), ["unet", "vae"])


def test_comfyui_is_found_upwards_and_in_a_portable_folder(tmp_path, monkeypatch):
    portable = tmp_path / "ComfyUI_windows_portable"
    inner = portable / "ComfyUI"
    pack = inner / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    (inner / "main.py").touch()
    monkeypatch.setattr(comfyui, "PACK", pack)
    assert find_comfyui() == find_comfyui(portable) == find_comfyui(inner) == inner
    with pytest.raises(ValueError, match=r"custom_nodes is no folder of ComfyUI, which has custom_nodes and main\.py"):
        find_comfyui(inner / "custom_nodes")


def test_the_desktop_applications_folder_has_no_main(tmp_path):
    for name in ("custom_nodes", "models"):
        (tmp_path / name).mkdir()
    assert find_comfyui(tmp_path) == tmp_path


def test_a_pack_outside_comfyui_asks_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comfyui, "PACK", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    assert_one_line_refusal(main(["download"]), capsys, "No ComfyUI was found around", "add --comfyui")
