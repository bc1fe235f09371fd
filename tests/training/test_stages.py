"""What each stage computes and what it trains."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blip_qformer.encoder import tokenize_subjects
from blip_qformer.encoder.qformer import padding_mask
from blip_qformer.encoder.tokenizer import bert_tokenizer
from blip_qformer.pipeline import sample as sampling
from blip_qformer.pipeline.sample import NEGATIVE_PROMPT
from blip_qformer.training.losses import matching_mask
from blip_qformer.training.stages import STAGES, stage_class, subject
from blip_qformer.training.stages.base import generators
from blip_qformer.training.stages.multimodal import read
from blip_qformer.training.stages.subject import add_multires_noise, draw_timesteps, drawn_weights, timestep_weights
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


@pytest.mark.parametrize("name", STAGES)
def test_exactly_what_should_train_has_changed_after_one_step(name):
    """Without weight decay, which changes all that trains; the heads that a stage adds train with it."""
    stage = tiny.make_stage(name)
    batch = tiny.make_batch(name, NUMBERS)
    before = {key: weight.clone() for key, weight in stage.state_dict().items()}
    optimizer = torch.optim.AdamW(stage.trained(), lr=1e-3, weight_decay=0.0)
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


@pytest.mark.parametrize("name", STAGES)
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


@pytest.mark.parametrize("name", STAGES)
def test_half_precision_stays_near(name):
    """As accelerate runs a stage in bf16: masks, norms and losses must bear it."""
    stage, batch = tiny.make_stage(name), tiny.make_batch(name, NUMBERS)
    expected = stage(batch)
    expected["loss"].backward()
    trained = [parameter.grad is not None for parameter in stage.trained()]
    stage.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = stage(batch)
    found["loss"].backward()
    assert [parameter.grad is not None for parameter in stage.trained()] == trained
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.03)
    assert found["loss"].item() != expected["loss"].item()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in stage.trained())


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
    stage = tiny.make_stage("subject", options={"projection_dropout": 0.5})
    whole = stage._encode_subjects(batch["pixel_values"], batch["words"], generators(batch["seeds"]))
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
        stage._encode_subjects(half["pixel_values"], half["words"], generators(half["seeds"])), whole[3:]
    )


def test_without_padding_the_three_masks_meet_in_the_qformers_own():
    """The Q-Former under the matching mask is the one that encodes subjects."""
    stage = tiny.make_stage("multimodal")
    encoder = stage.pipeline.encoder
    ids, mask = tokenize_subjects(["dog", "teddy bear"])
    image_tokens = encoder.vision(torch.randn(2, 3, 28, 28))
    queries, text = read(encoder.qformer, image_tokens, ids, mask, matching_mask)
    torch.testing.assert_close(queries, encoder.qformer(image_tokens, ids, mask))
    assert text.shape == (2, ids.shape[1], 32)
    added = padding_mask(mask, 16, torch.float32)
    assert torch.equal(added[:, 0] == 0, matching_mask(mask, 16))


def test_stage_1_against_a_loop():
    """Every loss with the Q-Former run for one picture and one text at a time, under masks written out here."""
    stage = tiny.make_stage("multimodal", options={**tiny.OPTIONS["multimodal"], "smoothing": 0.0})
    batch = tiny.make_batch("multimodal", NUMBERS)
    found = stage(batch)
    encoder, count = stage.pipeline.encoder, len(NUMBERS)
    image_tokens = encoder.vision(batch["pixel_values"]).detach()
    ids, attention = batch["input_ids"], batch["attention_mask"]
    tokens = ids.shape[1]

    def answer(picture: int, text: torch.Tensor, padding: torch.Tensor, sees) -> tuple[torch.Tensor, torch.Tensor]:
        """``sees(row, column)`` among 16 queries and the text."""
        qformer = encoder.qformer
        mask = torch.full((1, 1, 16 + tokens, 16 + tokens), -1e9)
        for row in range(16 + tokens):
            for column in range(16 + tokens):
                if sees(row, column) and (column < 16 or padding[column - 16]):
                    mask[0, 0, row, column] = 0
        embedded = torch.cat([qformer.query_tokens, qformer.embed_text(text[None], torch.float32)], dim=1)
        queries, words = qformer.embedding_norm(embedded).split([16, tokens], dim=1)
        for layer in qformer.layers:
            queries, words = layer(queries, words, image_tokens[picture][None], mask)
        return queries[0], words[0]

    def apart(row: int, column: int) -> bool:
        return (row < 16) == (column < 16)

    def causal(row: int, column: int) -> bool:
        return column < 16 or (row >= 16 and column <= row)

    pictures, texts = [], []
    for index in range(count):
        queries, words = answer(index, ids[index], attention[index], apart)
        pictures.append(F.normalize(stage.image_head(queries), dim=-1))
        texts.append(F.normalize(stage.text_head(words[0]), dim=0))
    similarity = torch.stack([torch.stack([(picture @ text).max() for text in texts]) for picture in pictures]).detach()
    scores = similarity / 0.07
    contrast = torch.stack([-scores.log_softmax(dim).diagonal().mean() for dim in (0, 1)]).mean()
    assert found["contrast"].item() == pytest.approx(contrast.item(), rel=1e-4)
    assert found["retrieval"].item() == sum(similarity[i].argmax() == i for i in range(count)) / count

    losses, words_seen = [], 0
    for index in range(count):
        begun = ids[index].clone()
        begun[0] = bert_tokenizer().token_to_id("[DEC]")
        _, words = answer(index, begun, attention[index], causal)
        logits = stage.word_head(words, encoder.qformer.word_embedding.weight).log_softmax(dim=-1)
        for place in range(tokens - 1):
            if attention[index, place + 1]:
                losses.append(-logits[place, ids[index, place + 1]])
                words_seen += 1
    assert words_seen == attention[:, 1:].sum()
    assert found["generation"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)

    sources = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
    wrong = []
    for direction in (similarity, similarity.T):
        weights = (direction / 0.07).softmax(dim=1) + 1e-4
        weights.fill_diagonal_(0)
        wrong.append([int(torch.multinomial(row, 1, generator=s)) for row, s in zip(weights, sources, strict=True)])
    losses = []
    for index in range(count):
        trials = [(index, index, 1), (index, wrong[0][index], 0), (wrong[1][index], index, 0)]
        for picture, text, label in trials:
            queries, _ = answer(picture, ids[text], attention[text], lambda row, column: True)
            losses.append(-stage.matching_head(queries).mean(dim=0).log_softmax(dim=0)[label])
    assert found["matching"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    pipeline = sum(found[name].item() for name in ("contrast", "matching", "generation"))
    assert found["loss"].item() == pytest.approx(pipeline)


def test_a_temperature_at_zero_comes_back():
    stage = tiny.make_stage("multimodal")
    with torch.no_grad():
        stage.temperature.fill_(-0.01)
    assert torch.isfinite(stage(tiny.make_batch("multimodal", NUMBERS))["loss"])
    assert stage.temperature.item() == pytest.approx(0.001)


def test_stage_2_against_a_loop():
    """One pair after the other, its chance drawn again from its seed in the documented order."""
    options = {"subject_dropout": 0.4, "caption_dropout": 0.3, "repetitions": 3, "projection_dropout": 0.0}
    stage = tiny.make_stage("subject", options={"resolution": 32, **options})
    batch = tiny.make_batch("subject", range(12))
    found = stage(batch)
    pipeline, alphas = stage.pipeline, stage.scheduler.alphas_cumprod
    losses, kinds = [], set()
    for index in range(12):
        source = torch.Generator().manual_seed(batch["seeds"][index])
        distribution = pipeline.vae.encode(batch["targets"][index : index + 1] * 2 - 1).latent_dist
        latents = distribution.mean + distribution.std * torch.randn(1, 4, 4, 4, generator=source)
        latents = latents * pipeline.vae.config.scaling_factor
        drop_subject, drop_caption, repeat, which = torch.rand(4, generator=source).tolist()
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
        noise = torch.randn(1, 4, 4, 4, generator=source)
        step = (1000 * torch.rand(1, generator=source)).long()
        noisy = alphas[step].sqrt() * latents + (1 - alphas[step]).sqrt() * noise
        losses.append(F.mse_loss(pipeline.unet(noisy, step, context).sample, noise))
    assert len(kinds) >= 5  # with and without a subject, once and twice, and without a caption
    assert found["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_timesteps_count_by_their_noise():
    stage = tiny.make_stage("subject", options={"min_snr_gamma": 5.0})
    timesteps = torch.tensor([0, 100, 400, 999])
    ratios = [a / (1 - a) for a in stage.scheduler.alphas_cumprod[timesteps].tolist()]
    expected = [min(ratio, 5.0) / ratio for ratio in ratios]
    assert expected[0] < 0.1
    assert stage.weights[timesteps].tolist() == pytest.approx(expected)
    assert tiny.make_stage("subject").weights.tolist() == [1.0] * 1000


def test_coarse_weights_make_errors_of_the_noise_those_of_v():
    """v = alpha noise - sigma picture, so that at one noisy latent an error of the noise is alpha times one of v."""
    stage = tiny.make_stage("subject", options={"coarse_weight": 1e9})
    scheduler, steps = stage.scheduler, torch.tensor([0, 300, 700, 999])
    noise, error = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))  # one row for each step
    alpha, sigma = (
        scheduler.alphas_cumprod[steps].sqrt()[:, None],
        (1 - scheduler.alphas_cumprod[steps]).sqrt()[:, None],
    )
    noisy = scheduler.add_noise(torch.ones(4, 8), noise, steps)

    def velocity(noise):
        return scheduler.get_velocity((noisy - sigma * noise) / alpha, noise, steps)

    errors_of_v = (velocity(noise + error) - velocity(noise)).square().mean(dim=1)
    ratios = errors_of_v / error.square().mean(dim=1) / stage.weights[steps]
    assert torch.allclose(ratios, ratios[:1].expand(4), rtol=1e-3)
    limited = tiny.make_stage("subject", options={"coarse_weight": 10.0}).weights
    assert (limited.max() / limited.min()).item() == pytest.approx(10, rel=0.01)


def test_timesteps_count_half_by_how_often_they_are_drawn_and_half_in_the_loss():
    weights = torch.tensor([1.0, 0.0, 9.0, 4.0])
    drawn = draw_timesteps(weights, generators(range(4000)))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares[1] == 0
    assert torch.allclose(shares, torch.tensor([1.0, 0.0, 3.0, 2.0]) / 6, atol=0.02)
    counted = shares * drawn_weights(weights)
    assert torch.allclose(counted, weights / 14, atol=0.03)
    assert draw_timesteps(weights, generators([17])) == drawn[17]  # each from its own source
    assert drawn_weights(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_the_loss_counts_each_pair_by_its_timestep(monkeypatch):
    stage = tiny.make_stage("subject", options={"resolution": 32, "coarse_weight": 250.0})
    counts, errors = drawn_weights(stage.weights), []
    stage.weights = torch.ones(1000)
    for number, timestep in enumerate((40, 990, 500)):
        monkeypatch.setattr(subject, "draw_timesteps", lambda *_, timestep=timestep: torch.tensor([timestep]))
        errors.append(counts[timestep] * stage(tiny.make_batch("subject", [number]))["loss"])
    stage.weights = timestep_weights(stage.scheduler.alphas_cumprod, min_snr_gamma=0.0, coarse_weight=250.0)
    monkeypatch.setattr(subject, "draw_timesteps", lambda *_: torch.tensor([40, 990, 500]))
    whole = stage(tiny.make_batch("subject", range(3)))["loss"]
    assert whole.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_location_is_the_cross_entropy_of_row_and_column():
    stage = tiny.make_stage("vision")
    patches = stage.patches
    tokens = torch.randn(3, patches**2, stage.location_head.in_features)
    read = stage.location_head(tokens)  # of rows first, then of columns
    losses = [
        F.cross_entropy(read[picture, patch, axis * patches : (axis + 1) * patches], torch.tensor(place))
        for picture in range(3)
        for patch in range(patches**2)
        for axis, place in enumerate(divmod(patch, patches))
    ]
    assert stage._location_loss(tokens).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_coarse_noise_is_on_top_of_the_fine_one():
    noise = torch.randn(8, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    noisier = add_multires_noise(noise, 0.7, generators(range(8)))

    def deviation_of_means(latents, grain):
        return F.avg_pool2d(latents, grain).std().item()

    def deviation_of_steps(latents):
        return latents.diff(dim=3).std().item()

    assert deviation_of_means(noisier, 8) > 3 * deviation_of_means(noise, 8) > 0
    assert deviation_of_means(noisier, 32) > 4 * deviation_of_means(noise, 32)
    assert deviation_of_steps(noisier) == pytest.approx(deviation_of_steps(noise), rel=0.1)
    alone = add_multires_noise(noise[5:6], 0.7, generators([5]))  # each row from its own source
    assert torch.equal(alone, noisier[5:6])


def test_coarse_noise_is_what_is_to_be_predicted():
    """A U-Net that answers with the very noise that was added makes no error."""
    stage = tiny.make_stage("subject", options={"resolution": 32, "multires_noise": 0.5})
    latents = {}
    stage.scheduler.add_noise = lambda clean, noise, timesteps: latents.setdefault("noise", noise)
    stage.pipeline.unet.forward = lambda noisy, *_: SimpleNamespace(sample=noisy)
    assert stage(tiny.make_batch("subject", NUMBERS))["loss"].item() == 0
    plain = tiny.make_stage("subject", options={"resolution": 32})
    plain.scheduler.add_noise = lambda clean, noise, timesteps: latents.setdefault("plain", noise)
    plain.pipeline.unet.forward = lambda noisy, *_: SimpleNamespace(sample=noisy)
    plain(tiny.make_batch("subject", NUMBERS))
    assert latents["noise"].mean(dim=(2, 3)).std() > 1.5 * latents["plain"].mean(dim=(2, 3)).std()


def test_latents_that_are_kept_change_nothing(tmp_path):
    batch = tiny.make_batch("subject", NUMBERS)
    kept = {"output": tmp_path, "options": {"resolution": 32, "cache_latents": True}}
    stage = tiny.make_stage("subject", **kept)
    first, again = stage(batch)["loss"], stage(batch)["loss"]
    assert first.item() == again.item()
    # Kept ones were encoded one by one, whose last bits are not a batch's.
    assert first.item() == pytest.approx(tiny.make_stage("subject")(batch)["loss"].item(), rel=1e-6)
    restarted = tiny.make_stage("subject", **kept)
    restarted.pipeline.vae.encode = None  # is not asked again
    assert restarted(batch)["loss"].item() == first.item()


def test_latents_are_those_of_the_picture_whatever_its_key(tmp_path):
    """Pairs that were made anew, or that come from two sources, have the keys of other pictures."""
    stage = tiny.make_stage("subject", output=tmp_path, options={"resolution": 32, "cache_latents": True})
    stage(tiny.make_batch("subject", NUMBERS))
    other = tiny.make_batch("subject", [number + 100 for number in NUMBERS])
    other["keys"] = tiny.make_batch("subject", NUMBERS)["keys"]
    assert stage(other)["loss"].item() == pytest.approx(tiny.make_stage("subject")(other)["loss"].item(), rel=1e-6)


def test_the_vae_sees_crops_and_keeps_its_latents_at_one(monkeypatch):
    """Also of pictures that are smaller than a crop."""
    stage = tiny.make_stage("autoencoder", options={"crop": 48})
    batch = tiny.make_batch("autoencoder", NUMBERS, crop=48)
    assert {tuple(pixels.shape) for pixels in batch["pixels"]} == {(3, 48, 48)}
    stage = tiny.make_stage("autoencoder")
    batch = tiny.make_batch("autoencoder", NUMBERS)
    crops = stage._crops(batch, [torch.Generator().manual_seed(seed) for seed in batch["seeds"]])
    assert crops.shape == (6, 3, 16, 16)
    for crop, picture in zip(crops, batch["pixels"], strict=True):
        windows = picture.unfold(1, 16, 1).unfold(2, 16, 1)  # [3, 17, 17, 16, 16]
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()
    stage.finish(iter([batch, tiny.make_batch("autoencoder", range(6, 12))]))
    factor = stage.pipeline.vae.config.scaling_factor
    latents = stage.pipeline.vae.encode(crops * 2 - 1).latent_dist.mean * factor
    assert factor != 0.18215
    assert latents.std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("name", ["autoencoder", "appearance", "subject"])
def test_a_sheet_shows_how_far_it_has_come(name):
    stage = tiny.make_stage(name, options={**tiny.OPTIONS[name]})
    stage(tiny.make_batch(name, NUMBERS))
    with torch.no_grad():
        sheet = stage.eval().samples()
    assert (
        sheet.size
        == {
            "autoencoder": (4 * 16, 2 * 16),
            "appearance": (6 * 28, 3 * 28),
            "subject": (6 * 32, 3 * 32),
        }[name]
    )
    assert np.asarray(sheet).std() > 10


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("subject", {"colour": 1}, "sets the options colour, which the stage subject does not have: choose from resol"),
        ("subject", {"resolution": 500}, "resolution is 500, but the VAE reads multiples of 8"),
        ("subject", {"resolution": "large"}, "sets resolution to 'large', where a whole number, 0 or more, is needed"),
        ("subject", {"projection_dropout": 1}, "projection_dropout is 1.0, which leaves nothing"),
        ("autoencoder", {"crop": 0}, "crop is 0, but the VAE halves a picture three times"),
        ("multimodal", {"caption_tokens": 33}, "caption_tokens is 33, but this Q-Former reads 3 to 32"),
    ],
)
def test_options_that_do_not_fit_get_one_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.make_stage(name, options=options)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    options = stage_class("autoencoder").options(tiny.make_config("autoencoder", options={"divergence_weight": "1e-3"}))
    assert options == {"crop": 64, "edge_weight": 1.0, "divergence_weight": 0.001}


def test_a_stage_that_is_not_there():
    with pytest.raises(
        ValueError, match='no stage "dream": choose one of autoencoder, vision, multimodal, appearance, subject'
    ):
        stage_class("dream")
