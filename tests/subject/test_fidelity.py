"""Images compared with a subject: scores worked out by hand, and which image is best."""

from __future__ import annotations

import math

import pytest
import torch

from blip_qformer import Subject
from blip_qformer.subject.fidelity import Fidelity, likeness, reference_rows


def test_likeness_is_the_mean_cosine_of_the_queries():
    """Two queries, one the same and one at 60 degrees: (1 + 0.5) / 2, whatever their lengths."""
    reference = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    turned = torch.tensor([[3.0, 0.0], [math.sqrt(3), 1.0]])
    found = likeness(torch.stack([reference, turned, -reference]), reference)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.75, -1.0]))
    each_its_own = likeness(torch.stack([reference, turned]), torch.stack([turned, turned]))
    torch.testing.assert_close(each_its_own, torch.tensor([0.75, 1.0]))


def test_the_best_has_the_highest_total():
    assert Fidelity((0.5, 0.9, 0.7)).best == 1
    assert Fidelity((0.5, 0.9, 0.7), (0.9, 0.1, 0.8)).best == 2  # 1.4, 1.0, 1.5
    assert Fidelity((0.5, 0.9, 0.9)).best == 1  # the earlier of two
    assert Fidelity((math.nan, 0.1, math.nan)).best == 1


def test_scores_in_words():
    assert Fidelity((0.5, 0.9123), (0.25, 0.5)).labels() == ["1: 0.500 + 0.250", "2: 0.912 + 0.500 best"]
    assert Fidelity((0.5, 0.25)).describe("dog").splitlines() == [
        'Picture 1 of 2 is best for the subject "dog" (likeness, at most 1 each):',
        "1: 0.500 best",
        "2: 0.250",
    ]


def test_one_subject_for_all_images_or_one_for_each():
    rows = torch.randn(4, 16, 8)
    single = Subject(rows[:1], "dog", "12ab")
    assert torch.equal(reference_rows([single], 3).vectors, rows[:1])
    batches = [Subject(rows[:3], "dog"), Subject(rows[3:], "dog")]
    assert torch.equal(reference_rows(batches, 4).vectors, rows)
    with pytest.raises(ValueError, match="There are 4 subjects for 3 pictures: connect one subject, or one for each"):
        reference_rows(batches, 3)
    with pytest.raises(ValueError, match=r"different words \(dog, cat\)"):
        reference_rows([single, Subject(rows[:1], "cat")], 2)
