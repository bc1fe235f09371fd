"""Save Subject and Load Subject in the host: the same image from the node, from a text box and from a copied file."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from blip_qformer.checkpoint import open_checkpoint, save_qformer
from blip_qformer.subject.preview import preview_image
from tests.host import InputList
from tests.nodes.test_prompt import compose, stock


@pytest.fixture
def embeddings(host, monkeypatch, tmp_path):
    """The host's folders of embeddings: two empty ones, as with an extra_model_paths.yaml."""
    import folder_paths

    folders = [tmp_path / "embeddings", tmp_path / "elsewhere"]
    for folder in folders:
        folder.mkdir()
    extensions = folder_paths.folder_names_and_paths["embeddings"][1]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "embeddings", ([str(folder) for folder in folders], extensions)
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folders


def save(host, subject, name, **inputs):
    return host.run("BLIPDiffusionSubjectSave", subject=subject, name=name, **inputs)


def load(host, name, **inputs):
    return host.run("BLIPDiffusionSubjectLoad", subject_file=name, **inputs)


def load_clip(host):
    """A CLIP that knows the embeddings folders of this moment."""
    return host.run("BLIPDiffusionLoader", checkpoint="hub")[1]


def test_a_saved_subject_is_the_live_one_everywhere(host, loaded, subject, embeddings):
    passed_on, embedding = save(host, subject, "my_dog")
    assert (passed_on, embedding) == (subject, "embedding:my_dog")
    live, _ = compose(host, loaded, subject)

    from_node, report = load(host, "my_dog.safetensors", qformer=loaded.qformer)
    assert report == '"dog" from my_dog.safetensors.'
    assert (from_node.word, from_node.encoder, from_node.source) == (subject.word, subject.encoder, subject.source)

    (embeddings[1] / "shared").mkdir()
    shutil.copy(embeddings[0] / "my_dog.safetensors", embeddings[1] / "shared" / "copied.safetensors")
    from_copy, _ = load(host, "shared/copied.safetensors")

    in_text_box = stock(host, load_clip(host), f"a {embedding} dog in the snow")
    conditionings = [compose(host, loaded, each)[0] for each in (from_node, from_copy)]
    for conditioning in (*conditionings, in_text_box):
        torch.testing.assert_close(conditioning[0][0], live[0][0], atol=1e-6, rtol=0)


def test_a_blend_can_be_kept(host, loaded, subject, embeddings):
    other = type(subject)(subject.vectors.flip(1), "cat", subject.encoder, "1234")
    blended, _ = host.run("BLIPDiffusionSubjectInterpolate", subject_1=subject, subject_2=other, x=0.25)
    save(host, blended, "mix")
    kept, _ = load(host, "mix.safetensors")
    assert torch.equal(kept.vectors, blended.vectors)
    assert (kept.word, kept.source) == ("dog", f"{subject.source}+1234")


def test_a_list_of_subjects_is_no_file(host, subject, embeddings):
    with pytest.raises(ValueError, match="There is a list of 3 subjects and a file holds one: take one of them"):
        save(host, InputList([subject] * 3), "my_dog")
    assert not list(embeddings[0].iterdir())


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "CON", "", " ", "..", "/tmp/x", "a\0b", "dog.", "x" * 300])
def test_names_that_are_not_safe_are_refused_before_anything_runs(host, subject, embeddings, name):
    with pytest.raises(ValueError, match="name"):
        save(host, subject, name)
    node = host.nodes["BLIPDiffusionSubjectSave"]
    with pytest.raises(ValueError, match="name"):  # and again where the name came over a link
        node.execute(subject=[subject], name=[name], overwrite=[True])
    assert not list(embeddings[0].parent.rglob("*.*"))


def test_a_name_from_a_link_is_not_judged_too_early(host):
    assert host.nodes["BLIPDiffusionSubjectSave"].validate_inputs(name=[None]) is True
    assert host.nodes["BLIPDiffusionSubjectLoad"].validate_inputs(subject_file=None) is True


def test_an_existing_file_is_replaced_only_when_asked(host, subject, embeddings):
    save(host, subject, "dog")
    other = type(subject)(subject.vectors + 1, "cat")
    with pytest.raises(FileExistsError, match="dog.safetensors exists already: choose another name, or switch"):
        save(host, other, "dog")
    assert load(host, "dog.safetensors")[0].word == "dog"
    save(host, other, "dog", overwrite=True)
    assert load(host, "dog.safetensors")[0].word == "cat"
    assert [each.name for each in embeddings[0].iterdir()] == ["dog.safetensors"]


def test_a_missing_folder_is_made(host, subject, embeddings):
    embeddings[0].rmdir()
    save(host, subject, "dog")
    assert (embeddings[0] / "dog.safetensors").is_file()


def test_a_batch_is_refused(host, subject, embeddings):
    batch = type(subject)(subject.vectors.repeat(3, 1, 1), "dog")
    with pytest.raises(ValueError, match="has 3 rows and a file holds one"):
        save(host, batch, "dogs")
    assert not list(embeddings[0].iterdir())


def test_an_empty_list_says_what_to_do(host, embeddings):
    import nodes

    listed = nodes.NODE_CLASS_MAPPINGS["BLIPDiffusionSubjectLoad"].INPUT_TYPES()["required"]["subject_file"]
    assert listed[1]["options"] == ["(no subject found)"]
    with pytest.raises(ValueError, match="No saved subject was found in .*embeddings.*: make one with Save Subject"):
        load(host, "(no subject found)")


@pytest.mark.parametrize("name", ["gone.safetensors", "../secret.safetensors", "/etc/passwd"])
def test_only_what_is_listed_is_read(host, embeddings, name):
    save_file({"emb_params": torch.zeros(16, 8)}, embeddings[0].parent / "secret.safetensors")
    with pytest.raises(ValueError, match="was not found in"):
        load(host, name)
    with pytest.raises(ValueError, match="was not found in"):
        host.nodes["BLIPDiffusionSubjectLoad"].execute(name, "dog")


def test_what_is_no_subject_is_named(host, embeddings):
    save_file({"x.lora_up.weight": torch.zeros(4, 4)}, embeddings[0] / "lora.safetensors")
    with pytest.raises(ValueError, match="is a LoRA and no subject"):
        load(host, "lora.safetensors")


def test_a_subject_without_a_word_needs_one(host, embeddings):
    save_file({"emb_params": torch.randn(16, 128)}, embeddings[0] / "plain.safetensors")
    with pytest.raises(ValueError, match="does not say which word its subject is"):
        load(host, "plain.safetensors")
    assert load(host, "plain.safetensors", subject_word="dog")[0].word == "dog"


def test_another_encoder_is_warned_of_in_words(host, loaded, subject, embeddings, caplog):
    save(host, type(subject)(subject.vectors, "dog", "feedfeedfeedfeed"), "foreign")
    with caplog.at_level(logging.WARNING, logger="blip_diffusion"):
        foreign, report = load(host, "foreign.safetensors", qformer=loaded.qformer)
        _, unasked = load(host, "foreign.safetensors")
    assert foreign.encoder == "feedfeedfeedfeed"
    assert "was made by the encoder feedfeedfeedfeed, and this Q-Former is " in report
    assert [record.getMessage() in report for record in caplog.records] == [True]
    assert unasked == '"dog" from foreign.safetensors.'


def test_every_layout_of_one_model_is_one_encoder(host, loaded, checkpoints):
    """The float32 folder, the authors' own files, and the converted float16 file."""
    folder = host.base / "models" / "blip_diffusion"
    opened = open_checkpoint(folder / "hub")
    path = folder / "converted_for_hash.safetensors"
    save_qformer(path, opened.encoder_state_dict, opened.encoder_config)
    try:
        hashes = {
            host.run("BLIPDiffusionQFormerLoader", checkpoint=name)[0].encoder_hash
            for name in ("hub", "lavis", "checkpoint_40.pth", path.name)
        }
    finally:
        path.unlink()
    assert hashes == {loaded.qformer.encoder_hash}


def test_a_changed_file_is_read_again(host, subject, embeddings):
    node = host.nodes["BLIPDiffusionSubjectLoad"]
    save(host, subject, "dog")
    before = node.fingerprint_inputs(subject_file="dog.safetensors", subject_word="")
    assert node.fingerprint_inputs(subject_file="dog.safetensors", subject_word="") == before
    save(host, type(subject)(subject.vectors + 1, "dog"), "dog", overwrite=True)
    assert node.fingerprint_inputs(subject_file="dog.safetensors", subject_word="") != before
    assert node.fingerprint_inputs(subject_file=None, subject_word="") == ()  # comes over a link


@pytest.mark.parametrize("average_batch", [True, False])
def test_a_subject_keeps_a_picture_of_what_was_encoded(host, loaded, embeddings, average_batch):
    """The left half of the picture is masked away: the preview is what the encoder was shown, as a square."""
    image, mask = torch.zeros(1, 40, 80, 3), torch.zeros(1, 40, 80)
    image[..., 0], mask[:, :, 40:] = 1, 1
    subject, _ = host.run(
        "BLIPDiffusionSubjectEncode",
        qformer=loaded.qformer,
        image=image,
        mask=mask,
        subject_word="dog",
        average_batch=average_batch,
    )
    shown = preview_image(subject.preview)
    assert shown.shape == (1, 256, 256, 3)
    torch.testing.assert_close(shown[0, 128, 128], torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(shown[0, 2, 128], torch.ones(3), atol=0.02, rtol=0)  # the margin around what is cut out


def test_the_model_library_and_load_subject_show_the_picture(host, subject, embeddings, tmp_path):
    """By the host's own reader of previews, beside a picture of the user's, which comes first and is left alone."""
    from app.model_manager import ModelFileManager

    save(host, subject, "dog")
    file = embeddings[0] / "dog.safetensors"
    (found,) = ModelFileManager().get_model_previews(str(file.with_suffix(".webp")))  # as the frontend asks
    assert found.getvalue() == subject.preview
    output = host.nodes["BLIPDiffusionSubjectLoad"].execute("dog.safetensors", "")
    (image,) = output.ui.as_dict()["images"]
    shown = torch.from_numpy(np.array(Image.open(Path(folder_of(image["type"])) / image["filename"]))) / 255
    torch.testing.assert_close(shown[..., :3], preview_image(subject.preview)[0], atol=0.01, rtol=0)

    own = embeddings[0] / "dog.png"
    Image.new("RGB", (8, 8), "blue").save(own)
    before = own.read_bytes()
    save(host, type(subject)(subject.vectors + 1, "dog", preview=subject.preview), "dog", overwrite=True)
    assert own.read_bytes() == before
    assert ModelFileManager().get_model_previews(str(file))[0] == str(own)


def test_a_file_to_be_shared_holds_no_picture(host, subject, embeddings):
    save(host, subject, "dog")
    save(host, subject, "dog", save_preview=False)
    kept, _ = load(host, "dog.safetensors")
    assert (kept.preview, kept.word) == (b"", "dog")
    assert b"ssmd_cover_images" not in (embeddings[0] / "dog.safetensors").read_bytes()
    assert host.nodes["BLIPDiffusionSubjectLoad"].execute("dog.safetensors", "").ui is None


def folder_of(kind: str) -> str:
    import folder_paths

    return folder_paths.get_directory_by_type(kind)
