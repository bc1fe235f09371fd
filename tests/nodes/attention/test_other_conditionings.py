"""Edits and recordings before and behind the stock nodes that change, join and combine conditionings."""

from __future__ import annotations

import asyncio

import pytest
import torch
import torch.nn.functional as F

from tests import oracle
from tests.nodes.attention.explicit import ExplicitAttention, copies, inject
from tests.nodes.attention.graphs import (
    close,
    differ,
    factors_at,
    pair,
    reweight,
    sample,
    scaled,
    side_by_side,
    stacked,
    with_more_words_behind,
)
from tests.nodes.conftest import SIZES
from tests.nodes.test_prompt import compose, spans, stock
from tests.random_weights import write_hub_folder
from tools.host import WorkflowError, comfyui_path

SIZE = (8, 12)
ONE, TWO = "a dog in the snow", "green grass in the snow"


@pytest.fixture
def positive(host, small):
    """A prompt with a subject: a <subject> dog in the snow."""
    return compose(host, small, small.subject)[0]


# What a graph does to a conditioning: functions of (host, small, conditioning).


def averaged(host, small, conditioning):
    inputs = {"conditioning_to": conditioning, "conditioning_from": stock(host, small.clip, "grass")}
    return host.run("ConditioningAverage", **inputs, conditioning_to_strength=0.7)[0]


def combined(host, small, conditioning):
    return host.run(
        "ConditioningCombine", conditioning_1=conditioning, conditioning_2=stock(host, small.clip, "very " * 80)
    )[0]


def in_an_area(host, small, conditioning):
    inputs = {"width": 0.5, "height": 1.0, "x": 0.25, "y": 0.0, "strength": 1.0}
    (area,) = host.run("ConditioningSetAreaPercentage", conditioning=conditioning, **inputs)
    return combined(host, small, area)


def weaker(host, small, conditioning):
    return combined(host, small, host.run("ConditioningSetAreaStrength", conditioning=conditioning, strength=0.5)[0])


def masked(host, small, conditioning):
    mask = torch.zeros(1, 64, 96)
    mask[:, 16:48, 40:90] = 1
    inputs = {"mask": mask, "strength": 1.0, "set_cond_area": "default"}
    return combined(host, small, host.run("ConditioningSetMask", conditioning=conditioning, **inputs)[0])


def in_the_first_half(host, small, conditioning):
    early, late = (
        host.run("ConditioningSetTimestepRange", conditioning=each, start=start, end=end)[0]
        for each, start, end in ((conditioning, 0.0, 0.5), (stock(host, small.clip, "grass"), 0.5, 1.0))
    )
    return host.run("ConditioningCombine", conditioning_1=early, conditioning_2=late)[0]


def with_unclip(host, small, conditioning):
    inputs = {"clip_vision_output": None, "strength": 1.0, "noise_augmentation": 0.0}
    return host.run("unCLIPConditioning", conditioning=conditioning, **inputs)[0]


def under_the_old_controlnet(host, small, conditioning):
    (control_net,) = host.run("BLIPDiffusionControlNetLoader", checkpoint="editing")
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(5))
    inputs = {"control_net": control_net, "image": image, "strength": 1.0}
    return host.run("ControlNetApply", conditioning=conditioning, **inputs)[0]


def concatenated(host, small, conditioning):
    return with_more_words_behind(host, small, conditioning)[0]


GRAPHS = [
    averaged,
    combined,
    concatenated,
    in_an_area,
    in_the_first_half,
    masked,
    under_the_old_controlnet,
    weaker,
    with_unclip,
]


def edit(host, small, conditioning, way, **inputs):
    """Attention Re-weight Edit by a hook or by the MODEL wire: conditioning and MODEL."""
    inputs |= {"model": small.model} if way == "wire" else {}
    node = {"conditioning": conditioning, "weights": "<subject>:0.3, snow:4", **inputs}
    conditioning, model = host.run("BLIPDiffusionAttentionReweight", **node)
    return conditioning, model if way == "wire" else small.model


@pytest.mark.parametrize("way", ["hook", "wire"])
@pytest.mark.parametrize("position", ["before", "behind"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_reweight_acts_on_its_prompt(host, small, positive, graph, position, way):
    """On the rows of that prompt and nowhere else, as explicit attention on the same graph does."""
    bare = graph(host, small, positive)
    weighted = factors_at([(range(2, 18), 0.3), (spans(positive)["snow"], 4.0)])
    weighted = F.pad(weighted, (0, bare[0][0].shape[1] - 77), value=1.0)
    explicit = ExplicitAttention([bare[0][0]], cross=scaled(lambda *step: weighted)).on(small.model)
    expected = sample(host, small, bare, model=explicit, steps=4)
    differ(sample(host, small, bare, steps=4), expected)
    if position == "before":
        edited, model = edit(host, small, positive, way)
        edited = graph(host, small, edited)
    else:
        text = {combined: "very " * 80, in_the_first_half: "grass"}.get(graph, "very " * 80)
        edited, model = edit(host, small, bare, way, **({"clip": small.clip, "text": text} if len(bare) > 1 else {}))
    close(sample(host, small, edited, model=model, steps=4), expected)


@pytest.mark.parametrize("way", ["hook", "wire"])
def test_an_edit_of_a_prompt_that_was_zeroed_does_nothing(host, small, positive, way):
    """Nothing of its words is left."""
    (zeroed,) = host.run("ConditioningZeroOut", conditioning=positive)
    edited, model = edit(host, small, positive, way)
    (edited,) = host.run("ConditioningZeroOut", conditioning=edited)
    assert torch.equal(sample(host, small, edited, model=model), sample(host, small, zeroed))


# Records.


class ExplicitMaps:
    """The mean map of some tokens of one prompt, by explicit attention."""

    def __init__(self, prompt, positions, tokens) -> None:
        self.maps = []
        self.positions, self.tokens = positions, tokens
        self.attention = ExplicitAttention([prompt], cross=self.see)

    def see(self, maps, step, steps, edges, latent) -> None:
        """Keep the map of a layer."""
        columns = sum(copy[..., self.positions].sum(-1) for copy in copies(maps, self.tokens))
        shown = columns.mean(1).reshape(-1, 1, *edges)
        self.maps.append(F.interpolate(shown, size=SIZE, mode="bilinear")[:, 0])

    def mean(self):
        """[B, H, W]."""
        return torch.stack(self.maps).mean(0)


@pytest.mark.parametrize("position", ["before", "behind"])
@pytest.mark.parametrize("graph", [each for each in GRAPHS if each is not in_an_area])
def test_a_record_holds_the_attention_of_its_prompt(host, small, positive, graph, position):
    bare = graph(host, small, positive)
    explicit = ExplicitMaps(bare[0][0], list(spans(positive)["snow"]), bare[0][0].shape[1])
    expected_latents = sample(host, small, bare, model=explicit.attention.on(small.model), steps=4)
    if position == "before":
        watched, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=positive)
        watched = graph(host, small, watched)
    else:
        text = {in_the_first_half: "grass"}.get(graph, "very " * 80)
        inputs = {"clip": small.clip, "text": text} if len(bare) > 1 else {}
        watched, record, _ = host.run("BLIPDiffusionAttentionRecord", conditioning=bare, **inputs)
    close(sample(host, small, watched, steps=4), expected_latents)
    torch.testing.assert_close(record.word_map("snow", *SIZE), explicit.mean(), atol=1e-5, rtol=0)


# Re-weight behind Concat and Combine: which word stands where.


def joined(host, one, two):
    return host.run("ConditioningConcat", conditioning_to=one, conditioning_from=two)[0]


def expect(host, small, conditioning, prompt, weighted, edited):
    """Assert that an edit is that of explicit attention with those factors."""
    explicit = ExplicitAttention([prompt], cross=scaled(lambda *step: weighted)).on(small.model)
    expected = sample(host, small, conditioning, model=explicit)
    close(sample(host, small, edited), expected)
    differ(sample(host, small, conditioning), expected)


@pytest.mark.parametrize(
    ("text", "weights", "factors"),
    [
        (f"{ONE}\n{TWO}", "dog:3, green grass:0.2", [([2], 3.0), ([78, 79], 0.2)]),
        (f"{ONE}\n{TWO}", "snow#2:3, snow#1:-1", [([82], 3.0), ([5], -1.0)]),
        (f"{ONE}\n{TWO}", "<end>#2:0", [(range(83, 154), 0.0)]),
        (TWO, "grass:3, <joined>:0.2", [([79], 3.0), (range(1, 77), 0.2)]),
        (ONE, "dog:3, <joined>:0.2", [([2], 3.0), (range(78, 154), 0.2)]),
    ],
)
def test_words_behind_concat_are_found_in_their_texts(host, small, text, weights, factors):
    conditioning = joined(host, stock(host, small.clip, ONE), stock(host, small.clip, TWO))
    edited = reweight(host, conditioning, weights, clip=small.clip, text=text)
    expect(host, small, conditioning, conditioning[0][0], factors_at(factors, 154), edited)


def test_a_subject_prompt_behind_concat_knows_its_own_words_and_finds_the_others(host, small, positive):
    conditioning = joined(host, positive, stock(host, small.clip, TWO))
    snow = spans(positive)["snow"]
    edited = reweight(host, conditioning, "snow:3, grass:0.2", clip=small.clip, text=TWO)
    weighted = factors_at([(snow, 3.0), ([82], 3.0), ([79], 0.2)], 154)
    expect(host, small, conditioning, conditioning[0][0], weighted, edited)
    edited = reweight(host, conditioning, "snow:3, <joined>:0.2, <end>:0")
    weighted = factors_at([(range(max(snow) + 1, 77), 0.0), (snow, 3.0), (range(78, 154), 0.2)], 154)
    expect(host, small, conditioning, conditioning[0][0], weighted, edited)
    with pytest.raises(ValueError, match="its words are: a, <subject>, dog, in, the, snow, <joined>"):
        reweight(host, conditioning, "grass:3")


def test_each_of_two_combined_prompts_has_its_own_words(host, small):
    """A word of one leaves the other as it is, also where both have as many tokens."""
    one, two = stock(host, small.clip, ONE), stock(host, small.clip, TWO)
    conditioning = host.run("ConditioningCombine", conditioning_1=one, conditioning_2=two)[0]
    edited = reweight(host, conditioning, "grass:4", clip=small.clip, text=f"{ONE}\n{TWO}")
    expect(host, small, conditioning, two[0][0], factors_at([([2], 4.0)]), edited)
    with pytest.raises(ValueError, match="The text makes 77 tokens and the conditioning has 154: .*a line for each"):
        reweight(host, joined(host, one, two), "cat:2", clip=small.clip, text="a cat")


# Encodings that differ from the stock node's, as nodes make them that read weights as other programs do.


def test_words_behind_concat_are_counted_where_they_are_not_found(host, small):
    one, two = stock(host, small.clip, ONE), stock(host, small.clip, TWO)
    factors = factors_at([([2], 3.0), ([78, 79], 0.2)], 154)
    for first, second in ((averaged(host, small, one), averaged(host, small, two)), (one, averaged(host, small, two))):
        conditioning = joined(host, first, second)
        edited = reweight(host, conditioning, "dog:3, green grass:0.2", clip=small.clip, text=f"{ONE}\n{TWO}")
        expect(host, small, conditioning, conditioning[0][0], factors, edited)
    with pytest.raises(ValueError, match="BREAK or AND made it of several, write a line for each text, in their order"):
        reweight(host, conditioning, "dog:3", clip=small.clip, text=f"{TWO}\n{ONE}")  # ONE is found in front


def test_a_line_for_each_of_the_combined_prompts_that_are_not_found(host, small):
    one, two = (averaged(host, small, stock(host, small.clip, text)) for text in (ONE, TWO))
    conditioning = host.run("ConditioningCombine", conditioning_1=one, conditioning_2=two)[0]
    edited = reweight(host, conditioning, "grass:4", clip=small.clip, text=f"{ONE}\n{TWO}")
    expect(host, small, conditioning, two[0][0], factors_at([([2], 4.0)]), edited)
    with pytest.raises(ValueError, match="found in none of the 2 prompts of this conditioning: .*a line for each"):
        reweight(host, conditioning, "grass:4", clip=small.clip, text=TWO)


def test_one_text_serves_all_ranges_of_a_schedule_that_changes_its_encoding(host, small):
    """As a LoRA on the CLIP from the middle on does, when the clip here is the one without the LoRA."""
    prompt = stock(host, small.clip, TWO)
    early, late = (
        averaged(host, small, host.run("ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end)[0])
        for start, end in ((0.0, 0.5), (0.5, 1.0))
    )
    conditioning = host.run("ConditioningCombine", conditioning_1=early, conditioning_2=late)[0]
    edited = reweight(host, conditioning, "grass:4", clip=small.clip, text=TWO)
    expect(host, small, conditioning, early[0][0], factors_at([([2], 4.0)]), edited)


@pytest.mark.parametrize("way", ["hook", "wire"])
def test_prompt_to_prompt_behind_concat(host, small, way):
    """Both prompts with the same words behind them: these are taken over from the source one by one."""
    source, edited = (stock(host, small.clip, text) for text in (ONE, "a cat in the snow"))
    more = stock(host, small.clip, TWO)
    source, edited = joined(host, source, more), joined(host, edited, more)

    def take_over(maps, step, steps, *edges):
        if step < int(0.7 * steps):
            maps[1] = maps[0]

    explicit = ExplicitAttention([source[0][0], edited[0][0]], cross=take_over, self_=inject(0.4)).on(small.model)
    expected = sample(host, small, stacked(source, edited), side_by_side(), model=explicit)
    for texts in ((ONE, "a cat in the snow"), (f"{ONE}\n{TWO}", f"a cat in the snow\n{TWO}")):
        inputs = {"cross_end": 0.7, "self_end": 0.4, **({"model": small.model} if way == "wire" else {})}
        conditioning, latent, model = host.run(
            "BLIPDiffusionPromptToPrompt",
            source=source,
            edited=edited,
            latent={"samples": torch.zeros(1, 4, *SIZE)},
            clip=small.clip,
            source_text=texts[0],
            edited_text=texts[1],
            **inputs,
        )
        model = model if way == "wire" else small.model
        close(sample(host, small, conditioning, latent, model=model), expected)
        differ(sample(host, small, stacked(source, edited), side_by_side())[1], expected[1])


def test_prompt_to_prompt_is_not_joined_or_averaged_without_a_word(host, small):
    source, edited = (stock(host, small.clip, text) for text in (ONE, "a cat in the snow"))
    conditioning, latent = pair(host, small, source, edited, texts=(ONE, "a cat in the snow"))
    with pytest.raises(ValueError, match="had 2 rows of 77 tokens and now has 2 of 154: join or average.*before"):
        sample(host, small, joined(host, conditioning, stacked(source, edited)), latent)


# Where an edit gets lost.


def graph_with(kind, name, between=()):
    """The host's graph of an edit whose first output comes to an input."""
    graph = {"1": {"class_type": "BLIPDiffusionAttentionReweight", "inputs": {}}, "9": {"class_type": kind}}
    source = ["1", 0]
    for number, (each, taken, slot) in enumerate(between, start=2):
        graph[str(number)] = {"class_type": each, "inputs": {taken: source, "strength": 1.0}}
        source = [str(number), slot]
    return {**graph, "9": {"class_type": kind, "inputs": {name: source}}}


def run_in_graph(host, node, graph, **inputs):
    """Run a node as the host does, which shows it its graph."""
    import execution
    from comfy_api.latest import io

    from tools.host_versions import with_hidden_inputs

    hidden = with_hidden_inputs(execution.get_output_data, {io.Hidden.prompt: graph, io.Hidden.unique_id: "1"})
    values = {name: [value] for name, value in inputs.items()}
    with torch.inference_mode():
        return asyncio.run(execution.get_output_data("test", "1", host.nodes[node](), values, **hidden))


AREA = ("ConditioningSetArea", "conditioning", 0)
CONTROL = ("ControlNetApplyAdvanced", "positive", 0)


@pytest.mark.parametrize("kind", ["ConditioningConcat", "ConditioningAverage"])
@pytest.mark.parametrize("between", [(), (AREA,), (AREA, CONTROL)])
@pytest.mark.parametrize("node", ["BLIPDiffusionAttentionReweight", "BLIPDiffusionAttentionRecord"])
def test_what_would_get_lost_is_refused(host, positive, kind, between, node):
    inputs = {"conditioning": positive}
    if node == "BLIPDiffusionAttentionReweight":
        inputs |= {"weights": "snow:2", "start": 0.0, "end": 1.0}
    with pytest.raises(ValueError, match=f"comes to conditioning_from of {kind}, .*connect it to conditioning_to"):
        run_in_graph(host, node, graph_with(kind, "conditioning_from", between), **inputs)
    for graph in (
        graph_with(kind, "conditioning_to", between),
        graph_with(kind, "conditioning_from", (("ControlNetApplyAdvanced", "positive", 1),)),  # the other prompt's
        graph_with("KSampler", "positive", between),
    ):
        run_in_graph(host, node, graph, **inputs)


SENTENCE = "comes to conditioning_from of ConditioningConcat"


@pytest.mark.parametrize("inputs", [{"weights": ""}, {"weights": "snow:1"}, {"weights": "snow:2", "end": 0.0}])
def test_where_nothing_is_edited_nothing_is_refused(host, positive, inputs, caplog):
    inputs = {"conditioning": positive, "start": 0.0, "end": 1.0, **inputs}
    graph = graph_with("ConditioningConcat", "conditioning_from", (AREA,))
    ((same,), _), *_ = run_in_graph(host, "BLIPDiffusionAttentionReweight", graph, **inputs)
    assert same is positive
    assert SENTENCE not in caplog.text


def test_prompt_to_prompt_that_edits_is_refused(host, small):
    source, edited = (compose(host, small, small.subject, prompt=each)[0] for each in ("in the snow", "in the rain"))
    inputs = {
        "source": source, "edited": edited, "latent": {"samples": torch.zeros(1, 4, *SIZE)}, "cross_end": 0.8,
        "self_end": 0.4, "weights": "", "blend_words": "", "source_blend_words": "", "blend_threshold": 0.3,
        "cross_start": 0.0, "self_start": 0.0, "word_steps": "", "source_unguided": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=SENTENCE):
        run_in_graph(
            host, "BLIPDiffusionPromptToPrompt", graph_with("ConditioningConcat", "conditioning_from"), **inputs
        )


@pytest.mark.parametrize("node", ["BLIPDiffusionAttentionReweight", "BLIPDiffusionAttentionRecord"])
@pytest.mark.parametrize("sampler", ["KSampler", "BasicGuider"])
def test_what_another_use_keeps_is_warned_of(host, positive, node, sampler, caplog):
    inputs = {"conditioning": positive}
    if node == "BLIPDiffusionAttentionReweight":
        inputs |= {"weights": "snow:2", "start": 0.0, "end": 1.0}
    graph = graph_with("ConditioningConcat", "conditioning_from", (AREA,))
    socket = {"KSampler": "positive", "BasicGuider": "conditioning"}[sampler]
    # The Concat has a sampler as well, which gets nothing of the edit and so is no use that keeps it.
    graph["8"] = {"class_type": "KSampler", "inputs": {"positive": ["9", 0]}}
    with pytest.raises(ValueError, match=SENTENCE):
        run_in_graph(host, node, graph, **inputs)
    graph["7"] = {"class_type": sampler, "inputs": {socket: ["2", 0]}}
    run_in_graph(host, node, graph, **inputs)
    (warning,) = [each.getMessage() for each in caplog.records if SENTENCE in each.getMessage()]
    assert warning.startswith("Node 1, BLIPDiffusionAttentionReweight: This node's conditioning comes to")


def test_the_server_shows_the_sentence_at_the_edit(server, tmp_path):
    """With the graph that the real host hands the node."""
    pipeline = oracle.pipeline(SIZES, tmp_path, comfyui_path())
    write_hub_folder(pipeline, server.base / "models" / "blip_diffusion" / "concatenating")
    prompt = {
        "1": {"class_type": "BLIPDiffusionLoader", "inputs": {"checkpoint": "concatenating"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ONE}},
        "3": {
            "class_type": "BLIPDiffusionAttentionReweight",
            "inputs": {
                "conditioning": ["2", 0], "weights": "dog:2", "start": 0.0, "end": 1.0, "clip": ["1", 1], "text": ONE
            },
        },
        "4": {
            "class_type": "ConditioningConcat", "inputs": {"conditioning_to": ["2", 0], "conditioning_from": ["3", 0]}
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
    }  # fmt: skip
    with pytest.raises(WorkflowError, match="comes to conditioning_from of ConditioningConcat") as refused:
        server.queue(prompt)
    assert refused.value.node_id == "3"
    prompt["4"]["inputs"] = {"conditioning_to": ["3", 0], "conditioning_from": ["2", 0]}
    server.queue(prompt)
