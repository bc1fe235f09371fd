"""Subject Interpolate, Subject Trajectory and Subject Grid in the host."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.attention.graphs import counted
from tests.nodes.attention.test_carrier import dynamic
from tests.nodes.test_prompt import compose, stock


@pytest.fixture
def subjects(host, loaded):
    """Four subjects of four random images."""
    words = ("dog", "cat", "cup", "tree")
    return [
        host.run(
            "BLIPDiffusionSubjectEncode",
            qformer=loaded.qformer,
            image=torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(seed)),
            subject_word=word,
        )[0]
        for seed, word in enumerate(words)
    ]


def named(subjects):
    return {f"subject_{number}": subject for number, subject in enumerate(subjects, start=1)}


def interpolate(host, subjects, **inputs):
    return host.run("BLIPDiffusionSubjectInterpolate", **named(subjects), **inputs)


def sample(host, loaded, positive, latent, model=None):
    return host.run(
        "KSampler",
        model=model or loaded.model,
        seed=3,
        steps=3,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        positive=positive,
        negative=stock(host, loaded.clip, ""),
        latent_image=latent,
        denoise=1.0,
    )[0]["samples"]


@pytest.mark.parametrize("mode", ["linear", "spherical", "norm-preserving"])
def test_the_slider_goes_from_one_to_the_other(host, subjects, mode):
    ends = [interpolate(host, subjects[:2], x=x, mode=mode)[0] for x in (0.0, 1.0)]
    assert [torch.equal(end.vectors, subject.vectors) for end, subject in zip(ends, subjects, strict=False)] == [
        True
    ] * 2
    assert [end.word for end in ends] == ["dog", "cat"]
    middle, report = interpolate(host, subjects[:2], mode=mode)
    assert report == f'Blend ({mode}): 50% "dog" (subject_1) + 50% "cat" (subject_2), for the word "dog".'
    assert not torch.equal(middle.vectors, ends[0].vectors)


def test_the_square_has_four_corners(host, subjects):
    for index, (x, y) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        corner, _ = interpolate(host, subjects, x=float(x), y=float(y))
        assert torch.equal(corner.vectors, subjects[index].vectors)


def test_three_subjects_are_a_triangle(host, subjects):
    assert torch.equal(interpolate(host, subjects[:3], x=0.7, y=1.0)[0].vectors, subjects[2].vectors)


def test_weights_replace_the_sliders(host, subjects):
    blended, report = interpolate(host, subjects[:3], x=0.9, weights="0, 8, 0")
    assert torch.equal(blended.vectors, subjects[1].vectors)
    blended, report = interpolate(host, subjects[:3], weights="1, 2, 1", word="monster")
    assert (blended.word, report[:31]) == ("monster", 'Blend (linear): 25% "dog" (subj')


def test_extrapolation_is_named(host, subjects):
    for inputs in ({"x": 1.5}, {"weights": "-1, 3"}):
        _, report = interpolate(host, subjects[:2], **inputs)
        assert report.startswith('Extrapolation (linear), beyond the subjects: -50% "dog" (subject_1) + 150% "cat"')


def test_a_blend_knows_its_encoder_and_pictures(host, loaded, subjects):
    blended, _ = interpolate(host, subjects[:2])
    assert blended.encoder == loaded.qformer.encoder_hash == subjects[0].encoder != ""
    assert blended.source == f"{subjects[0].source}+{subjects[1].source}"


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [("1", "1 weights"), ("0 0", "all zero"), ("nan, 1", "NaN"), ("1, -1", "sum to 0"), ("some, 1", "no number")],
)
def test_weights_that_cannot_be_used_get_one_sentence(host, subjects, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        interpolate(host, subjects[:2], weights=weights)


def test_a_gap_among_the_subjects_is_named(host, subjects):
    with pytest.raises(ValueError, match="subject_4 is connected and subject_3 is not"):
        host.run("BLIPDiffusionSubjectInterpolate", subject_1=subjects[0], subject_2=subjects[1], subject_4=subjects[3])


def test_mixed_encoders_are_refused(host, subjects):
    other = type(subjects[0])(subjects[1].vectors, "cat", "feedfeedfeedfeed")
    with pytest.raises(ValueError, match=f"{subjects[0].encoder} and .* feedfeedfeedfeed, so their vectors mean"):
        interpolate(host, [subjects[0], other])


def test_a_trajectory_is_one_run_and_equals_single_runs(host, loaded, subjects):
    (empty,) = host.run("EmptyLatentImage", width=64, height=64, batch_size=3)
    (path,), (latent,), labels = host.run(
        "BLIPDiffusionSubjectTrajectory", **named(subjects[:2]), steps=4, latent=empty, mode="spherical"
    )
    assert latent["samples"].shape == (4, 4, 8, 8)
    assert labels.splitlines() == ["x 0.00", "x 0.33", "x 0.67", "x 1.00"]
    together = sample(host, loaded, compose(host, loaded, path)[0], latent)
    one = {"samples": torch.zeros(1, 4, 8, 8)}
    singles = []
    for step in range(4):
        blended, _ = interpolate(host, subjects[:2], x=step / 3, mode="spherical")
        positive, _ = compose(host, loaded, blended, target_subject="dog")
        singles.append(sample(host, loaded, positive, one))
    assert not torch.allclose(together[0], together[1])
    torch.testing.assert_close(together, torch.cat(singles), atol=1e-3 * together.std().item(), rtol=0)


def test_a_trajectory_needs_a_picture_for_each_step(host, loaded, subjects):
    """With fewer, the host would leave out the last steps without a word; more than there are steps are drawn."""
    inputs = {**named(subjects[:2]), "steps": 5}
    (path,), _, _ = host.run("BLIPDiffusionSubjectTrajectory", **inputs)
    positive, _ = compose(host, loaded, path)
    for batch_size in (1, 4):
        (empty,) = host.run("EmptyLatentImage", width=64, height=64, batch_size=batch_size)
        with pytest.raises(ValueError, match=f"draws {batch_size} picture.*needs 5 side by side.*latent output"):
            sample(host, loaded, positive, empty)
    unchecked = [[tensor, {}] for tensor, _ in positive]
    for batch_size in (5, 7):
        (empty,) = host.run("EmptyLatentImage", width=64, height=64, batch_size=batch_size)
        sampled = sample(host, loaded, positive, empty)
        assert torch.equal(sampled, sample(host, loaded, unchecked, empty))


def test_one_subject_is_not_counted(host, loaded, subjects):
    positive, _ = compose(host, loaded, subjects[0])
    assert {*positive[0][1]} == {"pooled_output", "blip_token_spans"}


@pytest.mark.parametrize("node", ["BLIPDiffusionAttentionReweight", "BLIPDiffusionAttentionRecord"])
@pytest.mark.parametrize("wired", [False, True])
def test_subjects_are_counted_behind_other_nodes(host, loaded, subjects, monkeypatch, node, wired):
    """Also with a model of dynamic memory, which is not copied for it, and with a prompt for an area beside it."""
    (path,), _, _ = host.run("BLIPDiffusionSubjectTrajectory", **named(subjects[:2]), steps=3)
    positive, _ = compose(host, loaded, path)
    model, copies = dynamic(loaded.model, monkeypatch)
    inputs = {"model": model} if wired else {}
    inputs |= {"weights": "dog:2"} if node == "BLIPDiffusionAttentionReweight" else {}
    edited, *_, wired_model = host.run(node, conditioning=positive, **inputs)
    (area,) = host.run("ConditioningSetArea", conditioning=edited, width=64, height=64, x=0, y=0, strength=1.0)
    (both,) = host.run("ConditioningCombine", conditioning_1=area, conditioning_2=stock(host, loaded.clip, "grass"))
    latents = [host.run("EmptyLatentImage", width=128, height=64, batch_size=count)[0] for count in (2, 3)]
    for conditioning in (edited, both):
        with pytest.raises(ValueError, match="draws 2 picture.*needs 3 side by side"):
            sample(host, loaded, conditioning, latents[0], wired_model if wired else model)
        sample(host, loaded, conditioning, latents[1], wired_model if wired else model)
    if wired:
        assert copies == []


def test_counting_subjects_copies_no_model_with_dynamic_memory(host, loaded, subjects, monkeypatch):
    (path,), _, _ = host.run("BLIPDiffusionSubjectTrajectory", **named(subjects[:2]), steps=3)
    positive, _ = compose(host, loaded, path)
    model, copies = dynamic(loaded.model, monkeypatch)
    (empty,) = host.run("EmptyLatentImage", width=64, height=64, batch_size=2)
    with pytest.raises(ValueError, match="draws 2 picture.*needs 3 side by side"):
        sample(host, loaded, positive, empty, model)
    model, calls = counted(model)
    (empty,) = host.run("EmptyLatentImage", width=64, height=64, batch_size=3)
    sample(host, loaded, positive, empty, model)
    assert copies == []
    assert calls == [6] * 3  # positive and negative are one batch


def test_a_trajectory_in_parts_is_the_same(host, loaded, subjects):
    """The following nodes run once for each batch, so that the whole need not fit into memory."""
    (empty,) = host.run("EmptyLatentImage", width=64, height=64, batch_size=1)
    inputs = {**named(subjects[:2]), "steps": 5, "latent": empty}
    sampled = []
    for steps_at_once in (16, 2):
        batches, latents, _ = host.run("BLIPDiffusionSubjectTrajectory", **inputs, steps_at_once=steps_at_once)
        assert max(map(len, batches)) <= steps_at_once
        images = [
            sample(host, loaded, compose(host, loaded, batch)[0], latent)
            for batch, latent in zip(batches, latents, strict=True)
        ]
        sampled.append(torch.cat(images))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(*sampled, atol=1e-3 * sampled[0].std().item(), rtol=0)


def test_a_square_trajectory(host, subjects):
    (path,), (latent,), labels = host.run("BLIPDiffusionSubjectTrajectory", **named(subjects), steps=3)
    assert len(path) == 9
    assert labels.splitlines()[5] == "x 1.00, y 0.50"
    expected, _ = interpolate(host, subjects, x=1.0, y=0.5)
    torch.testing.assert_close(path.vectors[5:6], expected.vectors)
    assert "connect an Empty Latent Image" in latent.message  # stops only who uses it


def test_three_subjects_make_no_trajectory(host, subjects):
    with pytest.raises(ValueError, match="there are 3: connect two or four"):
        host.run("BLIPDiffusionSubjectTrajectory", **named(subjects[:3]))


def test_noise_and_mask_of_a_repeated_latent(host):
    repeat = host.module("nodes.host.latents").repeat_with_same_noise
    latent = {"samples": torch.rand(2, 4, 8, 8), "noise_mask": torch.rand(2, 1, 64, 64), "batch_index": [5, 6]}
    repeated = repeat(latent, 3)
    assert torch.equal(repeated["samples"], latent["samples"][:1].expand(3, -1, -1, -1))
    assert repeated["batch_index"] == [5, 5, 5]
    assert torch.equal(repeated["noise_mask"], latent["noise_mask"][:1])
    assert latent["samples"].shape[0] == 2


def grid(host, images: list[torch.Tensor], *sources: torch.Tensor, labels: str = "") -> torch.Tensor:
    """Subject Grid as the host calls a node that takes lists: with all batches at once."""
    node = host.nodes["BLIPDiffusionSubjectGrid"]
    named_sources = {f"source_{number}": [source] for number, source in enumerate(sources, start=1)}
    return node.execute(images, [0], [labels], [8192], **named_sources).result[0]


def test_the_grid_lays_out_a_line_with_labels(host):
    images = torch.rand(3, 64, 64, 3)
    labels = "x 0\nx 0.5\nx 1\ndog\ncat"
    sheet = grid(host, [images[:2], images[2:]], torch.rand(1, 200, 90, 3), torch.rand(2, 33, 70, 4), labels=labels)
    assert sheet.shape == (1, 64 + 12 + 2, 5 * 65 + 1, 3)
    assert torch.equal(sheet[0, 1:65, 66:130], images[0])


def test_the_grid_takes_pictures_of_several_sizes_and_kinds(host):
    tall, wide = torch.rand(2, 64, 32, 3), torch.rand(1, 32, 48, 4)
    sheet = grid(host, [tall, wide], labels="")
    assert sheet.shape == (1, 2 * 65 + 1, 2 * 49 + 1, 3)  # a cell is as high and as wide as the largest
    assert torch.equal(sheet[0, 1:65, 9:41], tall[0])  # in the middle of its cell
    assert (sheet[0, 1:65, 1:9] == 1).all()
    on_white = wide[0, ..., :3] * wide[0, ..., 3:] + 1 - wide[0, ..., 3:]
    torch.testing.assert_close(sheet[0, 66 + 16 : 66 + 48, 1:49], on_white)


def test_the_grid_takes_a_single_picture(host):
    sheet = grid(host, [torch.rand(1, 7, 9, 3)])
    assert sheet.shape == (1, 9, 11, 3)


def test_views_are_weighted_and_the_odd_one_is_named(host, loaded):
    views = torch.rand(1, 50, 50, 3, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    views[1] = 0
    inputs = {"qformer": loaded.qformer, "image": views, "subject_word": "dog"}
    plain, report = host.run("BLIPDiffusionSubjectEncode", **inputs)
    assert report.startswith('"dog" from 4 pictures. Picture 2 is least like the others (similarity ')
    weighted, _ = host.run("BLIPDiffusionSubjectEncode", **inputs, view_weights="1, 0, 1, 1")
    without, _ = host.run("BLIPDiffusionSubjectEncode", **{**inputs, "image": views[[0, 2, 3]]})
    torch.testing.assert_close(weighted.vectors, without.vectors, atol=1e-5, rtol=0)
    assert not torch.allclose(weighted.vectors, plain.vectors, atol=1e-3)
    each, report = host.run("BLIPDiffusionSubjectEncode", **inputs, average_batch=False, view_weights="1, 2")
    assert (len(each), report) == (4, '4 x "dog", one for each picture.')
    with pytest.raises(ValueError, match=r"There are 2 weights \(1, 2\) for 4 subjects or views"):
        host.run("BLIPDiffusionSubjectEncode", **inputs, view_weights="1, 2")
