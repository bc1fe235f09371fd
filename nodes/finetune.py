"""Subject Fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ..blip_qformer.encoder.preprocessing import composite_alpha
from ..blip_qformer.prompt import compose_prompt
from ..blip_qformer.subject import Subject
from ..blip_qformer.subject.provenance import picture_hash
from ..blip_qformer.training.finetune import (
    Denoiser,
    FinetuneSettings,
    Outcome,
    Step,
    SubjectTuning,
    check_count,
    check_size,
    finetune,
)
from ..blip_qformer.training.loss_curve import loss_curve
from ..blip_qformer.training.low_rank import RANK, LowRank, difference_file
from ..blip_qformer.training.noise import draw_latents
from ..blip_qformer.training.validation import VALIDATION_PROMPTS, Validation
from .conditioning import require_clip_l
from .inversion import check_model
from .qformer import HostedQFormer
from .trainable import (
    check_memory,
    gradient_checkpointing,
    host_caption_encoder,
    host_denoiser,
    ordinary_view,
    trainable,
    training_model,
)
from .types import CATEGORY, Blip2QFormer, BlipSubject, advanced, io

LOW_RANK, FULL = "low-rank", "full"
DRAWING_STEPS, GUIDANCE = 20, 7.5  # of validation pictures
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
        qformer: HostedQFormer,
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
        check_model(model)
        check_count(len(image))
        check_size(*image.shape[1:3])
        word = subject_word.strip()
        vectors = qformer.encode(image, word, "crop", mask).mean(dim=0)  # [16, width]
        require_clip_l(clip, vectors.shape[-1])
        latents = encode_pictures(vae, image, resolution, mirror)
        settings = FinetuneSettings(steps, learning_rate, batch_size, seed=seed)
        workbench = Workbench(model, clip, vae, qformer, word, trains == FULL, rank, gradient_checkpointing)
        prompts = [line.strip() for line in look_prompts.splitlines() if line.strip()]
        with torch.inference_mode(False):
            tuned = workbench.tune(vectors.clone(), latents.clone(), settings, look_every if prompts else 0, prompts)
        patched, _ = comfy.sd.load_lora_for_models(model, None, tuned.weights, 1.0, 0.0)
        subject = Subject(tuned.vectors[None], word, qformer.encoder_hash, picture_hash(image))
        curve = to_image(loss_curve(tuned.outcome.losses, tuned.outcome.scores, tuned.outcome.kept))
        return io.NodeOutput(
            patched, subject, tuned.weights, curve, preview_strip(tuned.outcome.drawn), describe(tuned.outcome, trains)
        )


@dataclass(frozen=True, eq=False)
class Tuned:
    """What fine-tuning makes: a subject [16, width], weights as a LoRA file has them, and how it went."""

    vectors: Tensor
    weights: dict[str, Tensor]
    outcome: Outcome


class Workbench:
    """The host's models laid out for fine-tuning.

    Args:
        full: the whole U-Net trains; otherwise low-rank factors of ``rank``.
        saving: gradient checkpointing.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: comfy.sd.CLIP,
        vae: comfy.sd.VAE,
        qformer: HostedQFormer,
        word: str,
        full: bool,
        rank: int,
        saving: bool,
    ):
        self.model, self.clip, self.vae, self.qformer = training_model(model), clip, vae, qformer
        self.word, self.full, self.rank, self.saving = word, full, rank, saving
        self.names = diffusers_names(model)

    @property
    def network(self) -> nn.Module:
        return self.model.model.diffusion_model

    def tune(
        self, vectors: Tensor, latents: Tensor, settings: FinetuneSettings, every: int, prompts: Sequence[str]
    ) -> Tuned:
        """Fine-tune; outside inference mode."""
        device = self.model.load_device
        self._load()
        self._check_memory(settings, latents)
        low_rank = LowRank(self.network, self.rank, settings.seed, device, self.names)
        masters = self._masters() if self.full else {}
        tuning = SubjectTuning(
            host_denoiser(self.model),
            list(masters.values()) if self.full else low_rank.parameters,
            vectors.to(device),
            self.model.model.process_latent_in(latents.to(device, torch.float32)),
            host_caption_encoder(self.clip, f"a {self.word}", vectors.shape[-1]),
            settings,
            low_rank=not self.full,
        )

        @contextmanager
        def ground() -> Iterator[None]:
            with ExitStack() as stack:
                self._load()
                stack.enter_context(trainable(self.network, masters))
                stack.enter_context(trainable(self.clip.cond_stage_model))
                if not self.full:
                    stack.enter_context(low_rank)
                yield

        def stepping() -> Iterator[Step]:
            steps = tuning.steps()
            while True:
                with ground(), ExitStack() as stack:
                    if self.saving:
                        stack.enter_context(gradient_checkpointing(self.network))
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        def draw(with_subject: bool) -> Tensor:
            noise = torch.stack([noise_like(latents[0], number) for number in range(len(prompts))]).to(device)
            with ground():
                shown = tuning.vectors.detach() if with_subject else tuning.vectors[:0].detach()
                drawn = self._draw(tuning.denoiser, shown, prompts, noise)
            return self._decode(drawn)

        def judge(plain: Tensor) -> Validation:
            return Validation(self._look, self.word, vectors, prompts, plain)

        outcome = finetune(
            tuning, every=every, draw=draw, judge=judge, steps=stepping(), watch=watch_in_host(settings.steps)
        )
        if not outcome.losses:
            comfy.model_management.throw_exception_if_processing_interrupted()
        if self.full:
            before = dict(self.network.named_parameters())
            weights = difference_file(before, masters, self.names, torch.float16)
        else:
            weights = low_rank.file(torch.float16)
        weights = {name: tensor.to("cpu") for name, tensor in weights.items()}
        return Tuned(tuning.vectors.detach().to(comfy.model_management.intermediate_device()), weights, outcome)

    def _load(self) -> None:
        comfy.model_management.load_models_gpu([self.model, self.clip.patcher], force_full_load=True)

    def _check_memory(self, settings: FinetuneSettings, latents: Tensor) -> None:
        trained = {
            FULL: sum(weight.numel() for weight in self.network.parameters()),
            LOW_RANK: sum(weight.numel() for weight in LowRank(self.network, self.rank, names=self.names).parameters),
        }
        shape = (settings.batch_size, *latents.shape[1:])
        check_memory(self.model, trained, FULL if self.full else LOW_RANK, shape, self.saving)

    def _masters(self) -> dict[str, nn.Parameter]:
        """The U-Net's weights in float32, to train in place of the host's own."""
        weights = self.network.named_parameters()
        return {name: nn.Parameter(ordinary_view(weight).to(torch.float32, copy=True)) for name, weight in weights}

    @torch.no_grad()
    def _draw(self, denoiser: Denoiser, vectors: Tensor, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """[P, 4, h, w], as the denoiser has latents."""
        width = vectors.shape[-1]
        texts = [compose_prompt(prompt, self.word) for prompt in prompts]
        contexts = [host_caption_encoder(self.clip, text, width)(vectors) for text in texts]
        nothing = host_caption_encoder(self.clip, "", width)(vectors[:0])
        both = torch.cat([nothing.expand(len(prompts), -1, -1), *contexts])  # [2P, 77, width]

        def guided(noisy: Tensor, timesteps: Tensor) -> Tensor:
            without, with_prompt = denoiser(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
            return without + GUIDANCE * (with_prompt - without)

        return draw_latents(guided, noise, DRAWING_STEPS)

    def _decode(self, latents: Tensor) -> Tensor:
        """[P, 4, h, w] -> [P, 3, H, W] in 0..1"""
        with torch.inference_mode():
            pictures = self.vae.decode(self.model.model.process_latent_out(latents))
        return rearrange(pictures.clone(), "b h w c -> b c h w").clamp(0, 1)

    def _look(self, pictures: Tensor, words: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            seen = self.qformer.look(rearrange(pictures, "b c h w -> b h w c"), words)
        return seen.clone().to("cpu")


def encode_pictures(vae: comfy.sd.VAE, images: Tensor, resolution: int, mirror: bool) -> Tensor:
    """The middle squares of pictures [N, H, W, C] through the VAE -> [N or 2N, 4, h, w], as the host keeps latents."""
    squares = comfy.utils.common_upscale(composite_alpha(images), resolution, resolution, "lanczos", "center")
    squares = torch.cat([squares, squares.flip(3)]) if mirror else squares
    return vae.encode(rearrange(squares, "b c h w -> b h w c"))


def noise_like(latent: Tensor, seed: int) -> Tensor:
    """Standard normal, the same for the same seed on every device."""
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


def diffusers_names(model: ModelPatcher) -> dict[str, str]:
    """The host's name of each of a U-Net's layers -> diffusers'."""
    diffusers_to_host = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    endings = (".weight", ".bias")
    return {
        host.removesuffix(ending): diffusers.removesuffix(ending)
        for diffusers, host in diffusers_to_host.items()
        for ending in endings
        if host.endswith(ending)
    }


def watch_in_host(steps: int) -> Callable[[Step, list[Tensor]], bool]:
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
    row = rearrange(drawn[-1], "b c h w -> h (b w) c").cpu()
    pictures = Image.fromarray((row * 255).round().byte().numpy())
    pictures = pictures.resize((curve.width, round(pictures.height * curve.width / pictures.width)))
    both = Image.new("RGB", (curve.width, curve.height + pictures.height))
    both.paste(curve, (0, 0))
    both.paste(pictures, (0, curve.height))
    return "JPEG", both, PREVIEW


def preview_strip(drawn: Sequence[Tensor]) -> Tensor:
    """The pictures [P, 3, H, W] of each look -> one IMAGE [1, P H, looks W, 3]; a black pixel where none were drawn."""
    if not drawn:
        return torch.zeros(1, 1, 1, 3)
    return rearrange(torch.stack(list(drawn)).cpu(), "look prompt c h w -> 1 (prompt h) (look w) c")


def to_image(picture: Image.Image) -> Tensor:
    """A picture as the host has it, [1, H, W, 3] in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return rearrange(pixels, "(h w c) -> 1 h w c", h=picture.height, c=3) / 255


def describe(outcome: Outcome, trains: str) -> str:
    """In words, what was trained and which step was kept."""
    done = len(outcome.losses)
    text = f"{trains}: {done} steps, step {outcome.kept} kept."
    lines = [
        f"step {score.step}: likeness {score.likeness:.3f}, agreement {score.agreement:.3f}, together {score.total:.3f}"
        for score in outcome.scores
    ]
    return "\n".join([text, *lines])


NODES = [SubjectFinetune]
