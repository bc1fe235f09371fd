"""Subject Fine-tune in the host: the reference's step, a model left as it was, files that the stock nodes load."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.nodes.test_prompt import compose

SHORT = {"steps": 3, "resolution": 64, "look_every": 0, "rank": 2}
WORD = "dog"


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Four views, [4, H, W, 3]."""
    return torch.rand(4, 72, 80, 3, generator=torch.Generator().manual_seed(1))


def tune(host, loaded, pictures, **changes) -> SimpleNamespace:
    """Run the node."""
    sockets = {"model": loaded.model, "clip": loaded.clip, "vae": loaded.vae, "qformer": loaded.qformer}
    inputs = {**sockets, "image": pictures, "subject_word": WORD, **SHORT, **changes}
    names = ("model", "subject", "weights", "curve", "previews", "report")
    return SimpleNamespace(**dict(zip(names, host.run("BLIPDiffusionSubjectFinetune", **inputs), strict=True)))


def picture(host, model, loaded, subject) -> torch.Tensor:
    """What a model draws of a subject, as a latent."""
    positive = compose(host, loaded, subject, prompt="in the snow")[0]
    (negative,) = host.run("CLIPTextEncode", clip=loaded.clip, text="")
    return host.ddim(model, positive, negative, {"samples": torch.zeros(1, 4, 8, 8)}, 4, 7.5, 5)["samples"]


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_the_given_model_stays_as_it_was(host, loaded, subject, pictures, trains):
    drawn = picture(host, loaded.model, loaded, subject)  # and so its own weights are loaded, whatever was before
    before = {name: (id(weight), weight.clone()) for name, weight in loaded.model.model.named_parameters()}
    tuned = tune(host, loaded, pictures, trains=trains, learning_rate=1e-3)
    for name, weight in loaded.model.model.named_parameters():
        assert id(weight) == before[name][0], name
        assert torch.equal(weight, before[name][1]), name
    assert not any(module._forward_hooks for module in loaded.model.model.modules())
    assert not any("forward" in vars(module) for module in loaded.model.model.modules())
    assert torch.equal(picture(host, loaded.model, loaded, subject), drawn)
    assert not torch.allclose(picture(host, tuned.model, loaded, subject), drawn, atol=1e-3)
    assert torch.equal(picture(host, loaded.model, loaded, subject), drawn)


@pytest.mark.parametrize("trains", ["low-rank", "full"])
def test_the_saved_file_gives_the_live_models_picture(host, loaded, subject, pictures, trains):
    """Through the stock Save LoRA Weights and the stock LoraLoader."""
    tuned = tune(host, loaded, pictures, trains=trains, learning_rate=1e-3)
    host.run("SaveLoRA", lora=tuned.weights, prefix=f"loras/tuned-{trains}")
    (saved,) = (host.base / "output" / "loras").glob(f"tuned-{trains}*.safetensors")
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    saved.rename(folder / f"tuned-{trains}.safetensors")
    model, _ = host.run("LoraLoader", model=loaded.model, clip=loaded.clip, lora_name=f"tuned-{trains}.safetensors")
    live = picture(host, tuned.model, loaded, tuned.subject)
    torch.testing.assert_close(picture(host, model, loaded, tuned.subject), live, atol=1e-3, rtol=0)
    assert not torch.allclose(picture(host, loaded.model, loaded, tuned.subject), live, atol=1e-2)


@pytest.mark.parametrize("saving", [False, True])
def test_a_seed_repeats_it_with_and_without_gradient_checkpointing(host, loaded, pictures, saving):
    first = tune(host, loaded, pictures)
    again = tune(host, loaded, pictures, gradient_checkpointing=saving)
    other = tune(host, loaded, pictures, seed=1)
    torch.testing.assert_close(again.subject.vectors, first.subject.vectors, atol=1e-6, rtol=0)
    for name, tensor in first.weights.items():
        torch.testing.assert_close(again.weights[name], tensor, atol=1e-3, rtol=0)
    assert not torch.allclose(other.subject.vectors, first.subject.vectors, atol=1e-6)


def test_it_looks_on_the_way_and_keeps_the_best_step(host, loaded, pictures):
    tuned = tune(
        host, loaded, pictures, steps=4, look_every=2, learning_rate=1e-3, look_prompts="in the snow\n\non the grass"
    )
    assert tuned.previews.shape == (1, 2 * 64, 3 * 64, 3)  # two prompts; before, after two and after four steps
    assert [line.split(":")[0] for line in tuned.report.splitlines()[1:]] == ["step 0", "step 2", "step 4"]
    looks = tuned.report.splitlines()[2:]  # no tuning at all is none to choose from
    best = max(looks, key=lambda line: float(line.rpartition(" ")[2]))
    assert f"{best.split(':')[0]} kept" in tuned.report


def test_without_prompts_nothing_is_drawn_on_the_way_and_the_last_step_is_kept(host, loaded, pictures):
    tuned = tune(host, loaded, pictures, look_every=1, look_prompts=" \n")
    assert tuned.report == "low-rank: 3 steps, step 3 kept."
    assert tuned.previews.shape == (1, 1, 1, 3)


def test_cancelled_it_keeps_what_it_learned_and_the_graph_stops_behind_it(host, loaded, pictures, monkeypatch):
    import comfy.model_management as management

    steps = host.module("blip_qformer.finetune.loop").SubjectTuning.steps

    def cancelled(self):
        for step in steps(self):
            if step.number == 2:
                management.interrupt_current_processing()
            yield step

    monkeypatch.setattr(host.module("blip_qformer.finetune.loop").SubjectTuning, "steps", cancelled)
    tuned = tune(host, loaded, pictures, steps=50)
    assert tuned.report == "low-rank: 2 steps, step 2 kept."
    with pytest.raises(management.InterruptProcessingException):
        management.throw_exception_if_processing_interrupted()
    monkeypatch.undo()
    short = tune(host, loaded, pictures, steps=2)
    assert torch.equal(short.subject.vectors, tuned.subject.vectors)


def test_cancelled_while_it_draws_it_stops_at_the_next_denoising_step(host, loaded, pictures, monkeypatch):
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

    workbench = host.module("nodes.host.finetune")
    monkeypatch.setattr(workbench, "host_denoiser", counting(workbench.host_denoiser))
    with pytest.raises(management.InterruptProcessingException):
        tune(host, loaded, pictures, steps=4, look_every=2, look_prompts="in the snow")
    assert len(denoised) == 23


def test_a_loss_that_is_no_number_stops_it_and_keeps_the_step_before(host, loaded, pictures, monkeypatch, caplog):
    tuning = host.module("blip_qformer.finetune.loop").SubjectTuning
    loss = tuning.loss
    monkeypatch.setattr(tuning, "loss", lambda self, draws: loss(self, draws) * (float("nan") if self.losses else 1))
    tuned = tune(host, loaded, pictures, steps=5)
    monkeypatch.undo()
    assert "Step 2 has a loss or gradient that is no number: step 1 is kept." in caplog.text
    assert torch.equal(tuned.subject.vectors, tune(host, loaded, pictures, steps=1).subject.vectors)


def test_a_model_that_carries_a_lora_is_tuned_on_top_of_it(host, loaded, subject, pictures):
    first = tune(host, loaded, pictures, learning_rate=1e-3)
    patched = SimpleNamespace(**{**vars(loaded), "model": first.model})
    drawn = picture(host, first.model, loaded, subject)
    second = tune(host, patched, pictures, learning_rate=1e-3, seed=1)
    assert torch.equal(picture(host, first.model, loaded, subject), drawn)
    assert not torch.allclose(picture(host, second.model, loaded, subject), drawn, atol=1e-3)
    plain = picture(host, loaded.model, loaded, subject)
    assert not torch.allclose(drawn, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.rand(65, 64, 64, 3)}, "There are 65 pictures, .* choose the 3 to 5"),
        ({"image": torch.rand(1, 64, 40, 3)}, "The pictures are 40 x 64 pixels, .* take larger ones"),
    ],
)
def test_bad_pictures_are_refused_in_a_sentence(host, loaded, pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        tune(host, loaded, pictures, **changes)


def test_too_little_memory_is_said_before_the_first_step(host, loaded, pictures, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 30 * 1024**2)
    with pytest.raises(
        ValueError, match=r"Fine-tuning \(full\) needs about 0.1 GB .* has 0.0 GB free: .*low-rank needs 0."
    ):
        tune(host, loaded, pictures, trains="full")


def test_one_picture_is_enough(host, loaded, pictures):
    assert tune(host, loaded, pictures[:1]).subject.vectors.shape == (1, 16, 128)
