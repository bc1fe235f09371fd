"""What the page shows of the library's errors: ValueError and the sentence, where the pack's path used to stand."""

from __future__ import annotations

import importlib

import pytest

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def pointers(host, checkpoints):
    """A git-lfs pointer as a model, and one as a subject."""
    files = [host.base / "models" / folder / "pointer.safetensors" for folder in ("blip_diffusion", "embeddings")]
    for file in files:
        file.write_text(LFS_POINTER)
    yield files
    for file in files:
        file.unlink()


@pytest.mark.parametrize(
    ("node", "inputs", "cause", "sentence"),
    [
        ("BLIPDiffusionLoader", {"checkpoint": "pointer.safetensors"}, "CheckpointError", "is a git-lfs pointer"),
        (
            "BLIPDiffusionSubjectLoad",
            {"subject_file": "pointer.safetensors", "subject_word": "dog"},
            "SubjectFileError",
            "is a git-lfs pointer",
        ),
    ],
)
def test_the_host_calls_it_a_value_error(host, pointers, node, inputs, cause, sentence):
    import execution

    with pytest.raises(ValueError, match=sentence) as error:
        host.run(node, **inputs)
    assert execution.full_type_name(type(error.value)) == "ValueError"
    assert type(error.value.__cause__).__name__ == cause
    frames = [str(entry.path) for entry in error.traceback]
    assert any("blip_qformer" in frame for frame in frames), "the report still tells where it was raised"


@pytest.mark.parametrize(
    ("module", "name", "shown"),
    [
        ("blip_qformer.imaging.masks", "NoSubjectError", "ValueError"),
        ("blip_qformer.imaging.matting", "MattingError", "ValueError"),
        ("builtins", "ValueError", "ValueError"),
        ("builtins", "FileExistsError", "FileExistsError"),
        ("json", "JSONDecodeError", "json.decoder.JSONDecodeError"),  # nothing of ours: as it is
    ],
)
def test_only_our_own_classes_are_exchanged(host, module, name, shown):
    import execution

    kind = getattr(importlib.import_module(module) if "." not in module else host.module(module), name)

    class Failing:
        @classmethod
        def execute(cls, text):
            raise kind(text, "", 0) if module == "json" else kind(text)

    node = host.module("nodes.host.plain_errors").with_plain_errors(Failing)
    with pytest.raises((ValueError, OSError), match="a sentence") as error:
        node.execute("a sentence")
    assert execution.full_type_name(type(error.value)) == shown
