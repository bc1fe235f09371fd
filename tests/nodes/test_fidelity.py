"""Subject Fidelity in the host: its scores are those of vectors encoded by hand, for batches and for lists."""

from __future__ import annotations

import logging

import pytest
import torch

from blip_qformer.subject.fidelity import likeness
from tests.host import InputList


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """A picture with large shapes, so that noise on it is another degree of the same."""
    image = torch.zeros(1, 64, 64, 3)
    image[:, 16:48, 16:48, 0] = 1
    return image


@pytest.fixture(scope="module")
def drawn(reference) -> torch.Tensor:
    """Its negative, itself, and another colour."""
    return torch.cat([1 - reference, reference, reference.flip(-1)])


def encode(host, loaded, image, word="dog", **inputs):
    inputs = {"subject_word": word, "average_batch": False, **inputs}
    return host.run("BLIPDiffusionSubjectEncode", qformer=loaded.qformer, image=image, **inputs)[0]


def compare(host, loaded, images, subject, **inputs):
    return host.run("BLIPDiffusionSubjectFidelity", qformer=loaded.qformer, images=images, subject=subject, **inputs)


def scores(report: str) -> list[list[float]]:
    """The numbers of a report, one list a picture."""
    lines = [line.split(": ")[1].removesuffix(" best") for line in report.splitlines()[1:] if line[0].isdigit()]
    return [[float(number) for number in line.split(" + ")] for line in lines]


def test_the_picture_of_the_subject_is_best(host, loaded, reference, drawn):
    subject = encode(host, loaded, reference)
    best, sheet, report, index = compare(host, loaded, drawn, subject)
    assert index == 1
    assert torch.equal(best, drawn[1:2])
    expected = likeness(encode(host, loaded, drawn).vectors, subject.vectors).tolist()
    assert scores(report) == [[pytest.approx(value, abs=6e-4)] for value in expected]
    assert report.startswith('Picture 2 of 3 is best for the subject "dog"')
    assert expected[1] == pytest.approx(1, abs=1e-5)
    assert sheet.shape[1] > 2 * 64  # two rows of 64 pixels, and their labels
    assert (sheet[0, 64:] == 0).any()


def test_a_list_of_several_sizes_is_compared_as_a_batch_is(host, loaded, reference, drawn):
    subject = encode(host, loaded, reference)
    in_list = compare(host, loaded, InputList(drawn.split([1, 2])), subject)
    as_batch = compare(host, loaded, drawn, subject)
    assert in_list[2:] == as_batch[2:]
    assert all(map(torch.equal, in_list[:2], as_batch[:2]))
    large = torch.nn.functional.interpolate(drawn[1:2].movedim(-1, 1), scale_factor=2).movedim(1, -1)
    best, *_, index = compare(host, loaded, InputList([drawn[:1], large]), subject)
    assert (index, best.shape) == (1, large.shape)


def test_each_picture_has_a_subject_of_its_own(host, loaded, drawn):
    each = encode(host, loaded, drawn)
    _, _, report, _ = compare(host, loaded, drawn, each)
    assert scores(report) == [[1.0]] * 3
    _, _, report, _ = compare(host, loaded, drawn, InputList(type(each)(row, "dog") for row in each.vectors.split(1)))
    assert scores(report) == [[1.0]] * 3
    with pytest.raises(ValueError, match="There are 3 subjects for 2 pictures"):
        compare(host, loaded, drawn[:2], each)


def test_a_reference_stands_in_for_the_subjects_vectors(host, loaded, reference, drawn):
    tuned = type(encode(host, loaded, reference))(torch.randn(1, 16, 128), "dog")
    *_, index = compare(host, loaded, drawn, tuned, reference=reference)
    assert index == 1
    *_, index = compare(host, loaded, drawn, tuned, reference=drawn[2:])
    assert index == 2


def test_with_a_prompt_a_picture_also_answers_to_it(host, loaded, reference, drawn):
    """The second number is what fine-tuning's validation calls agreement: asked about the prompt, like its picture."""
    subject, alone = encode(host, loaded, reference), drawn[:1]
    *_, report, _ = compare(host, loaded, drawn, subject, prompt=" in the snow ", without_subject=alone)
    words = [encode(host, loaded, drawn, word) for word in ("dog", "in the snow")]
    like = likeness(words[0].vectors, subject.vectors).tolist()
    agree = likeness(words[1].vectors, encode(host, loaded, alone, "in the snow").vectors).tolist()
    expected = [[pytest.approx(value, abs=6e-4) for value in row] for row in zip(like, agree, strict=True)]
    assert scores(report) == expected
    assert agree[0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"prompt": "in the snow"}, "a picture drawn from it"),
        ({"without_subject": torch.zeros(1, 8, 8, 3)}, "what was"),
    ],
)
def test_a_prompt_and_its_picture_belong_together(host, loaded, reference, drawn, given, missing):
    with pytest.raises(ValueError, match=f"prompt and without_subject belong together.*add {missing}"):
        compare(host, loaded, drawn, encode(host, loaded, reference), **given)


def test_a_subject_of_another_encoder_is_warned_of(host, loaded, reference, drawn, caplog):
    foreign = type(encode(host, loaded, reference))(torch.randn(1, 16, 128), "dog", "feedfeedfeedfeed")
    with caplog.at_level(logging.WARNING, logger="blip_diffusion"):
        *_, report, _ = compare(host, loaded, drawn, foreign)
    assert "was made by the encoder feedfeedfeedfeed" in report
    assert "was made by the encoder feedfeedfeedfeed" in caplog.text


def test_it_can_be_cancelled_between_pictures(host, loaded, reference, drawn):
    import comfy.model_management as management

    subject = encode(host, loaded, reference)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        compare(host, loaded, drawn, subject)
