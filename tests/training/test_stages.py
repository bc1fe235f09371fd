"""What each stage computes and what it trains."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from blip_qformer.diffusion.noise_schedule import ALPHAS_CUMPROD
from blip_qformer.encoder import tokenize_subjects
from blip_qformer.encoder.qformer import padding_mask
from blip_qformer.encoder.tokenizer import bert_tokenizer
from blip_qformer.pipeline import SCHEDULER_CONFIG
from blip_qformer.pipeline import sample as sampling
from blip_qformer.pipeline.sample import NEGATIVE_PROMPT
from blip_qformer.training.losses import matching_mask
from blip_qformer.training.stages import find_stage, subject
from blip_qformer.training.stages.base import make_generators
from blip_qformer.training.stages.multimodal import run_qformer
from blip_qformer.training.stages.subject import (
    add_multires_noise,
    loss_weights,
    sample_timesteps,
    timestep_weights,
)
from tests import tiny

NUMBERS = range(6)

#: Each stage's networks that train, and of those what its loss does not hang on.
TRAINED = {
    "autoencoder": (("vae.",), ()),
    "vision": (("encoder.vision.",), ()),
    "multimodal": (("encoder.qformer.",), ()),
    "appearance": (
        ("encoder.qformer.", "encoder.projection."),
        ("encoder.qformer.layers.1.text_feed_forward.",),
    ),
    # The vectors are the queries' answer, so that nobody reads what the last layer makes of the text.
    "subject": (
        ("encoder.qformer.", "encoder.projection.", "text_encoder.", "unet."),
        ("encoder.qformer.layers.1.text_feed_forward.",),
    ),
}


@pytest.mark.parametrize("name", tiny.STAGES)
def test_exactly_what_should_train_has_changed_after_one_step(name):
    """Without weight decay, which changes all that trains; the heads that a stage adds train with it."""
    stage = tiny.make_stage(name)
    batch = tiny.make_batch(name, NUMBERS)
    before = {key: weight.clone() for key, weight in stage.state_dict().items()}
    optimizer = torch.optim.AdamW(stage.trainable_parameters(), lr=1e-3, weight_decay=0.0)
    stage(batch)["loss"].backward()
    optimizer.step()
    after = stage.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    prefixes, untouched = TRAINED[name]
    expected = {
        key
        for key in before
        if (not key.startswith("networks.") or key.removeprefix("networks.").startswith(prefixes))
        and not key.removeprefix("networks.").startswith(untouched or ("none",))
    }
    assert changed == expected
    untrained = {"encoder.vision": "vision", "vae": "autoencoder"}
    for network, trainer in untrained.items():
        assert any(key.startswith(f"networks.{network}.") for key in changed) == (name == trainer)


@pytest.mark.parametrize("name", tiny.STAGES)
def test_a_loss_is_a_function_of_the_batch_alone(name):
    """Whatever is random comes from the pairs' seeds."""
    stage, batch = tiny.make_stage(name), tiny.make_batch(name, NUMBERS)
    torch.manual_seed(1)
    first = stage(batch)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert {key: value.item() for key, value in stage(batch).items()} == {
        key: value.item() for key, value in first.items()
    }


@pytest.mark.parametrize("name", tiny.STAGES)
def test_half_precision_stays_near(name):
    """As accelerate runs a stage in bf16: masks, norms and losses must bear it."""
    stage, batch = tiny.make_stage(name), tiny.make_batch(name, NUMBERS)
    expected = stage(batch)
    expected["loss"].backward()
    trained = [parameter.grad is not None for parameter in stage.trainable_parameters()]
    stage.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = stage(batch)
    found["loss"].backward()
    assert [parameter.grad is not None for parameter in stage.trainable_parameters()] == trained
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.03)
    assert found["loss"].item() != expected["loss"].item()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in stage.trainable_parameters())


def test_the_encoder_of_training_is_the_encoder():
    stage, batch = tiny.make_stage("subject"), tiny.make_batch("subject", NUMBERS)
    words = [tiny.make_pair(number).word for number in NUMBERS]
    expected = stage.pipeline.encoder(batch["pixel_values"], words)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        stage._encode_subjects(batch["pixel_values"], batch["words"]), expected, atol=1e-6, rtol=0
    )


def test_the_projections_dropout_is_each_pairs_own():
    batch = tiny.make_batch("subject", NUMBERS)
    stage = tiny.make_stage("subject", options={"dropout": {"projection": 0.5}})
    whole = stage._encode_subjects(batch["pixel_values"], batch["words"], make_generators(batch["seeds"]))
    plain = stage._encode_subjects(batch["pixel_values"], batch["words"])
    encoder = stage.pipeline.encoder
    image_tokens = encoder.vision(batch["pixel_values"])
    answer = encoder.qformer(image_tokens, *tokenize_subjects(batch["words"]))
    share = ((whole - answer) / (plain - answer)).flatten()  # of what the projection adds
    dropped, doubled = (torch.isclose(share, torch.tensor(value), atol=1e-2) for value in (0.0, 2.0))
    assert (dropped | doubled).float().mean() > 0.99
    assert dropped.float().mean() == pytest.approx(0.5, abs=0.05)
    half = {key: value[3:] for key, value in batch.items()}
    torch.testing.assert_close(
        stage._encode_subjects(half["pixel_values"], half["words"], make_generators(half["seeds"])), whole[3:]
    )


def test_without_padding_the_three_masks_meet_in_the_qformers_own():
    """The Q-Former under the matching mask is the one that encodes subjects."""
    stage = tiny.make_stage("multimodal")
    encoder = stage.pipeline.encoder
    ids, mask = tokenize_subjects(["dog", "teddy bear"])
    image_tokens = encoder.vision(torch.randn(2, 3, 28, 28))
    queries, text = run_qformer(encoder.qformer, image_tokens, ids, mask, matching_mask)
    torch.testing.assert_close(queries, encoder.qformer(image_tokens, ids, mask))
    assert text.shape == (2, ids.shape[1], 32)
    added = padding_mask(mask, 16, torch.float32)
    assert torch.equal(added[:, 0] == 0, matching_mask(mask, 16))


def test_stage_1_against_a_loop():
    """Every loss with the Q-Former run for one image and one text at a time, under masks written out here."""
    stage = tiny.make_stage("multimodal", options={**tiny.OPTIONS["multimodal"], "smoothing": 0.0})
    batch = tiny.make_batch("multimodal", NUMBERS)
    found = stage(batch)
    encoder, count = stage.pipeline.encoder, len(NUMBERS)
    image_tokens = encoder.vision(batch["pixel_values"]).detach()
    ids, attention = batch["input_ids"], batch["attention_mask"]
    tokens = ids.shape[1]

    def answer(image: int, text: torch.Tensor, padding: torch.Tensor, attends) -> tuple[torch.Tensor, torch.Tensor]:
        """``attends(row, column)`` among 16 queries and the text."""
        qformer = encoder.qformer
        mask = torch.full((1, 1, 16 + tokens, 16 + tokens), -1e9)
        for row in range(16 + tokens):
            for column in range(16 + tokens):
                if attends(row, column) and (column < 16 or padding[column - 16]):
                    mask[0, 0, row, column] = 0
        embedded = torch.cat([qformer.query_tokens, qformer.embed_text(text[None], torch.float32)], dim=1)
        queries, words = qformer.embedding_norm(embedded).split([16, tokens], dim=1)
        for layer in qformer.layers:
            queries, words = layer(queries, words, image_tokens[image][None], mask)
        return queries[0], words[0]

    def apart(row: int, column: int) -> bool:
        return (row < 16) == (column < 16)

    def causal(row: int, column: int) -> bool:
        return column < 16 or (row >= 16 and column <= row)

    images, texts = [], []
    for index in range(count):
        queries, words = answer(index, ids[index], attention[index], apart)
        images.append(F.normalize(stage.image_head(queries), dim=-1))
        texts.append(F.normalize(stage.text_head(words[0]), dim=0))
    similarity = torch.stack([torch.stack([(image @ text).max() for text in texts]) for image in images]).detach()
    scores = similarity / 0.07
    contrast = torch.stack([-scores.log_softmax(dim).diagonal().mean() for dim in (0, 1)]).mean()
    assert found["contrast"].item() == pytest.approx(contrast.item(), rel=1e-4)
    assert found["retrieval"].item() == sum(similarity[i].argmax() == i for i in range(count)) / count

    losses, predicted = [], 0
    for index in range(count):
        begun = ids[index].clone()
        begun[0] = bert_tokenizer().token_to_id("[DEC]")
        _, words = answer(index, begun, attention[index], causal)
        logits = stage.word_head(words, encoder.qformer.word_embedding.weight).log_softmax(dim=-1)
        for position in range(tokens - 1):
            if attention[index, position + 1]:
                losses.append(-logits[position, ids[index, position + 1]])
                predicted += 1
    assert predicted == attention[:, 1:].sum()
    assert found["generation"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)

    generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
    wrong = []
    for direction in (similarity, similarity.T):
        weights = (direction / 0.07).softmax(dim=1) + 1e-4
        weights.fill_diagonal_(0)
        wrong.append([int(torch.multinomial(row, 1, generator=g)) for row, g in zip(weights, generators, strict=True)])
    losses = []
    for index in range(count):
        trials = [(index, index, 1), (index, wrong[0][index], 0), (wrong[1][index], index, 0)]
        for image, text, label in trials:
            queries, _ = answer(image, ids[text], attention[text], lambda row, column: True)
            losses.append(-stage.matching_head(queries).mean(dim=0).log_softmax(dim=0)[label])
    assert found["matching"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    total = sum(found[name].item() for name in ("contrast", "matching", "generation"))
    assert found["loss"].item() == pytest.approx(total)


def test_a_temperature_at_zero_comes_back():
    stage = tiny.make_stage("multimodal")
    with torch.no_grad():
        stage.temperature.fill_(-0.01)
    assert torch.isfinite(stage(tiny.make_batch("multimodal", NUMBERS))["loss"])
    assert stage.temperature.item() == pytest.approx(0.001)


def test_stage_2_against_a_loop():
    """One pair after the other, its random numbers sampled again from its seed in the documented order."""
    options = {
        "data": {"resolution": 32, "max_repetitions": 3},
        "dropout": {"subject": 0.4, "caption": 0.3, "projection": 0.0},
    }
    stage = tiny.make_stage("subject", options=options)
    batch = tiny.make_batch("subject", range(12))
    found = stage(batch)
    pipeline, alphas = stage.pipeline, ALPHAS_CUMPROD
    losses, kinds = [], set()
    for index in range(12):
        generator = torch.Generator().manual_seed(batch["seeds"][index])
        distribution = pipeline.vae.encode(batch["targets"][index : index + 1] * 2 - 1).latent_dist
        latents = distribution.mean + distribution.std * torch.randn(1, 4, 4, 4, generator=generator)
        latents = latents * pipeline.vae.config.scaling_factor
        drop_subject, drop_caption, repeat, which = torch.rand(4, generator=generator).tolist()
        pair = tiny.make_pair(index)
        if drop_caption < 0.3:
            text, vectors = (NEGATIVE_PROMPT if which < 0.5 else ""), None
        else:
            text = ", ".join([pair.caption] * (1 + int(repeat * 3)))
            vectors = (
                None if drop_subject < 0.4 else pipeline.encoder(batch["pixel_values"][index][None], [pair.word])[0]
            )
        kinds.add((text == "", text == NEGATIVE_PROMPT, vectors is None, text.count(pair.caption)))
        context = sampling.encode_prompts(pipeline.text_encoder, sampling.tokenize_prompts(pipeline, [text]), [vectors])
        noise = torch.randn(1, 4, 4, 4, generator=generator)
        step = (1000 * torch.rand(1, generator=generator)).long()
        noisy = alphas[step].sqrt() * latents + (1 - alphas[step]).sqrt() * noise
        losses.append(F.mse_loss(pipeline.unet(noisy, step, context).sample, noise))
    assert len(kinds) >= 5  # with and without a subject, once and twice, and without a caption
    assert found["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_timesteps_count_by_their_noise():
    stage = tiny.make_stage("subject", options={"diffusion": {"min_snr_gamma": 5.0}})
    timesteps = torch.tensor([0, 100, 400, 999])
    ratios = [a / (1 - a) for a in ALPHAS_CUMPROD[timesteps].tolist()]
    expected = [min(ratio, 5.0) / ratio for ratio in ratios]
    assert expected[0] < 0.1
    assert stage.timestep_weights[timesteps].tolist() == pytest.approx(expected)
    assert tiny.make_stage("subject").timestep_weights.tolist() == [1.0] * 1000


def test_coarse_weights_make_errors_of_the_noise_those_of_v():
    """v = alpha noise - sigma image, so that at one noisy latent an error of the noise is alpha times one of v."""
    stage = tiny.make_stage("subject", options={"diffusion": {"max_velocity_weight": 1e9}})
    scheduler, steps = DDPMScheduler.from_config(SCHEDULER_CONFIG), torch.tensor([0, 300, 700, 999])
    noise, error = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))  # one row for each step
    alpha, sigma = (
        scheduler.alphas_cumprod[steps].sqrt()[:, None],
        (1 - scheduler.alphas_cumprod[steps]).sqrt()[:, None],
    )
    noisy = scheduler.add_noise(torch.ones(4, 8), noise, steps)

    def velocity(noise):
        return scheduler.get_velocity((noisy - sigma * noise) / alpha, noise, steps)

    errors_of_v = (velocity(noise + error) - velocity(noise)).square().mean(dim=1)
    ratios = errors_of_v / error.square().mean(dim=1) / stage.timestep_weights[steps]
    assert torch.allclose(ratios, ratios[:1].expand(4), rtol=1e-3)
    limited = tiny.make_stage("subject", options={"diffusion": {"max_velocity_weight": 10.0}}).timestep_weights
    assert (limited.max() / limited.min()).item() == pytest.approx(10, rel=0.01)


def test_timesteps_count_half_by_how_often_they_are_sampled_and_half_in_the_loss():
    weights = torch.tensor([1.0, 0.0, 9.0, 4.0])
    sampled = sample_timesteps(weights, make_generators(range(4000)))
    shares = torch.bincount(sampled, minlength=4) / len(sampled)
    assert shares[1] == 0
    assert torch.allclose(shares, torch.tensor([1.0, 0.0, 3.0, 2.0]) / 6, atol=0.02)
    counted = shares * loss_weights(weights)
    assert torch.allclose(counted, weights / 14, atol=0.03)
    assert sample_timesteps(weights, make_generators([17])) == sampled[17]  # each from its own generator
    assert loss_weights(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_the_loss_counts_each_pair_by_its_timestep(monkeypatch):
    stage = tiny.make_stage(
        "subject", options={"data": {"resolution": 32}, "diffusion": {"max_velocity_weight": 250.0}}
    )
    counts, errors = loss_weights(stage.timestep_weights), []
    stage.timestep_weights = torch.ones(1000)
    for number, timestep in enumerate((40, 990, 500)):
        monkeypatch.setattr(subject, "sample_timesteps", lambda *_, timestep=timestep: torch.tensor([timestep]))
        errors.append(counts[timestep] * stage(tiny.make_batch("subject", [number]))["loss"])
    stage.timestep_weights = timestep_weights(ALPHAS_CUMPROD, min_snr_gamma=0.0, max_velocity_weight=250.0)
    monkeypatch.setattr(subject, "sample_timesteps", lambda *_: torch.tensor([40, 990, 500]))
    whole = stage(tiny.make_batch("subject", range(3)))["loss"]
    assert whole.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_coarse_noise_is_on_top_of_the_fine_one():
    noise = torch.randn(8, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    noisier = add_multires_noise(noise, 0.7, make_generators(range(8)))

    def deviation_of_means(latents, grain):
        return F.avg_pool2d(latents, grain).std().item()

    def deviation_of_steps(latents):
        return latents.diff(dim=3).std().item()

    assert deviation_of_means(noisier, 8) > 3 * deviation_of_means(noise, 8) > 0
    assert deviation_of_means(noisier, 32) > 4 * deviation_of_means(noise, 32)
    assert deviation_of_steps(noisier) == pytest.approx(deviation_of_steps(noise), rel=0.1)
    alone = add_multires_noise(noise[5:6], 0.7, make_generators([5]))  # each row from its own generator
    assert torch.equal(alone, noisier[5:6])


def test_coarse_noise_is_what_is_to_be_predicted(monkeypatch):
    """A U-Net that answers with the very noise that was added makes no error."""
    stage = tiny.make_stage("subject", options={"data": {"resolution": 32}, "diffusion": {"multires_noise": 0.5}})
    latents = {}
    monkeypatch.setattr(subject, "add_noise", lambda clean, noise, timesteps: latents.setdefault("noise", noise))
    stage.pipeline.unet.forward = lambda noisy, *_: SimpleNamespace(sample=noisy)
    assert stage(tiny.make_batch("subject", NUMBERS))["loss"].item() == 0
    plain = tiny.make_stage("subject", options={"data": {"resolution": 32}})
    monkeypatch.setattr(subject, "add_noise", lambda clean, noise, timesteps: latents.setdefault("plain", noise))
    plain.pipeline.unet.forward = lambda noisy, *_: SimpleNamespace(sample=noisy)
    plain(tiny.make_batch("subject", NUMBERS))
    assert latents["noise"].mean(dim=(2, 3)).std() > 1.5 * latents["plain"].mean(dim=(2, 3)).std()


def test_latents_that_are_kept_change_nothing(tmp_path):
    batch = tiny.make_batch("subject", NUMBERS)
    kept = {"output": tmp_path, "options": {"data": {"resolution": 32, "cache_latents": True}}}
    stage = tiny.make_stage("subject", **kept)
    first, again = stage(batch)["loss"], stage(batch)["loss"]
    assert first.item() == again.item()
    # Kept ones were encoded one by one, whose last bits are not a batch's.
    assert first.item() == pytest.approx(tiny.make_stage("subject")(batch)["loss"].item(), rel=1e-6)
    restarted = tiny.make_stage("subject", **kept)
    restarted.pipeline.vae.encode = None  # is not asked again
    assert restarted(batch)["loss"].item() == first.item()


def test_latents_are_those_of_the_image_whatever_its_key(tmp_path):
    """Pairs that were made anew, or that come from two folders, have the keys of other images."""
    stage = tiny.make_stage("subject", output=tmp_path, options={"data": {"resolution": 32, "cache_latents": True}})
    stage(tiny.make_batch("subject", NUMBERS))
    other = tiny.make_batch("subject", [number + 100 for number in NUMBERS])
    other["keys"] = tiny.make_batch("subject", NUMBERS)["keys"]
    assert stage(other)["loss"].item() == pytest.approx(tiny.make_stage("subject")(other)["loss"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "subject",
            {"colour": 1},
            "The run sets options.colour, which the stage subject does not have: choose from data",
        ),
        (
            "subject",
            {"dropout": {"subjects": 1}},
            r"sets options.dropout.subjects \(did you mean subject\?\), which .*: choose from subject, projection, cap",
        ),
        ("subject", {"dropout": 0.1}, "sets options.dropout to 0.1, where a mapping is needed"),
        (
            "subject",
            {"dropout": {"word": 1.5}},
            "sets options.dropout.word to 1.5, where a number from 0 to 1 is needed",
        ),
        (
            "subject",
            {"data": {"resolution": 500}},
            "data.resolution to 500, where a number of pixels .* a multiple of 8",
        ),
        (
            "subject",
            {"data": {"resolution": "large"}},
            "data.resolution to 'large', where a number of pixels .* is needed",
        ),
        ("subject", {"data": {"resolution": 0}}, "data.resolution to 0, where a number of pixels .* is needed"),
        (
            "subject",
            {"dropout": {"projection": 1}},
            "dropout.projection to 1, where a number, 0 or more and less than 1,",
        ),
        (
            "autoencoder",
            {"crop": 0},
            "sets options.crop to 0, where a number of pixels that the VAE can halve three times",
        ),
        ("multimodal", {"caption_tokens": 33}, "caption_tokens is 33, but this Q-Former reads 3 to 32"),
    ],
)
def test_options_that_do_not_fit_get_one_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.make_stage(name, options=options)


def test_a_stage_that_is_not_there():
    with pytest.raises(ValueError, match='no stage "dream": choose one of multimodal, subject.'):
        find_stage("dream")
