"""New models."""

from __future__ import annotations

import pytest
import torch

from blip_qformer.pipeline import Pipeline, new_pipeline
from tests import tiny
from tests.pipeline.weights import assert_same, weights_of


def test_initial_weights_are_a_function_of_the_seed():
    first, same, other = (weights_of(new_pipeline(tiny.SIZES, seed)) for seed in (1, 1, 2))
    assert_same(same, first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])
    for name, weight in first.items():
        if weight.ndim > 1 and not name.startswith(("unet", "vae", "encoder.vision.position_embedding")):
            deviation = 0.02 * (768 / 32) ** 0.5  # BERT's 0.02, at the width of all of these
            assert weight.std() == pytest.approx(deviation, rel=0.3)


def test_an_initialiser_runs_under_the_models_seed():
    def initialise(pipeline: Pipeline) -> None:
        torch.nn.init.normal_(pipeline.vae.encoder.conv_in.weight)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same = (weights_of(new_pipeline(tiny.SIZES, 1, initialise)) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)  # the global generator is as it was
    assert_same(same, first)
    plain = weights_of(new_pipeline(tiny.SIZES, 1))
    changed = {name for name, weight in plain.items() if not torch.equal(weight, first[name])}
    assert changed == {"vae.encoder.conv_in.weight"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vae": None, "clip": {}}, "A new model is given by vision, .* look at clip, vae"),
        ({"unet": {"colour": 1}}, "sizes of the new model's unet do not fit: .*colour"),
        ({"vision": {"colour": 1}}, "sizes of the new model's vision do not fit: .*colour"),
        ({"tokenizer": "nowhere"}, "nowhere has no vocab.json, which CLIP's tokenizer needs"),
    ],
)
def test_sizes_that_do_not_fit_get_one_sentence(changes, sentence):
    sizes = {name: value for name, value in (tiny.SIZES | changes).items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        new_pipeline(sizes, seed=0)


def test_widths_that_do_not_meet_get_one_sentence():
    sizes = {**tiny.SIZES, "text_encoder": {**tiny.SIZES["text_encoder"], "width": 64}}
    with pytest.raises(
        ValueError, match="vectors are 32 numbers wide, the text encoder's words 64, and what the U-Net re"
    ):
        tiny.make_stage("subject", model=sizes)
