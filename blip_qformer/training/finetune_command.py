"""The command `blip-qformer finetune MODEL PICTURE... --word WORD --output FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.stable_diffusion import stable_diffusion_checkpoint
from ..checkpoint.writing import write_safetensors
from ..encoder import preprocess
from ..prompt import compose_prompt
from ..subject import Subject, save_subject
from ..subject.file_name import checked_name
from ..subject.provenance import encoder_hash, picture_hash
from .extras import import_extra
from .finetune import FinetuneSettings, Outcome, Step, SubjectTuning, check_count, check_size, finetune
from .loss_curve import loss_curve
from .low_rank import RANK, LowRank
from .noise import draw_latents
from .validation import VALIDATION_PROMPTS, Validation

EXTRAS = ("accelerate", "diffusers", "transformers")
LOW_RANK, FULL = "low-rank", "full"
DRAWING_STEPS, GUIDANCE = 20, 7.5


def add_finetune_command(commands: argparse._SubParsersAction) -> None:
    """Add `finetune` to a parser's commands."""
    defaults = FinetuneSettings()
    parser = commands.add_parser(
        "finetune",
        help="teach a model one subject from a few pictures",
        description="Fine-tune a model on 3 to 5 pictures of one thing. Writes the tuned subject, an embedding that "
        "every ComfyUI loads, and beside it a LoRA file or, with --trains full, a checkpoint for the stock loader; "
        "and pictures of the curve and of what was drawn on the way.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a whole BLIP-Diffusion model in the Hub layout")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="3 to 5 pictures of the thing")
    parser.add_argument("--word", required=True, help="what it is: dog, teddy bear, teapot")
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="what is made goes there")
    parser.add_argument("--name", help="of the files, letters, digits, - and _ (the word)")
    parser.add_argument("--trains", choices=[LOW_RANK, FULL], default=LOW_RANK, help=f"what of the U-Net ({LOW_RANK})")
    parser.add_argument("--steps", type=int, default=defaults.steps, help=f"({defaults.steps})")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(5e-6, the paper's)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help=f"({defaults.batch_size})")
    parser.add_argument("--resolution", type=int, default=512, help="edge of the square it learns at, pixels (512)")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of low-rank ({RANK})")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--look-every", metavar="N", type=int, default=20, help="steps between two looks; 0: none (20)")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], help="(bf16 on a GPU that knows it)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--mirror", action="store_true", help="learn from mirrored pictures too")
    parser.set_defaults(command=_finetune)


def _finetune(arguments: argparse.Namespace) -> None:
    """`finetune`: train, write the files, and say which step was kept."""
    for name in EXTRAS:
        import_extra(name, "Fine-tuning")
    name = checked_name(arguments.name or arguments.word.strip().replace(" ", "-"))
    check_count(len(arguments.pictures))
    pictures = [read_picture(path) for path in arguments.pictures]
    run = FinetuneRun(arguments, pictures)
    outcome = run.tune()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in run.write(arguments.output, name, outcome):
        print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
    print(f"{len(outcome.losses)} steps, step {outcome.kept} kept.")
    for score in outcome.scores:
        print(f"step {score.step}: likeness {score.likeness:.3f}, agreement {score.agreement:.3f}")


def read_picture(path: Path) -> Tensor:
    """A picture file -> [1, H, W, 3] in 0..1, upright.

    Raises:
        ValueError: it is no picture, or too small.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that can be read: leave it out.") from error
    check_size(*pixels.shape[:2])
    return torch.from_numpy(pixels.copy())[None] / 255


class FinetuneRun:
    """One fine-tuning outside ComfyUI: diffusers' U-Net and VAE, on the device and in the precision of accelerate."""

    def __init__(self, arguments: argparse.Namespace, pictures: Sequence[Tensor]):
        from accelerate import Accelerator

        from .parts import load_parts

        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = arguments.mixed_precision or ("bf16" if half else "no")
        self.accelerator = Accelerator(mixed_precision=precision)
        self.parts = load_parts(arguments.model)
        for network in self.parts.networks.values():
            network.requires_grad_(False).eval().to(self.accelerator.device)
        if arguments.gradient_checkpointing:
            self.parts.unet.train()  # diffusers checkpoints in training alone; its U-Net has no dropout
            self.parts.unet.enable_gradient_checkpointing()
        self.word, self.every, self.resolution = arguments.word.strip(), arguments.look_every, arguments.resolution
        self.full = arguments.trains == FULL
        self.low_rank = LowRank(self.parts.unet, arguments.rank, arguments.seed, self.accelerator.device)
        self.hash = encoder_hash(self.parts.encoder.state_dict())
        self.picture_hash = picture_hash(pictures[0])
        settings = FinetuneSettings(arguments.steps, arguments.learning_rate, arguments.batch_size, seed=arguments.seed)
        self.tuning = SubjectTuning(
            self._denoise,
            self.parts.unet.requires_grad_(self.full).parameters() if self.full else self.low_rank.parameters,
            self._vectors(pictures),
            self._latents(pictures, arguments.mirror),
            lambda vectors: self._encode([f"a {self.word}"], vectors),
            settings,
            low_rank=not self.full,
        )

    def tune(self) -> Outcome:
        """Fine-tune, with a progress bar on the terminal; Ctrl-C keeps the steps done."""
        from tqdm.auto import tqdm

        device, size = self.accelerator.device, self.resolution // 8
        sources = [torch.Generator().manual_seed(number) for number in range(len(VALIDATION_PROMPTS))]
        noise = torch.stack([torch.randn(4, size, size, generator=source) for source in sources]).to(device)
        before = self.tuning.vectors.detach().clone()

        def draw(with_subject: bool) -> Tensor:
            return self._draw(self.tuning.vectors.detach() if with_subject else before[:0], noise)

        def judge(plain: Tensor) -> Validation:
            return Validation(self._look, self.word, before, VALIDATION_PROMPTS, plain)

        with tqdm(total=self.tuning.settings.steps, desc="finetune") as bar, ExitStack() as stack:
            if not self.full:
                stack.enter_context(self.low_rank)

            def watch(step: Step, drawn: list[Tensor]) -> bool:
                bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                bar.update()
                return True

            self.drawn = finetune(self.tuning, every=self.every, draw=draw, judge=judge, watch=watch)
        return self.drawn

    def write(self, folder: Path, name: str, outcome: Outcome) -> list[Path]:
        """The tuned subject, the weights, and the pictures; their paths."""
        subject = Subject(self.tuning.vectors.detach().cpu()[None], self.word, self.hash, self.picture_hash)
        paths = [folder / f"{name}.safetensors", folder / f"{name}-{'checkpoint' if self.full else 'lora'}.safetensors"]
        save_subject(paths[0], subject, overwrite=True)
        if self.full:
            networks = (self.parts.unet, self.parts.text_encoder, self.parts.vae)
            unet, text_encoder, vae = (_weights(network) for network in networks)
            weights, dtype = stable_diffusion_checkpoint(unet, text_encoder, vae), torch.float16
        else:
            weights, dtype = self.low_rank.file(), torch.float32
        write_safetensors(paths[1], weights, metadata={"format": "pt"}, dtype=dtype, overwrite=True)
        paths.append(folder / f"{name}-curve.png")
        loss_curve(outcome.losses, outcome.scores, outcome.kept).save(paths[-1])
        if outcome.drawn:
            paths.append(folder / f"{name}-previews.png")
            strip = rearrange(torch.stack(outcome.drawn).cpu(), "look prompt c h w -> (prompt h) (look w) c")
            Image.fromarray((strip * 255).round().byte().numpy()).save(paths[-1])
        return paths

    def _denoise(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.parts.unet(noisy, timesteps, context).sample.float()

    def _encode(self, prompts: Sequence[str], vectors: Tensor) -> Tensor:
        """[P, 77, width]; no vectors: the prompts alone."""
        from .sampling import tokenize_prompts
        from .text_encoder import encode_prompts

        subject = vectors if len(vectors) else None
        return encode_prompts(self.parts.text_encoder, tokenize_prompts(self.parts, prompts), [subject] * len(prompts))

    @torch.no_grad()
    def _vectors(self, pictures: Sequence[Tensor]) -> Tensor:
        size = self.parts.encoder.config.vision.image_size
        pixels = torch.cat([preprocess(picture, size=size) for picture in pictures]).to(self.accelerator.device)
        return self.parts.encoder(pixels, [self.word] * len(pixels)).mean(dim=0)  # [16, width]

    @torch.no_grad()
    def _latents(self, pictures: Sequence[Tensor], mirror: bool) -> Tensor:
        """[N or 2N, 4, h, w], scaled as the U-Net expects them."""
        squares = torch.cat([middle_square(picture, self.resolution) for picture in pictures])
        squares = torch.cat([squares, squares.flip(3)]) if mirror else squares
        squares = squares.to(self.accelerator.device) * 2 - 1
        means = [self.parts.vae.encode(square[None]).latent_dist.mean for square in squares]
        return torch.cat(means) * self.parts.vae.config.scaling_factor

    @torch.no_grad()
    def _draw(self, vectors: Tensor, noise: Tensor) -> Tensor:
        """The validation prompts' pictures [P, 3, H, W] in 0..1."""
        contexts = self._encode([compose_prompt(prompt, self.word) for prompt in VALIDATION_PROMPTS], vectors)
        both = torch.cat([self._encode([""] * len(contexts), vectors[:0]), contexts])

        def guided(noisy: Tensor, timesteps: Tensor) -> Tensor:
            without, with_prompt = self._denoise(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
            return without + GUIDANCE * (with_prompt - without)

        latents = draw_latents(guided, noise, DRAWING_STEPS) / self.parts.vae.config.scaling_factor
        return (torch.cat([self.parts.vae.decode(row[None]).sample for row in latents]) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def _look(self, pictures: Tensor, words: Sequence[str]) -> Tensor:
        size = self.parts.encoder.config.vision.image_size
        pixels = preprocess(rearrange(pictures, "b c h w -> b h w c").cpu(), size=size)
        return self.parts.encoder(pixels.to(self.accelerator.device), list(words))


def middle_square(picture: Tensor, edge: int) -> Tensor:
    """[1, H, W, 3] -> [1, 3, edge, edge]: the short edge is fitted and the middle kept."""
    height, width = picture.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = rearrange(picture[:, top : top + short, left : left + short], "b h w c -> b c h w")
    return F.interpolate(square, (edge, edge), mode="bicubic", antialias=True).clamp(0, 1)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under their published names."""
    return network.published() if hasattr(network, "published") else network.state_dict()
