"""Every published layout gives the same subject encoder, told by its tensors; everything else gets one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip_qformer import load_subject_encoder
from blip_qformer.checkpoint import CheckpointError, open_checkpoint, save_qformer
from blip_qformer.checkpoint.weights import is_finite
from tests import oracle
from tests.random_weights import shorten_config, write_finetuned, write_hub_folder, write_lavis_folder
from tools.host import comfyui_path

WIDTH = 128  # two heads of 64, as LAVIS' files, which have no config, are read
SIZES = dataclasses.replace(oracle.SMALL, width=WIDTH, qformer_heads=2)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return oracle.pipeline(SIZES, tmp_path_factory.mktemp("pipeline"), comfyui_path())


@pytest.fixture(scope="module")
def subject():
    return torch.randn(1, 16, WIDTH)


@pytest.fixture(scope="module")
def layouts(pipeline, subject, tmp_path_factory):
    """The same weights in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    hub = write_hub_folder(pipeline, folder / "hub")
    checkpoint = open_checkpoint(hub)
    save_qformer(folder / "ours.safetensors", checkpoint.encoder_state_dict, checkpoint.encoder_config, dtype=None)
    controlnet = oracle.controlnet(SIZES)
    return {
        "Hub folder of pickles": hub,
        "Hub folder of safetensors": write_hub_folder(pipeline, folder / "safe", safetensors=True),
        "Hub folder with a ControlNet": write_hub_folder(pipeline, folder / "canny", controlnet=controlnet),
        "LAVIS folder": write_lavis_folder(pipeline, folder / "lavis", subject),
        "fine-tuned file": write_finetuned(pipeline, folder / "checkpoint_40.pth", subject),
        "our single file": folder / "ours.safetensors",
    }


LAYOUTS = [
    "Hub folder of pickles",
    "Hub folder of safetensors",
    "Hub folder with a ControlNet",
    "LAVIS folder",
    "fine-tuned file",
    "our single file",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_are_the_references(layouts, pipeline, layout):
    images, words = torch.randn(2, 3, SIZES.image_size, SIZES.image_size), ["dog", "teddy bear"]
    expected = pipeline.qformer(image_input=images, text_input=words, return_dict=False)
    encoder = load_subject_encoder(layouts[layout])
    torch.testing.assert_close(encoder(images, words), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_components_are_found(layouts, pipeline, layout):
    checkpoint = open_checkpoint(layouts[layout])
    if layout == "our single file":
        with pytest.raises(CheckpointError, match=r"has no unet: choose a whole"):
            checkpoint.require("unet")
        return
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, name).state_dict()
        weights = checkpoint.require(name).state_dict()
        assert {k for k in weights if not k.endswith("position_ids")} >= {
            k for k in expected if "position_ids" not in k
        }
        some = next(iter(expected))
        assert torch.equal(weights[some], expected[some])
    assert (checkpoint.controlnet is not None) == (layout == "Hub folder with a ControlNet")


@pytest.mark.parametrize("layout", ["LAVIS folder", "fine-tuned file"])
def test_tuned_subject_is_found(layouts, subject, layout):
    assert torch.equal(open_checkpoint(layouts[layout]).subject, subject)


def test_file_names_do_not_matter(layouts, tmp_path, pipeline):
    hub = layouts["Hub folder of pickles"]
    for number, name in enumerate(("qformer/pytorch_model.bin", "unet/diffusion_pytorch_model.bin")):
        (tmp_path / f"{number}").mkdir()
        shutil.copy(hub / name, tmp_path / f"{number}" / f"weights{number}.bin")
    shutil.copy(hub / "qformer" / "config.json", tmp_path / "0" / "config.json")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "Hub folder"
    assert checkpoint.unet is not None
    assert checkpoint.vae is None


def test_short_config_is_the_full_one(tmp_path):
    """With the published number of heads, a config that leaves out defaults means the same as one that does not."""
    sizes = oracle.Sizes(
        vision_width=256, vision_heads=16, width=192, qformer_heads=12, qformer_layers=12, vision_layers=2
    )
    reference = oracle.qformer(sizes, tmp_path / "bert")
    reference.save_pretrained(tmp_path / "hub" / "qformer")
    full = open_checkpoint(tmp_path / "hub").encoder_config
    shorten_config(tmp_path / "hub")
    assert open_checkpoint(tmp_path / "hub").encoder_config == full
    images = torch.randn(1, 3, sizes.image_size, sizes.image_size)
    expected = reference(image_input=images, text_input=["dog"], return_dict=False)
    torch.testing.assert_close(load_subject_encoder(tmp_path / "hub")(images, ["dog"]), expected, atol=1e-4, rtol=0)


def test_a_float16_file_computes_in_float32_unless_asked(layouts, tmp_path):
    checkpoint = open_checkpoint(layouts["LAVIS folder"])
    save_qformer(tmp_path / "half.safetensors", checkpoint.encoder_state_dict, checkpoint.encoder_config)
    images = torch.randn(1, 3, SIZES.image_size, SIZES.image_size)
    expected = load_subject_encoder(checkpoint)(images, ["dog"])
    single = load_subject_encoder(tmp_path / "half.safetensors")
    torch.testing.assert_close(single(images, ["dog"]), expected, atol=2e-2, rtol=0)  # rounding to float16
    assert not any(w.requires_grad for w in single.parameters())
    as_stored = load_subject_encoder(tmp_path / "half.safetensors", dtype=None)
    assert {w.dtype for w in as_stored.parameters()} == {torch.float16}


def test_a_folder_of_mixed_precision_loads(pipeline, tmp_path):
    """LAVIS keeps its image encoder in float16 where it ran on a GPU."""
    folder = write_lavis_folder(pipeline, tmp_path)
    file = folder / "blip_model" / "blip_weight.pt"
    weights = torch.load(file, weights_only=True)
    torch.save({name: w.half() if name.startswith("visual") else w for name, w in weights.items()}, file)
    images = torch.randn(1, 3, SIZES.image_size, SIZES.image_size)
    assert torch.isfinite(load_subject_encoder(folder)(images, ["dog"])).all()


def test_weights_in_several_pieces_are_put_together(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = sorted(weights := load_file(file))
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        piece = file.with_name(f"diffusion_pytorch_model-0000{number}-of-00002.safetensors")
        save_file({name: weights[name] for name in part}, piece)
    file.unlink()
    assert open_checkpoint(folder).require("unet").state_dict().keys() == weights.keys()


def in_shards(file, name, count=2):
    """Replace a file by shards called ``name``, in which ``{}`` stands for the shard, as ``00001-of-00002``."""
    weights = load_file(file)
    shards = [file.with_name(name.format(f"{number:05}-of-{count:05}")) for number in range(1, count + 1)]
    for number, shard in enumerate(shards):
        save_file({key: weights[key] for key in sorted(weights)[number::count]}, shard)
    file.unlink()
    return shards


SHARD_NAMES = pytest.mark.parametrize(
    "name",
    [
        "model-{}.safetensors",
        "diffusion_pytorch_model-{}.fp16.safetensors",
        "diffusion_pytorch_model.fp16-{}.safetensors",
    ],
)


@SHARD_NAMES
def test_shards_with_a_variant_are_put_together(layouts, tmp_path, name):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    shards = in_shards(file, name)
    unet = open_checkpoint(folder).require("unet")
    assert unet.path == shards[0]
    found = unet.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_a_qformer_alone_may_be_in_shards(layouts, tmp_path):
    shutil.copytree(layouts["Hub folder of safetensors"] / "qformer", tmp_path / "qformer")
    expected = load_subject_encoder(tmp_path).state_dict()
    in_shards(tmp_path / "qformer" / "model.safetensors", "model-{}.safetensors")
    found = load_subject_encoder(tmp_path).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@SHARD_NAMES
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_named(layouts, tmp_path, name, lost):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    shard = in_shards(folder / "unet" / "diffusion_pytorch_model.safetensors", name, 3)[lost]
    shard.unlink()
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as error:
        checkpoint.require("unet")
    lacks = f'{shard.parent} lacks "{shard.name}", of a model in 3 shards: download what is missing into this folder.'
    assert str(error.value).endswith(f"has no unet that can be read. {lacks}")


def test_shards_beside_the_whole_file_are_another_model(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    in_shards(file, "diffusion_pytorch_model-{}.safetensors")[1].unlink()
    file.write_bytes(content)
    assert open_checkpoint(folder).require("unet").path == file


def test_a_text_encoder_without_the_leading_name_is_known(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}, file)
    assert open_checkpoint(folder).require("text_encoder")


def test_a_folder_around_the_folder_is_looked_into(layouts, tmp_path):
    shutil.copytree(layouts["LAVIS folder"], tmp_path / "outer" / "blip-diffusion")
    assert open_checkpoint(tmp_path / "outer").path == tmp_path / "outer" / "blip-diffusion"


def test_a_folder_of_the_hubs_cache_is_opened(layouts, tmp_path):
    """The repository's folder, its snapshots and one snapshot mean the same; refs/main tells which of two."""
    repository = tmp_path / "hub" / "models--Salesforce--blipdiffusion"
    snapshots = repository / "snapshots"
    for commit in ("a1", "b2"):
        shutil.copytree(layouts["Hub folder of safetensors"], snapshots / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1\n")
    for path in (repository, snapshots, snapshots / "a1", tmp_path / "hub", str(repository)):
        assert open_checkpoint(path).path == snapshots / "a1"
    (repository / "refs" / "main").write_text("pruned")
    os.utime(snapshots / "b2", (2e9, 2e9))
    assert open_checkpoint(repository).path == snapshots / "b2", "the newest"


def test_of_twins_the_more_precise_is_taken(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: weight.half() for name, weight in load_file(file).items()}
    save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_checkpoint(folder).unet.path == file


@pytest.mark.parametrize(
    ("taken", "other"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
        ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors"),
        ("unet/model.fp16.safetensors", "unet/model-non-ema.fp32.safetensors"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.a.safetensors"),
        ("unet/diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("unet/a.safetensors", "unet/b.safetensors"),
    ],
)
def test_of_several_files_one_is_taken_in_a_written_order(layouts, tmp_path, caplog, taken, other):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for file, scale in ((folder / other, 2), (folder / taken, 1)):
        scaled = {name: weight * scale for name, weight in weights.items()}
        torch.save(scaled, file) if file.suffix == ".bin" else save_file(scaled, file)
    with caplog.at_level("INFO", "blip_diffusion"):
        unet = open_checkpoint(folder).require("unet")
    assert unet.path == folder / taken
    assert torch.equal(unet.state_dict()["conv_in.weight"], weights["conv_in.weight"])
    assert caplog.messages == [f"{folder} holds several files for one part: {taken} and not {other} is read."]


def test_only_non_ema_weights_are_read(layouts, tmp_path, caplog):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    other = file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with caplog.at_level("INFO", "blip_diffusion"):
        assert open_checkpoint(folder).require("unet").path == other
    assert not caplog.messages


# --- what is refused ---


@pytest.fixture
def qformer_file(layouts, tmp_path):
    """A copy of our single file, to be broken."""
    return shutil.copy(layouts["our single file"], tmp_path / "qformer.safetensors")


def broken(file, change, metadata=None):
    """Rewrite a file of tensors after ``change`` has altered its dictionary."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
    return file


def test_missing_tensors_are_named(qformer_file):
    file = broken(qformer_file, lambda tensors: tensors.pop("encoder.layer.1.crossattention.output.dense.bias"))
    with pytest.raises(CheckpointError, match=r'lacks "encoder\.layer\.1\.crossattention\.output\.dense\.bias"'):
        load_subject_encoder(file)


def test_missing_tensor_that_tells_a_size_is_named(qformer_file):
    file = broken(qformer_file, lambda tensors: tensors.pop("proj_layer.dense1.weight"))
    with pytest.raises(CheckpointError, match="lacks 'projection.expand.weight'"):
        load_subject_encoder(file)


def test_unexpected_tensors_are_named(qformer_file):
    file = broken(qformer_file, lambda tensors: tensors.update({"encoder.layer.1.adapter.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r'holds "encoder\.layer\.1\.adapter\.weight"'):
        load_subject_encoder(file)


def test_wrong_shapes_are_named(qformer_file):
    file = broken(qformer_file, lambda tensors: tensors.update({"embeddings.LayerNorm.weight": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=r'"embeddings\.LayerNorm\.weight" of shape \[7\].*\[128\]'):
        load_subject_encoder(file)


def test_missing_layer_is_named_where_a_config_tells_how_many(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "qformer" / "model.safetensors"

    def drop_last_layer(tensors):
        for name in [name for name in tensors if name.startswith("encoder.layer.1.")]:
            del tensors[name]

    broken(file, drop_last_layer)
    with pytest.raises(CheckpointError, match=r'lacks "encoder\.layer\.1\..*and \d+ more'):
        open_checkpoint(folder)


def test_header_of_a_later_version_is_refused(qformer_file):
    broken(qformer_file, lambda tensors: None, {"blip_qformer.config": json.dumps({"mixture_of_experts": 8})})
    with pytest.raises(CheckpointError, match="update the pack"):
        load_subject_encoder(qformer_file)


class Code:
    def __reduce__(self):
        return print, ("a pickle ran code",)


STRANGERS = {
    "an SDXL checkpoint": {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)},
    "a LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(1)},
    "a Stable Diffusion checkpoint": {"model.diffusion_model.out.2.weight": torch.zeros(1)},
    "an unknown model": {"weight": torch.zeros(1)},
}


@pytest.mark.parametrize("description", STRANGERS)
def test_other_models_are_told_by_name(tmp_path, description):
    save_file(STRANGERS[description], tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{description}.*not BLIP-Diffusion: choose"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_part_of_a_checkpoint_points_to_its_folder(layouts):
    with pytest.raises(CheckpointError, match="diffusers U-Net, one part of a checkpoint: choose the folder"):
        open_checkpoint(layouts["Hub folder of pickles"] / "unet" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pth"])
def test_files_that_are_no_tensors(tmp_path, suffix):
    text = tmp_path / f"text{suffix}"
    text.write_text("Entry not found")
    with pytest.raises(CheckpointError, match="is not a file of tensors|is no whole safetensors file"):
        open_checkpoint(text)
    empty = tmp_path / f"empty{suffix}"
    empty.touch()
    with pytest.raises(CheckpointError, match="is empty, so its download did not finish"):
        open_checkpoint(empty)
    with pytest.raises(CheckpointError, match="There is no file"):
        open_checkpoint(tmp_path / f"missing{suffix}")


@pytest.mark.parametrize(
    "name", ["Hub folder of pickles/qformer/pytorch_model.bin", "fine-tuned file", "our single file"]
)
def test_truncated_files(layouts, tmp_path, name):
    layout, _, rest = name.partition("/")
    whole = layouts[layout] / rest if rest else layouts[layout]
    half = tmp_path / f"half{whole.suffix}"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="no whole.*download it again"):
        open_checkpoint(half)


def test_pickle_with_code_is_left_closed(tmp_path, capsys):
    file = tmp_path / "model.bin"
    with file.open("wb") as stream:
        pickle.dump({"model": Code()}, stream, protocol=2)
    torch.save({"model": Code()}, tmp_path / "zipped.bin")
    for path in (file, tmp_path / "zipped.bin"):
        with pytest.raises(CheckpointError, match="would run code when opened, so it was left closed"):
            open_checkpoint(path)
    assert "a pickle ran code" not in capsys.readouterr().out


def test_folder_without_a_checkpoint_says_what_is_in_it(layouts, tmp_path):
    with pytest.raises(CheckpointError, match="no weights of it were found"):
        open_checkpoint(tmp_path)
    shutil.copytree(layouts["Hub folder of pickles"] / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "broken.safetensors").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"is a diffusers VAE.*broken\.safetensors is no whole"):
        open_checkpoint(tmp_path)


def test_truncated_part_is_named_when_it_is_needed(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of pickles"], tmp_path / "hub")
    unet = folder / "unet" / "diffusion_pytorch_model.bin"
    unet.write_bytes(unet.read_bytes()[:1000])
    checkpoint = open_checkpoint(folder)
    load_subject_encoder(checkpoint)  # the Q-Former is whole
    with pytest.raises(CheckpointError, match=r"has no unet.*diffusion_pytorch_model\.bin is no whole file"):
        checkpoint.require("unet")


def test_links_to_nowhere_are_named(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of pickles"], tmp_path / "hub")
    file = folder / "vae" / "diffusion_pytorch_model.bin"
    file.unlink()
    file.symlink_to(tmp_path / "pruned")
    with pytest.raises(CheckpointError, match=r"has no vae.*diffusion_pytorch_model\.bin is a link to nothing"):
        open_checkpoint(folder).require("vae")


def test_a_file_without_tensors_says_so(tmp_path):
    save_file({}, tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path / "nothing.safetensors")


def test_configs_that_do_not_fit(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of pickles"], tmp_path / "hub")
    config = folder / "qformer" / "config.json"
    original = json.loads(config.read_text())
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(folder)
    config.write_text(json.dumps(original | {"vision_config": original["vision_config"] | {"hidden_act": "gelu"}}))
    with pytest.raises(CheckpointError, match='vision part the activation .gelu..*"quick_gelu"'):
        open_checkpoint(folder)
    config.write_text(json.dumps(original))
    (folder / "model_index.json").write_text(json.dumps({"ctx_begin_pos": 5}))
    with pytest.raises(CheckpointError, match="position 5.*trained with 2"):
        open_checkpoint(folder)


LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 3438375973\n"
)
STAND_INS = {
    "git-lfs pointer": (LFS_POINTER, "run git lfs pull"),
    "web page": ("\n<!DOCTYPE html><title>404 Not Found</title>", "download the file"),
}


@pytest.mark.parametrize("name", ["unet.bin", "model.safetensors", "checkpoint_40.pth"])
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_stand_in_for_a_file_is_named_as_what_it_is(tmp_path, kind, name):
    content, remedy = STAND_INS[kind]
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path / name))} is a {kind}.*: {remedy}"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_folder_of_stand_ins_is_named_once(layouts, tmp_path, kind):
    """What git clone leaves without git-lfs: every file of weights is a pointer."""
    folder = shutil.copytree(layouts["Hub folder of pickles"], tmp_path / "hub")
    for file in folder.glob("*/*.bin"):
        file.write_text(STAND_INS[kind][0])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert message.count(f"{kind}s") == 1
    assert message.count("hf download") == 1
    assert f"{folder}: qformer/pytorch_model.bin, text_encoder/pytorch_model.bin, unet/" in message
    assert "and 1 more are" in message


def test_a_stand_in_for_one_component_is_named_when_it_is_needed(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of pickles"], tmp_path / "hub")
    unet = folder / "unet" / "diffusion_pytorch_model.bin"
    unet.write_text(LFS_POINTER)
    checkpoint = open_checkpoint(folder)
    load_subject_encoder(checkpoint)
    with pytest.raises(CheckpointError, match=rf"has no unet that can be read\. {unet} is a git-lfs pointer.*git lfs"):
        checkpoint.require("unet")


def test_a_stand_in_beside_the_file_itself_does_not_matter(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text(LFS_POINTER)
    assert open_checkpoint(folder).require("unet").path == folder / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_stand_in_for_a_config_is_named(layouts, tmp_path, kind):
    folder = shutil.copytree(layouts["Hub folder of pickles"], tmp_path / "hub")
    (folder / "qformer" / "config.json").write_text(STAND_INS[kind][0])
    with pytest.raises(CheckpointError, match=rf"config\.json is a {kind}"):
        open_checkpoint(folder)


# --- after loading, the file may go ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_encoder_does_not_depend_on_its_file(layouts, tmp_path, layout):
    """Overwritten as cp does it, in place: a mapped file would end the process or change the vectors."""
    source = layouts[layout]
    path = shutil.copytree(source, tmp_path / "copy") if source.is_dir() else shutil.copy(source, tmp_path)
    encoder = load_subject_encoder(path)
    images = torch.randn(1, 3, SIZES.image_size, SIZES.image_size)
    expected = encoder(images, ["dog"])
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".safetensors")]
    for content in (b"\xff" * 10_000_000, b""):
        for file in files:
            file.write_bytes(content)
        assert torch.equal(encoder(images, ["dog"]), expected)


def test_a_tuned_subject_does_not_depend_on_its_file(layouts, subject, tmp_path):
    folder = shutil.copytree(layouts["LAVIS folder"], tmp_path / "lavis")
    file = shutil.copy(layouts["fine-tuned file"], tmp_path)
    found = [open_checkpoint(path).subject for path in (folder, file)]
    for path in (*folder.rglob("*.pt"), file):
        os.truncate(path, 0)
    assert all(torch.equal(each, subject) for each in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("query_tokens", "qformer.query_tokens"),
        ("visual_encoder.encoder.layers.1.mlp.fc2.bias", "vision.blocks.1.contract.bias"),
    ],
)
def test_weights_that_are_no_numbers_are_named(layouts, tmp_path, value, key, name):
    """1e300 is a number in float64 alone."""
    file = shutil.copy(layouts["our single file"], tmp_path / "q.safetensors")

    def spoil(tensors):
        tensors[key] = tensors[key].double()
        tensors[key].view(-1)[-1] = value

    broken(file, spoil)
    with pytest.raises(CheckpointError, match=rf'{file} holds NaN or infinity in "{name}"'):
        load_subject_encoder(file)


def test_large_weights_whose_sum_overflows_are_numbers():
    assert is_finite(torch.full((10,), 3e38))
    assert is_finite(torch.full((100,), 60000.0, dtype=torch.float16))
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))
    assert is_finite(torch.empty(0))


def test_component_weights_that_are_no_numbers_are_named(layouts, tmp_path):
    folder = shutil.copytree(layouts["Hub folder of safetensors"], tmp_path / "hub")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    broken(file, lambda tensors: tensors["quant_conv.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf'{file} holds NaN or infinity in "quant_conv.weight"'):
        open_checkpoint(folder).require("vae").weights()


# --- numbers in a file that would decide how much is built, and values of wrong kinds ---


def with_config(layouts, folder, name, change):
    """A copy of the Hub folder in which one value of a config is another."""
    folder = shutil.copytree(layouts["Hub folder of safetensors"], folder / "hub", copy_function=os.link)
    file = folder / name / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.unlink()  # a link to the other tests' file
    file.write_text(json.dumps(config))
    return folder, file


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("qformer_config", "num_hidden_layers"),
        ("vision_config", "num_hidden_layers"),
        ("qformer_config", "num_attention_heads"),
        ("qformer_config", "cross_attention_frequency"),
        ("vision_config", "layer_norm_eps"),
    ],
)
@pytest.mark.parametrize("value", [1_000_000, 0, 10**400, "3", None])
def test_values_of_the_qformers_config_are_checked(layouts, tmp_path, group, name, value):
    value = value or -1 if name == "layer_norm_eps" else value  # 0 is an epsilon
    folder, _ = with_config(layouts, tmp_path, "qformer", lambda config: config[group].update({name: value}))
    with pytest.raises(CheckpointError, match=r"configuration in .*model\.safetensors(, \w+:)? .*published"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("group", "value"), [("qformer_config", []), ("vision_config", "x")])
def test_groups_of_the_qformers_config_are_checked(layouts, tmp_path, group, value):
    folder, _ = with_config(layouts, tmp_path, "qformer", lambda config: config.update({group: value}))
    with pytest.raises(CheckpointError, match=f"sets {group} to .*, where a group of values is needed"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "block_out_channels", "x"),
        ("unet", "block_out_channels", []),
        ("unet", "block_out_channels", [32] * 1000),
        ("unet", "block_out_channels", 32),
        ("unet", "attention_head_dim", 0),
        ("unet", "attention_head_dim", []),
        ("unet", "attention_head_dim", "8"),
        ("unet", "attention_head_dim", 10**400),
        ("unet", "layers_per_block", 10_000_000),
        ("vae", "scaling_factor", "x"),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", float("nan")),
        ("text_encoder", "num_hidden_layers", 1_000_000),
        ("text_encoder", "num_attention_heads", -1),
        ("text_encoder", "hidden_size", [1]),
    ],
)
def test_values_of_other_configs_are_checked(layouts, tmp_path, part, name, value):
    folder, file = with_config(layouts, tmp_path, part, lambda config: config.update({name: value}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))} sets {name} to .*, where .* is needed"):
        open_checkpoint(folder).require(part)


def test_a_config_nested_without_end_is_named(layouts, tmp_path):
    folder, file = with_config(layouts, tmp_path, "qformer", lambda config: None)
    file.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON \(it is nested too deeply\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"vision": {"layers": 10_000_000}},
        {"vision": []},
        {"projection_width": 10**400},
        [],
        3,
        {"qformer": {"heads": 0}},
    ],
)
def test_a_header_that_cannot_be_is_refused(qformer_file, header):
    broken(qformer_file, lambda tensors: None, {"blip_qformer.config": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"qformer\.safetensors describes itself in a way .*: update the pack"):
        load_subject_encoder(qformer_file)


@pytest.mark.parametrize("number", ["10000", "9" * 400])
def test_a_layer_of_a_huge_number_is_unexpected_and_not_built(layouts, tmp_path, number):
    folder = shutil.copytree(layouts["LAVIS folder"], tmp_path / "lavis")
    file = folder / "blip_model" / "blip_weight.pt"
    weights = torch.load(file, weights_only=True)
    key = "visual_encoder.transformer.resblocks.1.mlp.c_fc.weight"
    weights[key.replace("resblocks.1", f"resblocks.{number}")] = weights[key]
    torch.save(weights, file)
    with pytest.raises(CheckpointError, match=rf'holds "visual_encoder\.transformer\.resblocks\.{number}'):
        open_checkpoint(folder)


STRANGE_TENSORS = {
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(4, 4, dtype=torch.complex64),
    "sparse": lambda: torch.zeros(4, 4).to_sparse(),
    "claims more numbers": lambda: torch.zeros(1).expand(2**20, 2**12),
}


@pytest.mark.parametrize("kind", STRANGE_TENSORS)
def test_tensors_that_are_no_plain_arrays_are_named(tmp_path, kind):
    torch.save({"query_tokens": STRANGE_TENSORS[kind]()}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=rf'model\.bin .*{kind}.*"query_tokens"|"query_tokens" as a .*{kind}'):
        open_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_named(qformer_file, dtype):
    broken(qformer_file, lambda tensors: tensors.update(query_tokens=tensors["query_tokens"].to(dtype)))
    with pytest.raises(CheckpointError, match=r'holds "query_tokens" in \w+: get the weights in float16'):
        load_subject_encoder(qformer_file)


@pytest.mark.parametrize("shape", [(), (7,), (1, 0, 128), (0, 2**40)])
@pytest.mark.parametrize(
    "key", ["query_tokens", "visual_encoder.embeddings.patch_embedding.weight", "proj_layer.dense1.weight"]
)
def test_tensors_that_tell_a_size_have_their_axes(qformer_file, key, shape):
    broken(qformer_file, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=r"qformer\.safetensors"):
        load_subject_encoder(qformer_file)


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    """A hundred megabytes of zeros in a file of a hundred kilobytes."""
    torch.save({"query_tokens": torch.zeros(1)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name) + bytes(100_000_000 if name.endswith(".pkl") else 0))
    with pytest.raises(CheckpointError, match=r"bomb\.bin would unpack to \d+ MB"):
        open_checkpoint(tmp_path / "bomb.bin")


def test_more_tensors_than_any_model_has(tmp_path):
    save_file({f"t{number}": torch.zeros(0) for number in range(10_001)}, tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match="holds 10001 tensors, more than any model"):
        open_checkpoint(tmp_path / "many.safetensors")


def test_a_file_without_permission_says_so(qformer_file, monkeypatch):
    """Simulated, as tests may run as root, who may read everything."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("blip_qformer.checkpoint.read_tensors.safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"qformer\.safetensors may not be read by you: change its permissions"):
        open_checkpoint(qformer_file)


@pytest.mark.parametrize("name", ["qformer.a\nb", "vision.\0", "x\u2028y"])
def test_a_damaged_name_does_not_break_the_sentence(tmp_path, name):
    torch.save({name: torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="holds a tensor of the damaged name") as refused:
        open_checkpoint(tmp_path / "model.pth")
    assert str(refused.value).isprintable()
