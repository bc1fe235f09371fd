"""Subject Fine-tune in the host: the reference's step, a model left as it was, files that the stock nodes load."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.host import InputList
from tests.nodes.test_prompt import compose

SHORT = {"steps": 3, "resolution": 64, "look_every": 0, "rank": 2}
WORD = "dog"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Four views, [4, H, W, 3]."""
    return torch.rand(4, 72, 80, 3, generator=torch.Generator().manual_seed(1))


def tune(host, loaded, images, **changes) -> SimpleNamespace:
    """Run the node."""
    sockets = {"model": loaded.model, "clip": loaded.clip, "vae": loaded.vae, "qformer": loaded.qformer}
    inputs = {**sockets, "image": images, "subject_word": WORD, **SHORT, **changes}
    names = ("model", "subject", "weights", "curve", "previews", "report")
    return SimpleNamespace(**dict(zip(names, host.run("BLIPDiffusionSubjectFinetune", **inputs), strict=True)))


def sample(host, model, loaded, subject) -> torch.Tensor:
    """Sample an image of a subject, as a latent."""
    positive = compose(host, loaded, subject, prompt="in the snow")[0]
    (negative,) = host.run("CLIPTextEncode", clip=loaded.clip, text="")
    return host.ddim(model, positive, negative, {"samples": torch.zeros(1, 4, 8, 8)}, 4, 7.5, 5)["samples"]


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_the_given_model_stays_as_it_was(host, loaded, subject, images, trains):
    sampled = sample(host, loaded.model, loaded, subject)  # and so its own weights are loaded, whatever was before
    before = {name: (id(weight), weight.clone()) for name, weight in loaded.model.model.named_parameters()}
    tuned = tune(host, loaded, images, trains=trains, learning_rate=1e-3)
    for name, weight in loaded.model.model.named_parameters():
        assert id(weight) == before[name][0], name
        assert torch.equal(weight, before[name][1]), name
    assert not any(module._forward_hooks for module in loaded.model.model.modules())
    assert not any("forward" in vars(module) for module in loaded.model.model.modules())
    assert torch.equal(sample(host, loaded.model, loaded, subject), sampled)
    assert not torch.allclose(sample(host, tuned.model, loaded, subject), sampled, atol=1e-3)
    assert torch.equal(sample(host, loaded.model, loaded, subject), sampled)


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_the_saved_file_gives_the_live_models_image(host, loaded, subject, images, trains):
    """Through the stock Save LoRA Weights and the stock LoraLoader."""
    tuned = tune(host, loaded, images, trains=trains, learning_rate=1e-3)
    host.run("SaveLoRA", lora=tuned.weights, prefix=f"loras/tuned-{trains}")
    (saved,) = (host.base / "output" / "loras").glob(f"tuned-{trains}*.safetensors")
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    saved.rename(folder / f"tuned-{trains}.safetensors")
    model, _ = host.run("LoraLoader", model=loaded.model, clip=loaded.clip, lora_name=f"tuned-{trains}.safetensors")
    live = sample(host, tuned.model, loaded, tuned.subject)
    torch.testing.assert_close(sample(host, model, loaded, tuned.subject), live, atol=1e-3, rtol=0)
    assert not torch.allclose(sample(host, loaded.model, loaded, tuned.subject), live, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_seed_repeats_it_with_and_without_gradient_checkpointing(host, loaded, images, checkpointing):
    first = tune(host, loaded, images)
    again = tune(host, loaded, images, gradient_checkpointing=checkpointing)
    other = tune(host, loaded, images, seed=1)
    torch.testing.assert_close(again.subject.vectors, first.subject.vectors, atol=1e-6, rtol=0)
    for name, tensor in first.weights.items():
        torch.testing.assert_close(again.weights[name], tensor, atol=1e-3, rtol=0)
    assert not torch.allclose(other.subject.vectors, first.subject.vectors, atol=1e-6)


def test_it_validates_on_the_way_and_keeps_the_best_step(host, loaded, images):
    tuned = tune(
        host, loaded, images, steps=4, look_every=2, learning_rate=1e-3, look_prompts="in the snow\n\non the grass"
    )
    assert tuned.previews.shape == (1, 2 * 64, 3 * 64, 3)  # two prompts; before, after two and after four steps
    assert [line.split(":")[0] for line in tuned.report.splitlines()[1:]] == ["step 0", "step 2", "step 4"]
    validated = tuned.report.splitlines()[2:]  # no tuning at all is none to choose from
    best = max(validated, key=lambda line: float(line.rpartition(" ")[2]))
    assert f"{best.split(':')[0]} kept" in tuned.report


def test_without_prompts_there_is_no_validation_and_the_last_step_is_kept(host, loaded, images):
    tuned = tune(host, loaded, images, look_every=1, look_prompts=" \n")
    assert tuned.report == "low-rank: 3 steps, step 3 kept."
    assert tuned.previews.shape == (1, 1, 1, 3)


def test_cancelled_it_keeps_what_it_learned_and_the_graph_stops_behind_it(host, loaded, images, monkeypatch):
    import comfy.model_management as management

    steps = host.module("blip_qformer.finetune.loop").SubjectTuning.steps

    def cancelled(self):
        for step in steps(self):
            if step.number == 2:
                management.interrupt_current_processing()
            yield step

    monkeypatch.setattr(host.module("blip_qformer.finetune.loop").SubjectTuning, "steps", cancelled)
    tuned = tune(host, loaded, images, steps=50)
    assert tuned.report == "low-rank: 2 steps, step 2 kept."
    with pytest.raises(management.InterruptProcessingException):
        management.throw_exception_if_processing_interrupted()
    monkeypatch.undo()
    short = tune(host, loaded, images, steps=2)
    assert torch.equal(short.subject.vectors, tuned.subject.vectors)


def test_cancelled_while_it_validates_it_stops_at_the_next_denoising_step(host, loaded, images, monkeypatch):
    import comfy.model_management as management

    denoised = []

    def counting(make):
        def made(model):
            def denoise(*inputs):
                denoised.append(len(inputs[0]))
                if len(denoised) == 20 + 3:  # twenty without the subject, and some of those with it
                    management.interrupt_current_processing()
                return make(model)(*inputs)

            return denoise

        return made

    finetuner = host.module("nodes.host.finetune")
    monkeypatch.setattr(finetuner, "host_denoiser", counting(finetuner.host_denoiser))
    with pytest.raises(management.InterruptProcessingException):
        tune(host, loaded, images, steps=4, look_every=2, look_prompts="in the snow")
    assert len(denoised) == 23


def test_a_loss_that_is_no_number_stops_it_and_keeps_the_step_before(host, loaded, images, monkeypatch, caplog):
    tuning = host.module("blip_qformer.finetune.loop").SubjectTuning
    loss = tuning.loss
    monkeypatch.setattr(tuning, "loss", lambda self, batch: loss(self, batch) * (float("nan") if self.losses else 1))
    tuned = tune(host, loaded, images, steps=5)
    monkeypatch.undo()
    assert "Step 2 has a loss or gradient that is no number: step 1 is kept." in caplog.text
    assert torch.equal(tuned.subject.vectors, tune(host, loaded, images, steps=1).subject.vectors)


def test_a_model_that_carries_a_lora_is_tuned_on_top_of_it(host, loaded, subject, images):
    first = tune(host, loaded, images, learning_rate=1e-3)
    patched = SimpleNamespace(**{**vars(loaded), "model": first.model})
    sampled = sample(host, first.model, loaded, subject)
    second = tune(host, patched, images, learning_rate=1e-3, seed=1)
    assert torch.equal(sample(host, first.model, loaded, subject), sampled)
    assert not torch.allclose(sample(host, second.model, loaded, subject), sampled, atol=1e-3)
    plain = sample(host, loaded.model, loaded, subject)
    assert not torch.allclose(sampled, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.rand(65, 64, 64, 3)}, "There are 65 pictures, .* choose the 3 to 5"),
        ({"image": torch.rand(1, 64, 40, 3)}, "The pictures are 40 x 64 pixels, .* take larger ones"),
    ],
)
def test_bad_images_are_refused_in_a_sentence(host, loaded, images, changes, message):
    with pytest.raises(ValueError, match=message):
        tune(host, loaded, images, **changes)


def test_too_little_memory_is_said_before_the_first_step(host, loaded, images, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 30 * 1024**2)
    with pytest.raises(
        ValueError, match=r"Fine-tuning \(full\) needs about 0.1 GB .* has 0.0 GB free: .*low-rank needs 0."
    ):
        tune(host, loaded, images, trains="full")


def test_a_list_is_one_fine_tuning_as_a_batch_is(host, loaded, images):
    by_batch, by_list = tune(host, loaded, images), tune(host, loaded, InputList(images.split(1)))
    assert torch.equal(by_list.subject.vectors, by_batch.subject.vectors)
    assert by_list.subject.source == by_batch.subject.source
    assert by_list.report == by_batch.report
    for name, tensor in by_batch.weights.items():
        assert torch.equal(by_list.weights[name], tensor)


def test_further_pictures_each_have_an_input(host, loaded, images):
    first, second, third = images[:1], torch.rand(1, 80, 64, 3), images[1:2]
    masks = [torch.zeros(1, *each.shape[1:3]) for each in (first, second, third)]
    for mask in masks:
        mask[:, 20:50, 10:40] = 1
    with_channel = [mask[:, None] for mask in masks]
    mask_inputs = {"mask": InputList(with_channel)}, {"mask": InputList(masks)}
    for apart_masks, masks_together in (({}, {}), mask_inputs):
        apart = tune(host, loaded, first, image_2=second, image_4=third, **apart_masks)
        together = tune(host, loaded, InputList([first, second, third]), **masks_together)
        assert torch.equal(apart.subject.vectors, together.subject.vectors)
        assert apart.subject.source == together.subject.source
    with pytest.raises(ValueError, match=r"There are 3 picture\(s\) but 2 masks"):
        tune(host, loaded, first, image_2=second, image_4=third, mask=InputList(masks[:2]))


def test_pictures_of_several_sizes_are_learned_together(host, loaded, images):
    """The sides of the wide ones are cut off in both, and white so that no filter sees the cut."""
    square = torch.ones(1, 64, 64, 3)
    square[:, 8:56, 8:56] = images[:1, :48, :48]
    wide = torch.ones(1, 64, 96, 3)
    wide[:, :, 16:80] = square
    mixed = tune(host, loaded, InputList([wide, square]))
    expected = tune(host, loaded, torch.cat([square, square]))
    torch.testing.assert_close(mixed.subject.vectors, expected.subject.vectors, atol=1e-3, rtol=0)
    other = tune(host, loaded, InputList([images[:1], square]))
    assert not torch.allclose(other.subject.vectors, expected.subject.vectors, atol=1e-2)
    with pytest.raises(ValueError, match="The pictures are 40 x 64 pixels"):
        tune(host, loaded, InputList([square, torch.rand(1, 64, 40, 3)]))


def test_one_image_is_enough(host, loaded, images):
    assert tune(host, loaded, images[:1]).subject.vectors.shape == (1, 16, 128)
