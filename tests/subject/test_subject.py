"""What a subject is, apart from where it came from."""

from __future__ import annotations

import pytest
import torch

from blip_qformer import Subject


def test_average_is_the_mean_of_the_views():
    views = torch.randn(3, 16, 768)
    subject = Subject(views, "dog")
    assert torch.equal(subject.average().vectors, views.mean(0, keepdim=True))
    assert len(subject.average()) == 1
    assert subject.average().word == "dog"


def test_vectors_are_kept_as_float32():
    assert Subject(torch.randn(1, 16, 768).half(), "dog").vectors.dtype == torch.float32


def test_what_is_no_subject():
    with pytest.raises(ValueError, match=r"these have \[16, 768\]"):
        Subject(torch.zeros(16, 768), "dog")
    with pytest.raises(ValueError, match='"dog" hold NaN or infinity'):
        Subject(torch.full((1, 16, 768), float("nan")), "dog")
