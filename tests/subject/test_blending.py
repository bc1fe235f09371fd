"""Blending as properties: ends, symmetry, order, norms, and formulas written out a second time."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_qformer import Subject
from blip_qformer.subject.blending import BLEND_MODES, blend, blend_vectors, describe_blend, trajectory
from blip_qformer.subject.views import average_views, describe_views, view_similarity
from blip_qformer.subject.weights import (
    bilinear_weights,
    normalise_weights,
    parse_weights,
    slider_weights,
    trajectory_positions,
)

modes = st.sampled_from(BLEND_MODES)
seeds = st.integers(0, 10_000)
counts = st.integers(2, 4)
positive = st.floats(0.01, 100)
few = settings(max_examples=30, deadline=None)


def random_subjects(count, seed=0, rows=1, width=48):
    """Subjects of different norms with something in common, as those of one encoder have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 16, width, generator=generator)
    return [
        Subject((common + torch.randn(rows, 16, width, generator=generator)) * (1 + index), f"thing{index}")
        for index in range(count)
    ]


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def slerp(a, b, t):
    """Shoemake's formula (SIGGRAPH 1985) on the directions, with norms that go linearly."""
    a, b = a.double(), b.double()
    norms = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    a, b = a / norms[0], b / norms[1]
    angle = (a * b).sum(-1, keepdim=True).acos()
    direction = ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b
    return (direction * ((1 - t) * norms[0] + t * norms[1])).float()


@few
@given(modes, counts, seeds, positive, st.data())
def test_all_the_weight_gives_a_subject_back_bit_by_bit(mode, count, seed, weight, data):
    subjects = random_subjects(count, seed)
    chosen = data.draw(st.integers(0, count - 1))
    blended = blend(subjects, [weight if index == chosen else 0.0 for index in range(count)], mode)
    assert torch.equal(blended.vectors, subjects[chosen].vectors)
    assert blended.word == subjects[chosen].word


@few
@given(modes, seeds, st.floats(-1, 2))
def test_two_subjects_can_change_places(mode, seed, x):
    a, b = random_subjects(2, seed)
    close(blend([a, b], [1 - x, x], mode).vectors, blend([b, a], [x, 1 - x], mode).vectors)


@few
@given(modes, seeds, st.lists(positive, min_size=3, max_size=4))
def test_the_order_does_not_matter(mode, seed, weights):
    subjects = random_subjects(len(weights), seed)
    expected = blend(subjects, weights, mode).vectors
    for order in itertools.permutations(range(len(weights))):
        reordered = blend([subjects[index] for index in order], [weights[index] for index in order], mode)
        close(reordered.vectors, expected)


@few
@given(modes, counts, seeds, st.floats(0.001, 1000), st.data())
def test_only_the_proportion_of_weights_matters(mode, count, seed, factor, data):
    subjects = random_subjects(count, seed)
    weights = data.draw(st.lists(positive, min_size=count, max_size=count))
    close(
        blend(subjects, weights, mode).vectors,
        blend(subjects, [weight * factor for weight in weights], mode).vectors,
    )


@few
@given(seeds, st.floats(-0.5, 1.5))
def test_spherical_is_slerp_for_two(seed, t):
    a, b = random_subjects(2, seed)
    if (1 - t) + 2 * t > 0.1:  # norms stay positive
        close(blend([a, b], [1 - t, t], "spherical").vectors, slerp(a.vectors, b.vectors, t), atol=1e-4)


@few
@given(seeds, counts, st.data())
def test_the_spherical_mean_is_where_the_ways_to_all_cancel(seed, count, data):
    subjects = random_subjects(count, seed)
    weights = normalise_weights(data.draw(st.lists(positive, min_size=count, max_size=count)), count)
    mean = torch.nn.functional.normalize(blend(subjects, weights, "spherical").vectors.double(), dim=-1)
    total = torch.zeros_like(mean)
    for subject, weight in zip(subjects, weights, strict=True):
        direction = torch.nn.functional.normalize(subject.vectors.double(), dim=-1)
        cosine = (direction * mean).sum(-1, keepdim=True)
        across = direction - cosine * mean
        total += weight * cosine.clamp(-1, 1).acos() * across / across.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    assert total.norm(dim=-1).max() < 1e-4


@few
@given(st.sampled_from(["spherical", "norm-preserving"]), counts, seeds, st.data())
def test_norms_go_linearly(mode, count, seed, data):
    subjects = random_subjects(count, seed)
    weights = normalise_weights(data.draw(st.lists(positive, min_size=count, max_size=count)), count)
    norms = [weight * each.vectors.norm(dim=-1) for each, weight in zip(subjects, weights, strict=True)]
    torch.testing.assert_close(blend(subjects, weights, mode).vectors.norm(dim=-1), sum(norms), rtol=1e-5, atol=0)


@few
@given(seeds, counts, st.data())
def test_linear_is_the_weighted_mean_and_norm_preserving_its_direction(seed, count, data):
    subjects = random_subjects(count, seed)
    weights = normalise_weights(data.draw(st.lists(positive, min_size=count, max_size=count)), count)
    mean = sum(weight * each.vectors for each, weight in zip(subjects, weights, strict=True))
    close(blend(subjects, weights, "linear").vectors, mean)
    cosine = torch.cosine_similarity(blend(subjects, weights, "norm-preserving").vectors, mean, dim=-1)
    close(cosine, torch.ones_like(cosine))


@few
@given(modes, counts, seeds, st.data())
def test_a_batch_is_a_loop(mode, count, seed, data):
    subjects = random_subjects(count, seed, rows=3)
    single = data.draw(st.integers(0, count - 1))
    subjects[single] = Subject(subjects[single].vectors[:1], "one")
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=count, max_size=count))
    batch = blend(subjects, weights, mode).vectors
    for row in range(3):
        alone = [Subject(each.vectors[row % len(each)][None], each.word) for each in subjects]
        close(batch[row : row + 1], blend(alone, weights, mode).vectors)


@few
@given(modes, seeds, st.floats(-1, 2))
def test_blending_a_subject_with_itself_changes_nothing(mode, seed, x):
    (subject,) = random_subjects(1, seed)
    close(blend([subject, subject], [1 - x, x], mode).vectors, subject.vectors)


@pytest.mark.parametrize("mode", BLEND_MODES)
@pytest.mark.parametrize("weights", [(1.5, -0.5), (2, -0.5, -0.5), (3, -1, -1, 0)])
def test_extrapolation_goes_away_from_the_negative(mode, weights):
    subjects = random_subjects(len(weights))
    blended = blend(subjects, weights, mode)
    assert torch.isfinite(blended.vectors).all()
    before, after = (
        torch.cosine_similarity(each.vectors, subjects[1].vectors, dim=-1).mean() for each in (subjects[0], blended)
    )
    assert after < before
    assert describe_blend(subjects, weights, mode, blended).startswith(f"Extrapolation ({mode}), beyond the subjects: ")


def test_spherical_extrapolation_begins_without_a_jump():
    subjects = random_subjects(3)
    inside = blend(subjects, [0.5, 0.5, 1e-7], "spherical").vectors
    outside = blend(subjects, [0.5, 0.5, -1e-7], "spherical").vectors
    close(inside, outside, atol=1e-5)


@pytest.mark.parametrize("mode", BLEND_MODES)
def test_vectors_that_cancel_or_are_zero_stay_finite(mode):
    a = torch.randn(1, 16, 48)
    assert torch.equal(blend_vectors([a, -a], [0.5, 0.5], mode), torch.zeros_like(a))
    close(blend_vectors([a, torch.zeros_like(a)], [0.25, 0.75], mode), a / 4)
    close(blend_vectors([torch.zeros_like(a), a], [0.25, 0.75], mode), a * 0.75)
    assert torch.isfinite(blend_vectors([a, -a, a], [0.5, 0.25, 0.25], mode)).all()


def test_the_word_is_the_heaviest_or_the_written_one():
    subjects = random_subjects(3)
    assert blend(subjects, [1, 5, 2]).word == "thing1"
    assert blend(subjects, [1, 5, 2], word=" teapot ").word == "teapot"


def test_a_blend_remembers_encoder_and_pictures():
    subjects = zip(random_subjects(3), "xyx", strict=True)
    a, b, c = (Subject(each.vectors, each.word, "e", source) for each, source in subjects)
    assert (blend([a, b, c], [1, 1, 1]).encoder, blend([a, b, c], [1, 1, 1]).source) == ("e", "x+y")
    assert blend([a, b, c], [1, 0, 0]).source == "x"
    unknown = Subject(b.vectors, "plain")
    assert blend([unknown, a], [1, 1]).encoder == "e"


def test_a_blend_in_words():
    a, b = random_subjects(2)
    text = describe_blend([a, b], [1, 3], "linear", blend([a, b], [1, 3]))
    assert text == 'Blend (linear): 25% "thing0" (subject_1) + 75% "thing1" (subject_2), for the word "thing1".'


def test_subjects_that_do_not_belong_together():
    a, b = random_subjects(2)
    made_by = [Subject(each.vectors, each.word, encoder) for each, encoder in ((a, "12ab"), (b, "34cd"))]
    sentence = 'subject_1, "thing0", was made by the encoder 12ab and subject_2, "thing1", by 34cd'
    for call in (lambda: blend(made_by, [1, 0]), lambda: trajectory(made_by, 3)):
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(ValueError, match="16 x 24 and 16 x 48 numbers"):
        blend([a, Subject(torch.zeros(1, 16, 24), "narrow")], [1, 1])
    with pytest.raises(ValueError, match='subject_1, "two", has 2 rows and another subject 3'):
        blend([Subject(torch.zeros(2, 16, 48), "two"), Subject(torch.zeros(3, 16, 48), "three")], [1, 1])
    with pytest.raises(ValueError, match='no blend mode "cubic": choose one of linear, spherical, norm-preserving'):
        blend([a, b], [1, 1], "cubic")


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6))
def test_weights_sum_to_one_or_are_refused(weights):
    normalised, refusal = None, ""
    try:
        normalised = normalise_weights(weights, len(weights))
    except ValueError as error:
        refusal = str(error)
    if normalised is None:
        assert refusal.startswith("The weights")
    else:
        assert sum(normalised) == pytest.approx(1)
        assert max(abs(weight) for weight in normalised) < 101


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1.0], r"There are 1 weights \(1\) for 2"),
        ([], r"There are 0 weights \(\) for 2"),
        ([0.0, -0.0], "The weights 0, -0 are all zero"),
        ([float("nan"), 1.0], "The weights nan, 1 hold NaN or infinity"),
        ([float("inf"), 1.0], "The weights inf, 1 hold NaN or infinity"),
        ([1.0, -1.0], "The weights 1, -1 sum to 0"),
        ([1.0, -3.0], "The weights 1, -3 sum to -2"),
        ([1.0, -0.999], "a clearly positive sum is needed"),
    ],
)
def test_weights_that_cannot_be_used(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        normalise_weights(weights, 2)


def test_weights_as_people_write_them():
    assert parse_weights("1, 2,0.5") == parse_weights(" 1 2 ; .5 ") == parse_weights("1,2,0.5,") == [1, 2, 0.5]
    assert parse_weights(" ") == []
    with pytest.raises(ValueError, match='The weights "1, many" hold "many", which is no number'):
        parse_weights("1, many")


@given(st.floats(-1, 2), st.floats(-1, 2))
def test_sliders_give_weights_that_sum_to_one(x, y):
    for count in (2, 3, 4):
        assert sum(slider_weights(count, x, y)) == pytest.approx(1)


def test_corners_of_the_square():
    corners = [bilinear_weights(x, y) for y in (0, 1) for x in (0, 1)]
    assert corners == [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert [slider_weights(3, x, y) for x, y in ((0, 0), (1, 0), (0.3, 1))] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    with pytest.raises(ValueError, match="two to four subjects, not 5"):
        slider_weights(5, 0, 0)


@pytest.mark.parametrize("mode", BLEND_MODES)
def test_a_line_is_a_loop_with_exact_ends(mode):
    a, b = random_subjects(2)
    line = trajectory([a, b], 5, mode)
    assert (len(line), line.word) == (5, "thing0")
    assert torch.equal(line.vectors[:1], a.vectors)
    assert torch.equal(line.vectors[-1:], b.vectors)
    for index, x in enumerate([0, 0.25, 0.5, 0.75, 1]):
        assert torch.equal(line.vectors[index : index + 1], blend([a, b], [1 - x, x], mode).vectors)


@pytest.mark.parametrize("mode", BLEND_MODES)
def test_a_square_has_the_four_subjects_at_its_corners(mode):
    subjects = random_subjects(4)
    square = trajectory(subjects, 3, mode, word="mixture")
    assert (len(square), square.word) == (9, "mixture")
    for index, subject in zip((0, 2, 6, 8), subjects, strict=True):
        assert torch.equal(square.vectors[index : index + 1], subject.vectors)
    close(square.vectors[1:2], blend(subjects[:2], [1, 1], mode).vectors)
    close(square.vectors[4:5], blend(subjects, [1, 1, 1, 1], mode).vectors)


def test_trajectories_that_go_nowhere():
    subjects = random_subjects(4)
    with pytest.raises(ValueError, match="but there are 3: connect two or four"):
        trajectory(subjects[:3], 3)
    with pytest.raises(ValueError, match="1 steps has no two ends"):
        trajectory(subjects, 1)
    with pytest.raises(ValueError, match='subject_2, "pair", has 2 rows'):
        trajectory([subjects[0], Subject(torch.ones(2, 16, 48), "pair")], 3)
    assert trajectory_positions(2, 3) == [(0.0,), (0.5,), (1.0,)]


def test_views_are_weighted():
    views = Subject(torch.randn(3, 16, 48), "dog", "encoder", "picture")
    assert torch.equal(average_views(views).vectors, views.average().vectors)
    close(average_views(views, [2, 2, 2]).vectors, views.average().vectors, atol=1e-6)
    assert torch.equal(average_views(views, [0, 7, 0]).vectors, views.vectors[1:2])
    weighted = average_views(views, [1, 1, 2])
    close(weighted.vectors[0], (views.vectors[0] + views.vectors[1] + 2 * views.vectors[2]) / 4, atol=1e-6)
    assert (weighted.word, weighted.encoder, weighted.source) == ("dog", "encoder", "picture")
    with pytest.raises(ValueError, match=r"There are 2 weights \(1, 2\) for 3 subjects or views"):
        average_views(views, [1, 2])


def test_the_odd_view_is_named():
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(1, 16, 48, generator=generator) + 0.2 * torch.randn(4, 16, 48, generator=generator)
    views[2] = torch.randn(16, 48, generator=generator)
    subject = Subject(views, "dog")
    by_hand = [
        sum(torch.cosine_similarity(views[i], views[j], dim=-1).mean() for j in range(4) if j != i) / 3
        for i in range(4)
    ]
    close(view_similarity(subject), torch.stack(by_hand), atol=1e-6)
    assert describe_views(subject).startswith('"dog" from 4 pictures. Picture 3 is least like the others (similarity ')
    assert describe_views(Subject(views[:2], "dog")) == '"dog" from 2 pictures.'
    assert describe_views(Subject(views[:1], "dog")) == '"dog" from 1 picture.'
