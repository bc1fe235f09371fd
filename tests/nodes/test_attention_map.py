"""Record Attention and Subject Attention Map in the host, against attention written down step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.nodes.attention.graphs import in_windows
from tests.nodes.test_prompt import compose, stock

SIZE = (12, 20)  # of the latents; halved, it stays even


def record(host, conditioning, **inputs):
    return host.run("BLIPDiffusionAttentionRecord", conditioning=conditioning, **inputs)[:2]


def show(host, attention, image, **inputs):
    return host.run("BLIPDiffusionAttentionMap", attention=attention, image=image, **inputs)


def sample(host, model, positive, negative, rows=1, size=SIZE, **inputs) -> torch.Tensor:
    settings = {"seed": 3, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    latent = {"samples": torch.zeros(rows, 4, *size)}
    inputs = {**settings, "positive": positive, "negative": negative, "latent_image": latent, **inputs}
    return host.run("KSampler", model=model, **inputs)[0]["samples"]


class Explicit:
    """The model with every cross-attention written down, which keeps the positive rows' part of it."""

    def __init__(self, model) -> None:
        self.model, self.maps = model.clone(), []
        unet = model.model.diffusion_model
        for name, count in (("input", len(unet.input_blocks)), ("middle", 1), ("output", len(unet.output_blocks))):
            for number in range(count):
                self.model.set_model_attn2_replace(self.attend, name, number)

    def attend(self, query, key, values, extra_options):
        heads = extra_options["n_heads"]
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, values))
        scores = torch.einsum("bhpd,bhkd->bhpk", q, k) / q.shape[-1] ** 0.5
        attention = scores.exp() / scores.exp().sum(-1, keepdim=True)
        kinds = extra_options["cond_or_uncond"]
        for kind, chunk in zip(kinds, attention.mean(1).chunk(len(kinds)), strict=True):
            if kind == 0:
                self.maps.append(chunk.mT.unflatten(-1, extra_options["activations_shape"][-2:]))
        return torch.einsum("bhpk,bhkd->bhpd", attention, v).transpose(1, 2).flatten(2)

    def word_map(self, positions, tokens: int, size: tuple[int, int]) -> torch.Tensor:
        """The mean of all maps, enlarged to an image; what the host repeats is added up."""
        total = 0
        for maps in self.maps:
            repeated = [start + position for start in range(0, maps.shape[1], tokens) for position in positions]
            total = total + F.interpolate(maps[:, repeated], size=size, mode="bilinear").sum(1)
        return total / len(self.maps)


def positions_of(conditioning, word: str) -> list[int]:
    spans = conditioning[0][1]["blip_token_spans"]
    return [position for span in spans if span.word == word for position in span.positions]


@pytest.fixture
def positive(host, loaded, subject) -> list:
    """A subject, and a word that stands three times."""
    return compose(host, loaded, subject, prompt="wearing a red hat", repetitions=3)[0]


@pytest.fixture
def negative(host, loaded) -> list:
    return stock(host, loaded.clip, "ugly")


def with_controlnet(host, loaded, positive, negative):
    (control_net,) = host.run("BLIPDiffusionControlNetLoader", checkpoint="hub")
    hint = torch.rand(1, 8 * SIZE[0], 8 * SIZE[1], 3, generator=torch.manual_seed(1))
    inputs = {"control_net": control_net, "image": hint, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return host.run("ControlNetApplyAdvanced", positive=positive, negative=negative, **inputs)


def with_lora(host, loaded, positive, negative):
    """One group of hooks on both, as the stock nodes put it there."""
    import comfy.hooks

    weights = loaded.model.model.state_dict()
    changed = {name: weight * 0.5 for name, weight in weights.items() if ".attn2.to_" in name}
    hooks = comfy.hooks.create_hook_model_as_lora(changed, None, strength_model=1.0, strength_clip=1.0)
    inputs = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    return host.run("PairConditioningSetProperties", positive_NEW=positive, negative_NEW=negative, **inputs)


def with_reweight(host, loaded, positive, negative):
    """Words weighted on both sides; the attention of later layers changes with them."""
    positive, _ = host.run("BLIPDiffusionAttentionReweight", conditioning=positive, weights="<subject>:3, hat:-1")
    inputs = {"weights": "ugly:2", "clip": loaded.clip, "text": "ugly"}
    return positive, host.run("BLIPDiffusionAttentionReweight", conditioning=negative, **inputs)[0]


def with_long_negative(host, loaded, positive, negative):
    return positive, stock(host, loaded.clip, "ugly, " * 60)


def with_separate_calls(host, loaded, positive, negative):
    return with_lora(host, loaded, positive, negative)[0], negative


def unchanged(host, loaded, positive, negative):
    return positive, negative


GRAPHS = [unchanged, with_controlnet, with_lora, with_reweight, with_long_negative, with_separate_calls]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("position", ["in front", "behind"])
def test_the_image_stays_to_the_last_bit(host, loaded, positive, negative, graph, position):
    plain = sample(host, loaded.model, *graph(host, loaded, positive, negative))
    if position == "in front":
        watched = graph(host, loaded, record(host, positive)[0], negative)
    else:
        changed, other = graph(host, loaded, positive, negative)
        watched = record(host, changed)[0], other
    assert (sample(host, loaded.model, *watched) - plain).abs().max() == 0.0


@pytest.mark.parametrize("graph", GRAPHS)
def test_maps_are_those_of_the_attention_written_down(host, loaded, positive, negative, graph):
    explicit = Explicit(loaded.model)
    watched, attention = record(host, positive)
    sample(host, explicit.model, *graph(host, loaded, watched, negative))
    assert len({maps.shape[-2:] for maps in explicit.maps}) > 1  # layers of several sizes
    for word, tokens in {"<subject>": 16, "dog": 3, "hat": 3}.items():
        positions = positions_of(positive, word)
        assert len(positions) == tokens
        expected = explicit.word_map(positions, 77, (50, 70))
        torch.testing.assert_close(attention.word_map(word, 50, 70), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"cfg": 1.0}, {"sampler_name": "heun"}, {"sampler_name": "dpmpp_2m", "scheduler": "karras"}, {"denoise": 0.5}],
)
def test_with_other_samplers(host, loaded, positive, negative, settings):
    explicit = Explicit(loaded.model)
    watched, attention = record(host, positive)
    sample(host, explicit.model, watched, negative, **settings)
    expected = explicit.word_map(positions_of(positive, "hat"), 77, (12, 20))
    torch.testing.assert_close(attention.word_map("hat", 12, 20), expected, atol=1e-5, rtol=0)


def test_a_batch_and_a_prompt_of_several_blocks(host, loaded, subject, negative):
    positive, _ = compose(host, loaded, subject, prompt="word " * 80 + "end", overflow="continue")
    explicit = Explicit(loaded.model)
    watched, attention = record(host, positive)
    sample(host, explicit.model, watched, negative, rows=3)
    found = attention.word_map("end", 12, 20)
    torch.testing.assert_close(
        found, explicit.word_map(positions_of(positive, "end"), 154, (12, 20)), atol=1e-5, rtol=0
    )
    assert found.shape == (3, 12, 20)
    assert not torch.allclose(found[0], found[1])


def test_prompts_of_two_areas(host, loaded, positive, negative):
    """Each has its own record, and its maps lie where its area is."""
    left, left_attention = record(host, positive)
    right, right_attention = record(host, stock(host, loaded.clip, "a red hat"), clip=loaded.clip, text="a red hat")
    half = {"width": 8 * SIZE[1] // 2, "height": 8 * SIZE[0], "y": 0, "strength": 1.0}
    (left,) = host.run("ConditioningSetArea", conditioning=left, x=0, **half)
    (right,) = host.run("ConditioningSetArea", conditioning=right, x=8 * SIZE[1] // 2, **half)
    (both,) = host.run("ConditioningCombine", conditioning_1=left, conditioning_2=right)
    sample(host, loaded.model, both, negative)
    hats = [attention.word_map("hat", *SIZE) for attention in (left_attention, right_attention)]
    middle = SIZE[1] // 2
    assert (hats[0][..., :middle] > 0).all()
    assert (hats[0][..., middle:] == 0).all()
    assert (hats[1][..., :middle] == 0).all()
    assert (hats[1][..., middle:] > 0).all()

    (alone,) = host.run("ConditioningSetArea", conditioning=record(host, positive)[0], x=0, **half)
    explicit = Explicit(loaded.model)
    watched, attention = record(host, alone)
    sample(host, explicit.model, watched, negative)
    tokens = positions_of(positive, "hat")
    explicit.maps = [maps for maps in explicit.maps if maps.shape[-1] <= middle]
    expected = explicit.word_map(tokens, 77, (SIZE[0], middle))
    torch.testing.assert_close(attention.word_map("hat", *SIZE)[..., :middle], expected, atol=1e-5, rtol=0)


def test_an_area_ends_where_the_image_ends(host, loaded, positive, negative):
    """An area that reaches beyond the image is to the last bit the one that does not, as the host cuts it."""
    half = 8 * SIZE[1] // 2
    maps = []
    for width in (half, 2 * half):
        watched, attention = record(host, positive)
        area = {"width": width, "height": 8 * SIZE[0], "x": half, "y": 0, "strength": 1.0}
        sample(host, loaded.model, host.run("ConditioningSetArea", conditioning=watched, **area)[0], negative)
        maps.append(attention.word_map("hat", *SIZE))
    assert maps[0].any()
    assert torch.equal(*maps)


def in_tiles(count: int, together: bool):
    """A wrapper that calls the model for tiles side by side: one call for each, or one for all, as other packs do."""

    def call(function, arguments):
        tiles, context = arguments["input"].chunk(count, dim=-1), arguments["c"]["c_crossattn"]
        if not together:
            return torch.cat([function(tile, arguments["timestep"], **arguments["c"]) for tile in tiles], dim=-1)
        c = {**arguments["c"], "c_crossattn": context.repeat(count, 1, 1)}
        output = function(torch.cat(tiles), arguments["timestep"].repeat(count), **c)
        return torch.cat(output.chunk(count), dim=-1)

    return call


@pytest.mark.parametrize(
    ("together", "message"),
    [
        (False, "called with a tile of 10 x 12 of latents of 20 x 12, and Record Attention"),
        (True, "called with 4 pictures where the sampler has 1 for each of 2 prompts"),
    ],
)
def test_tiles_are_refused(host, loaded, positive, negative, together, message):
    """A map of one tile would have counted as a map of the whole picture."""
    model = loaded.model.clone()
    model.set_model_unet_function_wrapper(in_tiles(2, together))
    with pytest.raises(ValueError, match=message):
        sample(host, model, record(host, positive)[0], negative)


def test_windows_are_refused(host, loaded, positive, negative):
    """The pictures of a window would have counted as the first pictures of the batch."""
    model = in_windows(loaded.model, [0, 2], 2)
    with pytest.raises(ValueError, match="called with 2 of the sampler's 4 pictures, and Record Attention"):
        sample(host, model, record(host, positive)[0], negative, rows=4)


def test_a_second_run_starts_afresh(host, loaded, positive, negative):
    watched, attention = record(host, positive)
    sample(host, loaded.model, watched, negative, seed=1, rows=2, size=(8, 8))
    first = attention.word_map("hat", *SIZE)
    sample(host, loaded.model, watched, negative, seed=2)
    fresh, fresh_attention = record(host, positive)
    sample(host, loaded.model, fresh, negative, seed=2)
    assert torch.equal(attention.word_map("hat", *SIZE), fresh_attention.word_map("hat", *SIZE))
    assert first.shape[0] == 2
    assert not torch.allclose(first[:1], attention.word_map("hat", *SIZE))


def test_two_graphs_do_not_disturb_each_other(host, loaded, positive, negative):
    (one, one_attention), (two, two_attention) = record(host, positive), record(host, positive)
    sample(host, loaded.model, one, negative)
    before = one_attention.word_map("hat", 24, 40)
    sample(host, loaded.model, two, negative, rows=2, size=(8, 8))
    assert torch.equal(one_attention.word_map("hat", 24, 40), before)
    assert two_attention.batch_size == 2


def test_a_conditioning_watched_twice(host, loaded, positive, negative):
    once, inner = record(host, positive)
    twice, outer = record(host, once)
    sample(host, loaded.model, twice, negative)
    assert inner.batch_size == outer.batch_size == 1
    assert torch.equal(inner.word_map("hat", *SIZE), outer.word_map("hat", *SIZE))


def test_a_stock_prompt_needs_its_clip_and_text(host, loaded, negative):
    text = "a (red:1.3) hat"
    conditioning = stock(host, loaded.clip, text)
    with pytest.raises(ValueError, match="does not say which token is which word"):
        record(host, conditioning)
    watched, attention = record(host, conditioning, clip=loaded.clip, text=text)
    explicit = Explicit(loaded.model)
    sample(host, explicit.model, watched, negative)
    expected = explicit.word_map([2, 3], 77, SIZE)
    torch.testing.assert_close(attention.word_map("red hat", *SIZE), expected, atol=1e-5, rtol=0)


@pytest.fixture
def sampled(host, loaded, positive, negative):
    """A recorded run of two images of 96 x 160 pixels."""
    watched, attention = record(host, positive)
    sample(host, loaded.model, watched, negative, rows=2)
    return SimpleNamespace(attention=attention, image=torch.rand(2, 96, 160, 3))


def test_every_word_gets_an_image_with_its_label(host, sampled):
    images, masks = show(host, sampled.attention, sampled.image)
    words = ["a", "<subject>", "dog", "wearing", "red", "hat"]
    assert len(images) == len(masks) == 2 * len(words)
    assert masks.shape[1:] == (96, 160)
    assert masks.amin() == 0
    assert (masks.amax((1, 2)) == 1).all()
    gap, strip = 1, 12  # the contact sheet's
    assert images.shape[1:] == (96 + strip + 2 * gap, 160 + 2 * gap, 3)
    labels = images[:, gap + 96 : gap + 96 + strip]
    assert (labels.amin((1, 2, 3)) < 0.5).all()
    assert not torch.equal(labels[0], labels[1])


def test_words_are_chosen_and_ordered(host, sampled):
    images, masks = show(host, sampled.attention, sampled.image, words="Red hat, <subject>")
    expected = [sampled.attention.word_map(word, 96, 160)[row] for row in (0, 1) for word in ("red hat", "<subject>")]
    for mask, each in zip(masks, expected, strict=True):
        torch.testing.assert_close(mask, (each - each.min()) / (each.max() - each.min()), atol=1e-5, rtol=0)


def test_strength_0_is_the_image(host, sampled):
    images, _ = show(host, sampled.attention, sampled.image, words="dog", strength=0.0)
    assert torch.equal(images[:, 1:97, 1:161], sampled.image)


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (2, 31, 77, 4), (2, 1, 1, 3)])
def test_images_of_any_size(host, sampled, shape):
    images, masks = show(host, sampled.attention, torch.rand(shape), words="dog")
    assert masks.shape == shape[:3]
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_word_that_is_not_there_is_named(host, sampled):
    with pytest.raises(ValueError, match='There is no "cat" in this prompt; its words are: a, <subject>, dog, wearing'):
        show(host, sampled.attention, sampled.image, words="cat")


def test_a_prompt_without_words_is_named(host, loaded, negative):
    watched, attention = record(host, stock(host, loaded.clip, ", !"), clip=loaded.clip, text=", !")
    sample(host, loaded.model, watched, negative)
    with pytest.raises(ValueError, match="has no words, only punctuation"):
        show(host, attention, torch.rand(1, 96, 160, 3))


def test_other_images_are_refused(host, sampled, positive):
    with pytest.raises(ValueError, match=r"The image holds 1 picture\(s\), but 2 were recorded"):
        show(host, sampled.attention, sampled.image[:1])
    _, unused = record(host, positive)
    with pytest.raises(ValueError, match="Nothing was recorded: connect Record Attention's conditioning"):
        show(host, unused, sampled.image)


def test_a_model_without_cross_attention_is_named(host):
    flux = type("Flux", (), {"diffusion_model": torch.nn.Identity()})()
    entry = {"blip_attention_records": (), "uuid": 0, "model_conds": {}}
    guider = SimpleNamespace(model_patcher=SimpleNamespace(model=flux), conds={"positive": [entry]})
    executor = SimpleNamespace(class_obj=guider)
    with pytest.raises(ValueError, match="of the kind Flux, in which words are not looked at through cross-attention"):
        host.module("nodes.host.attention.recorder").sample_and_record(executor, torch.zeros(1, 16, 8, 8))
