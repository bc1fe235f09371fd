"""A subject as a file: what is in it, which names are safe, and what is refused with what it is."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip_qformer import Subject
from blip_qformer.encoder import SubjectEncoder
from blip_qformer.encoder.config import QFormerConfig, SubjectEncoderConfig, VisionConfig
from blip_qformer.subject.file import SubjectFileError, load_subject, save_subject
from blip_qformer.subject.file_name import MAX_NAME_BYTES, checked_name
from blip_qformer.subject.provenance import encoder_hash, encoder_mismatch, image_hash


@pytest.fixture
def subject() -> Subject:
    return Subject(torch.randn(1, 16, 768), "teddy bear 🧸", "0123456789abcdef", "fedcba9876543210")


@pytest.fixture
def file(tmp_path, subject):
    save_subject(tmp_path / "bear.safetensors", subject)
    return tmp_path / "bear.safetensors"


def test_what_is_saved_comes_back(file, subject):
    loaded = load_subject(file)
    assert torch.equal(loaded.vectors, subject.vectors)
    assert (loaded.word, loaded.encoder, loaded.source) == (subject.word, subject.encoder, subject.source)
    assert load_subject(file, " teapot ").word == "teapot"


def test_the_file_is_a_textual_inversion(file, subject):
    tensors = load_file(file)
    assert list(tensors) == ["emb_params"]
    assert tensors["emb_params"].dtype == torch.float32
    assert torch.equal(tensors["emb_params"], subject.vectors[0])
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {
            "format": "blip-subject",
            "version": "1",
            "word": "teddy bear 🧸",
            "encoder": "0123456789abcdef",
            "source": "fedcba9876543210",
        }


def test_another_subject_is_not_replaced_unasked(file, subject):
    other = Subject(torch.randn(1, 16, 768), "dog")
    with pytest.raises(FileExistsError, match="exists already: choose another name, or switch overwrite on"):
        save_subject(file, other)
    assert load_subject(file).word == subject.word
    save_subject(file, subject)  # a graph queued again
    save_subject(file, other, overwrite=True)
    assert load_subject(file).word == "dog"
    assert [each.name for each in file.parent.iterdir()] == ["bear.safetensors"]


def test_a_folder_of_that_name_stays(tmp_path, subject):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(FileExistsError):
        save_subject(tmp_path / "x.safetensors", subject, overwrite=True)


def test_an_interruption_leaves_the_old_file_and_nothing_else(file, subject, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_subject(file, Subject(torch.zeros(1, 16, 768), "dog"), overwrite=True)
    assert load_subject(file).word == subject.word
    assert [each.name for each in file.parent.iterdir()] == ["bear.safetensors"]


def test_several_rows_do_not_fit_one_file(tmp_path):
    with pytest.raises(ValueError, match='"dog" has 5 rows and a file holds one: encode it as "one subject"'):
        save_subject(tmp_path / "dogs.safetensors", Subject(torch.zeros(5, 16, 768), "dog"))
    assert not list(tmp_path.iterdir())


def test_a_blended_row_of_a_batch_is_saved_whole(tmp_path):
    """A view into a larger tensor, and an expanded one."""
    rows = torch.randn(3, 16, 768)
    save_subject(tmp_path / "row.safetensors", Subject(rows[1:2], "dog"))
    assert torch.equal(load_subject(tmp_path / "row.safetensors").vectors, rows[1:2])


def save(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_unet_down.lora_up.weight": torch.zeros(4, 4)}, "is a LoRA and no subject: load it with Load LoRA"),
        ({"clip_l": torch.zeros(4, 768), "clip_g": torch.zeros(4, 1280)}, r"holds 2 tensors \(clip_g, clip_l\)"),
        ({f"layer.{i}": torch.zeros(2) for i in range(9)}, r"9 tensors \(layer.0, layer.1, layer.2, ...\)"),
        ({"emb_params": torch.zeros(1, 16, 768)}, r"emb_params of shape \[1, 16, 768\], and a subject has the shape"),
        ({"emb_params": torch.zeros(768)}, r"of shape \[768\]"),
        ({"emb_params": torch.zeros(0, 768)}, r"of shape \[0, 768\]"),
        ({"emb_params": torch.zeros(16, 768, dtype=torch.int64)}, "holds torch.int64 and not vectors"),
        ({"emb_params": torch.full((16, 768), float("nan"))}, "holds NaN"),
        (
            {"emb_params": torch.zeros(4, 768)},
            "a textual inversion of 4 vectors, .* write embedding:thing into a prompt",
        ),
        ({"emb_params": torch.zeros(16, 768)}, "does not say which word its subject is: write it"),
        ({}, "holds 0 tensors"),
    ],
)
def test_what_is_no_subject_is_refused_with_what_it_is(tmp_path, tensors, sentence):
    with pytest.raises(SubjectFileError, match=sentence):
        load_subject(save(tmp_path / "thing.safetensors", tensors))


def test_a_plain_textual_inversion_of_sixteen_vectors_is_a_subject(tmp_path):
    vectors = torch.randn(16, 768).half()
    path = save(tmp_path / "plain.safetensors", {"anything": vectors}, {"word": "not ours", "encoder": "nor this"})
    loaded = load_subject(path, "dog")
    assert torch.equal(loaded.vectors[0], vectors.float())
    assert (loaded.word, loaded.encoder, loaded.source) == ("dog", "", "")


@pytest.mark.parametrize("version", ["2", "later", ""])
def test_a_later_version_is_named(tmp_path, version):
    path = save(
        tmp_path / "x.safetensors", {"emb_params": torch.zeros(16, 8)}, {"format": "blip-subject", "version": version}
    )
    with pytest.raises(SubjectFileError, match=f"a subject of version {version}, .*: update the pack"):
        load_subject(path)


@pytest.mark.parametrize("length", [0, 7, 100, 1000, -1])
def test_a_truncated_file_is_named(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(SubjectFileError, match="no whole safetensors file .*: it is truncated or something else"):
        load_subject(file)


def test_other_files_are_named(tmp_path):
    torch.save({"string_to_param": {"*": torch.zeros(16, 768)}}, tmp_path / "old.pt")
    torch.save({"emb_params": torch.zeros(16, 768)}, tmp_path / "disguised.safetensors")
    for name in ("old.pt", "disguised.safetensors"):
        with pytest.raises(SubjectFileError, match="is a pickle .* which can run code and holds no word"):
            load_subject(tmp_path / name)
    with pytest.raises(SubjectFileError, match="There is no file"):
        load_subject(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(SubjectFileError, match="no whole safetensors file"):
        load_subject(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    "name", ["my_dog", "Dog-2.1", "小狗", "Müller", "कुत्ता", "x" * MAX_NAME_BYTES, "console", "COM10"]
)
def test_safe_names_are_kept(name):
    assert checked_name(f" {name} ") == name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "The name is empty"),
        ("  ", "The name is empty"),
        ("../x", "holds '/', .*: write \"x\""),
        ("a/b", "holds '/', .*: write \"a_b\""),
        ("a\\b", re.escape(r"holds '\\'")),
        ("/etc/passwd", "holds '/'"),
        ("C:x", "holds ':'"),
        ("my dog", "holds ' ', .*: write \"my_dog\""),
        ("(dog:1.2)", r"holds '\(:\)', .*: write \"dog_1.2\""),
        ("a\0b", "holds"),
        ("a\nb", "holds"),
        ("dog\u202egnp", "holds"),
        ("🐕", 'write "my_subject"'),
        ("..", "begins or ends with a dot"),
        (".hidden", 'write "hidden"'),
        ("dog.", 'write "dog"'),
        ("CON", 'belongs to a device on Windows: write "my_CON"'),
        ("nul.v2", "belongs to a device on Windows"),
        ("com1", "belongs to a device on Windows"),
        ("COM¹", "belongs to a device on Windows"),
        ("x" * (MAX_NAME_BYTES + 1), "is 121 bytes long"),
        ("犬" * 41, "is 123 bytes long"),
    ],
)
def test_other_names_get_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked_name(name)


@given(st.text(max_size=40))
def test_no_name_leaves_the_folder(name):
    try:
        checked = checked_name(name)
    except ValueError:
        return
    assert os.path.basename(checked) == checked
    assert not set(checked) & set('<>:"/\\|?*()[]{}, \t\r\n\0')


def test_two_spellings_of_one_letter_are_one_name():
    assert checked_name("cafe\u0301") == checked_name("caf\u00e9")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    config = SubjectEncoderConfig(
        VisionConfig(image_size=28, width=32, layers=1, heads=2, feed_forward_width=32),
        QFormerConfig(width=32, layers=1, heads=2, feed_forward_width=32),
        projection_width=32,
    )
    return SubjectEncoder(config).state_dict()


def test_an_encoder_is_the_same_in_half_precision(weights):
    assert re.fullmatch("[0-9a-f]{16}", encoder_hash(weights))
    assert encoder_hash({name: weight.half() for name, weight in weights.items()}) == encoder_hash(weights)


@pytest.mark.parametrize("name", ["qformer.query_tokens", "projection.contract.weight"])
def test_another_encoder_is_another(weights, name):
    assert encoder_hash({**weights, name: weights[name] + 0.01}) != encoder_hash(weights)


def test_a_mismatch_in_words():
    ours, unknown = Subject(torch.zeros(1, 16, 8), "dog", "12ab"), Subject(torch.zeros(1, 16, 8), "dog")
    assert encoder_mismatch(ours, "12ab") == encoder_mismatch(ours, "") == ""
    assert '"dog" was made by the encoder 12ab, and this Q-Former is 34cd' in encoder_mismatch(ours, "34cd")
    assert "It is not known which encoder" in encoder_mismatch(unknown, "34cd")


def test_pictures_are_told_apart():
    image = torch.randint(0, 256, (1, 20, 30, 3)) / 255
    assert image_hash(image) == image_hash(image + 1e-6)
    others = [image.flip(1), image[:, :10], torch.cat([image, image]), image.reshape(1, 30, 20, 3)]
    assert len({image_hash(each) for each in (image, *others)}) == 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer.*git lfs pull"),
        ("<!doctype html><title>Sign in</title>", "is a web page .*: download the file"),
    ],
)
def test_a_stand_in_for_a_file_is_named_as_what_it_is(tmp_path, content, sentence):
    (tmp_path / "rex.safetensors").write_text(content)
    with pytest.raises(SubjectFileError, match=sentence):
        load_subject(tmp_path / "rex.safetensors", "dog")
