"""Subject Fine-tune."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..blip_qformer.finetune.loop import FULL, LOW_RANK, FinetuneResult, FinetuneSettings, Step, check_count, check_size
from ..blip_qformer.finetune.lora import RANK
from ..blip_qformer.finetune.loss_curve import loss_curve
from ..blip_qformer.finetune.validation import VALIDATION_PROMPTS, preview_grid
from ..blip_qformer.subject import Subject
from ..blip_qformer.subject.provenance import image_hash
from .host.checks import require_additive_noise, require_clip_l
from .host.finetune import HostFinetuner, Watch, encode_pictures
from .host.managed import ManagedEncoder
from .types import CATEGORY, Blip2QFormer, BlipSubject, advanced, io

PREVIEW = 512  # longest edge, pixels

LoraModel = io.Custom("LORA_MODEL")  # the stock Save LoRA Weights takes it


class SubjectFinetune(io.ComfyNode):
    """A few pictures become a subject that the model knows by heart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIPDiffusionSubjectFinetune",
            display_name="Subject Fine-tune",
            category=CATEGORY,
            description="Teaches the model your thing from 3 to 5 pictures, in about a minute on a large card. The "
            "model and the subject go where the untuned ones went. Cancelled, it keeps what it learned so far: press "
            "Queue again and the graph goes on with that.",
            inputs=[
                io.Model.Input("model", tooltip="From Load BLIP-Diffusion. It stays as it is; a tuned one comes out."),
                io.Clip.Input("clip", tooltip="From the same Load BLIP-Diffusion."),
                io.Vae.Input("vae", tooltip="From the same Load BLIP-Diffusion."),
                Blip2QFormer.Input("qformer", tooltip="From the same Load BLIP-Diffusion."),
                io.Image.Input(
                    "image",
                    tooltip="3 to 5 pictures of the one thing as a batch, from several sides, large in the picture and "
                    "in different places. Of any size; the middle square is learned.",
                ),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="What it is, in one to three English words: dog, teddy bear, teapot.",
                ),
                io.Int.Input(
                    "steps",
                    default=80,
                    min=1,
                    max=2000,
                    tooltip="How long to learn. The authors needed 40 to 120; the best of them is kept.",
                ),
                io.Combo.Input(
                    "trains",
                    options=[LOW_RANK, FULL],
                    default=LOW_RANK,
                    tooltip="low-rank: a few megabytes beside the model, for small graphics cards. full: the whole "
                    "U-Net, as the authors do; its optimizer alone needs 14 GB, and the file is as large as a U-Net.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=5e-6,
                    min=1e-8,
                    max=1.0,
                    step=1e-7,
                    round=1e-8,
                    tooltip="The authors'. low-rank factors learn at twenty times this by themselves. Too high: every "
                    "picture looks like yours, whatever the prompt says.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32,
                    control_after_generate=False,
                    tooltip="The same seed learns the same.",
                ),
                advanced(io.Int.Input("batch_size", default=3, min=1, max=64, tooltip="Pictures in a step.")),
                advanced(
                    io.Int.Input(
                        "resolution",
                        default=512,
                        min=64,
                        max=2048,
                        step=64,
                        tooltip="Edge of the square it learns at, in pixels; what the model draws best: 512 for SD1.5.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "rank", default=RANK, min=1, max=256, tooltip="Of low-rank: how much room there is to learn."
                    )
                ),
                advanced(
                    io.Int.Input(
                        "look_every",
                        default=20,
                        min=0,
                        max=2000,
                        tooltip="After so many steps pictures are drawn and scored, and the best step is kept. 0: "
                        "never, and the last step is kept; faster.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "look_prompts",
                        default="\n".join(VALIDATION_PROMPTS),
                        multiline=True,
                        tooltip="What to draw then, a line each, as you would write it in Subject Prompt Compose.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "gradient_checkpointing",
                        default=True,
                        tooltip="Needs less memory and takes a little longer.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "mirror", default=False, tooltip="Learn from mirrored pictures too; not for text or faces."
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is, as in BLIP-2 Subject Encode. The background is still learned.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tuned model, for KSampler."),
                BlipSubject.Output(display_name="subject", tooltip="The tuned subject, for Subject Prompt Compose."),
                LoraModel.Output(
                    display_name="weights",
                    tooltip="For the stock Save LoRA Weights; the stock LoraLoader loads the file. Keep the subject "
                    "beside it with Save Subject.",
                ),
                io.Image.Output(display_name="curve", tooltip="The loss, the scores, and which step was kept."),
                io.Image.Output(
                    display_name="previews", tooltip="A row for each prompt, a column for each look, untuned first."
                ),
                io.String.Output(display_name="report", tooltip="What was trained and which step was kept."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: comfy.sd.CLIP,
        vae: comfy.sd.VAE,
        qformer: ManagedEncoder,
        image: Tensor,
        subject_word: str,
        steps: int,
        trains: str,
        learning_rate: float,
        seed: int,
        batch_size: int,
        resolution: int,
        rank: int,
        look_every: int,
        look_prompts: str,
        gradient_checkpointing: bool,
        mirror: bool,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        require_additive_noise(model)
        check_count(len(image))
        check_size(*image.shape[1:3])
        word = subject_word.strip()
        vectors = qformer.encode(image, word, "crop", mask).mean(dim=0)  # [16, width]
        require_clip_l(clip, vectors.shape[-1])
        latents = encode_pictures(vae, image, resolution, mirror)
        settings = FinetuneSettings(steps, learning_rate, batch_size, seed=seed)
        workbench = HostFinetuner(model, clip, vae, qformer, word, trains, rank, gradient_checkpointing)
        prompts = [line.strip() for line in look_prompts.splitlines() if line.strip()]
        looks = {"every": look_every if prompts else 0, "prompts": prompts}
        with torch.inference_mode(False):
            tuned = workbench.tune(vectors.clone(), latents.clone(), settings, **looks, watch=watch_in_host(steps))
        if not tuned.outcome.losses:  # nothing was learned that a later run could go on with
            comfy.model_management.throw_exception_if_processing_interrupted()
        patched, _ = comfy.sd.load_lora_for_models(model, None, tuned.weights, 1.0, 0.0)
        subject = Subject(tuned.vectors[None], word, qformer.encoder_hash, image_hash(image))
        outcome = tuned.outcome
        curve = to_image(loss_curve(outcome.losses, outcome.scores, outcome.kept_step))
        # A black pixel stands for pictures where none were drawn.
        previews = preview_grid(outcome.samples)[None] if outcome.samples else torch.zeros(1, 1, 1, 3)
        return io.NodeOutput(patched, subject, tuned.weights, curve, previews, describe(outcome, trains))


def watch_in_host(steps: int) -> Watch:
    """Shows each step in the host's progress bar, with the loss and the last pictures; stops when it is asked to."""
    progress = comfy.utils.ProgressBar(steps)
    losses = []

    def watch(step: Step, drawn: list[Tensor]) -> bool:
        losses.append(step.loss)
        progress.update_absolute(step.number, steps, preview_of(losses, drawn))
        # The flag stays up: the graph stops behind this node, whose result the host keeps for the next run.
        return not comfy.model_management.processing_interrupted()

    return watch


def preview_of(losses: Sequence[float], drawn: Sequence[Tensor]) -> tuple[str, Image.Image, int]:
    """The curve so far, above the pictures that were drawn last, as the host's progress bar shows it."""
    curve = loss_curve(losses)
    if not drawn:
        return "JPEG", curve, PREVIEW
    row = rearrange(drawn[-1], "prompt c h w -> h (prompt w) c").cpu()
    pictures = Image.fromarray((row * 255).round().byte().numpy())
    pictures = pictures.resize((curve.width, round(pictures.height * curve.width / pictures.width)))
    both = Image.new("RGB", (curve.width, curve.height + pictures.height))
    both.paste(curve, (0, 0))
    both.paste(pictures, (0, curve.height))
    return "JPEG", both, PREVIEW


def to_image(picture: Image.Image) -> Tensor:
    """A picture as the host has it, [1, H, W, 3] in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return rearrange(pixels, "(h w c) -> 1 h w c", h=picture.height, c=3) / 255


def describe(outcome: FinetuneResult, trains: str) -> str:
    """In words, what was trained and which step was kept."""
    done = len(outcome.losses)
    text = f"{trains}: {done} steps, step {outcome.kept_step} kept."
    lines = [
        f"step {score.step}: likeness {score.likeness:.3f}, agreement {score.agreement:.3f}, together {score.total:.3f}"
        for score in outcome.scores
    ]
    return "\n".join([text, *lines])


NODES = [SubjectFinetune]
