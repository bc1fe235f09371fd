"""Fine-tuning on one subject (arXiv 2305.14720, section 4): a few pictures of it, forty to a hundred and twenty steps.

The mean of the pictures' vectors becomes trainable, and so does the U-Net or what :mod:`.low_rank` adds to it; the rest
is frozen. The loop knows neither ComfyUI nor diffusers: who calls it hands it the denoiser as a function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.noise_schedule import NUM_TRAIN_TIMESTEPS, Denoiser, add_noise
from .validation import Score, Validation

LOW_RANK, FULL = "low-rank", "full"  # what of the U-Net trains


LOW_RANK_FACTOR = 20  # the paper's rate suits a whole U-Net; low-rank factors begin at zero and have further to go


FEWEST, MOST = 1, 64  # pictures


SMALLEST = 64  # edge of a picture, pixels


#: ``vectors [16, width] -> context [1, T, width]``, the caption with the subject in it through the frozen text encoder.
CaptionEncoder = Callable[[Tensor], Tensor]


log = logging.getLogger("blip_diffusion")


@dataclass(frozen=True)
class FinetuneSettings:
    """How to tune; the defaults are the paper's.

    Args:
        steps: of the optimizer.
        learning_rate: of everything that trains; ``LOW_RANK_FACTOR`` times that for low-rank factors.
        batch_size: latents in a step.
        seed: of the order of the pictures, the noise and the timesteps.
    """

    steps: int = 80
    learning_rate: float = 5e-6
    batch_size: int = 3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be more than 0.")


@dataclass(frozen=True)
class Step:
    """What one step came to: its number, from 1 on, and its loss."""

    number: int
    loss: float


@dataclass(frozen=True)
class Draws:
    """Everything random about one step."""

    pictures: Tensor  # [B], which latents
    timesteps: Tensor  # [B]
    noise: Tensor  # [B, 4, h, w]


class SubjectTuning:
    """Fine-tuning under way; what it has made so far can be read off its parameters at any time.

    Args:
        denoiser: the U-Net with the weights that train; it may hold frozen ones too.
        weights: the parameters that train inside the denoiser, of whatever precision it computes in.
        low_rank: whether these are low-rank factors.
        vectors: [16, width], the mean of the pictures' vectors.
        latents: [N, 4, h, w], the pictures through the VAE, scaled as the denoiser expects them.
        encode_caption: the caption with given vectors, differentiable in them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weights: Sequence[nn.Parameter],
        vectors: Tensor,
        latents: Tensor,
        encode_caption: CaptionEncoder,
        settings: FinetuneSettings,
        *,
        low_rank: bool,
    ):
        self.denoiser, self.encode_caption = denoiser, encode_caption
        self.latents, self.settings = latents, settings
        self.vectors = nn.Parameter(vectors.detach().clone().float())
        self.weights = list(weights)
        rate = settings.learning_rate * (LOW_RANK_FACTOR if low_rank else 1)
        self.optimizer = torch.optim.AdamW(
            [{"params": self.weights, "lr": rate}, {"params": [self.vectors], "lr": settings.learning_rate}],
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self.losses: list[float] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains: the denoiser's weights, and last the subject's vectors."""
        return [*self.weights, self.vectors]

    def steps(self) -> Iterator[Step]:
        """Train, and hand out each step when it is done; whoever stops asking has what was trained so far.

        A loss or gradient that is no number ends it before it reaches the weights.
        """
        with torch.enable_grad():
            for number in range(1, self.settings.steps + 1):
                loss = self.loss(draw(self.latents, self.settings, number))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if not self._is_number(loss):
                    log.warning(
                        "Step %d has a loss or gradient that is no number: step %d is kept.", number, number - 1
                    )
                    return
                self.optimizer.step()
                self.losses.append(loss.item())
                yield Step(number, self.losses[-1])

    def loss(self, draws: Draws) -> Tensor:
        """Mean squared error of the predicted noise."""
        chosen = self.latents[draws.pictures]
        context = self.encode_caption(self.vectors).expand(len(chosen), -1, -1)  # [B, T, width]
        noisy = add_noise(chosen, draws.noise, draws.timesteps)
        predicted = self.denoiser(noisy, draws.timesteps, context)
        return F.mse_loss(predicted.float(), draws.noise)

    def snapshot(self) -> list[Tensor]:
        """What is trained so far, on the CPU."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Go back to a snapshot's weights."""
        for parameter, kept in zip(self.parameters, snapshot, strict=True):
            parameter.copy_(kept)

    def _is_number(self, loss: Tensor) -> bool:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        return bool(loss.isfinite() & norms.isfinite().all())


class Cancelled(Exception):
    """What ``draw`` may raise: whoever waits for it has had enough."""


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning came to.

    Args:
        kept: the step whose weights are in place now; 0: it was cancelled before any.
        losses: of each step.
        scores: of each validation, the first before any step; empty without any.
        drawn: the pictures of each validation, [P, 3, H, W] in 0..1.
    """

    kept: int
    losses: list[float]
    scores: list[Score]
    drawn: list[Tensor]


def finetune(
    tuning: SubjectTuning,
    *,
    every: int = 0,
    draw: Callable[[bool], Tensor] | None = None,
    judge: Callable[[Tensor], Validation] | None = None,
    steps: Iterator[Step] | None = None,
    watch: Callable[[Step, list[Tensor]], bool] = lambda step, drawn: True,
) -> Outcome:
    """Tune to the end, look at pictures on the way, and go back to the step whose pictures scored best.

    Cancelled, by ``watch`` or by ``draw``, it ends there with the last step's weights.

    Args:
        every: how many steps lie between two validations; 0: none, and the last step is kept.
        draw: the validation prompts' pictures [P, 3, H, W] in 0..1 with the weights as they are, with or without the
            subject in the prompt; may raise :class:`Cancelled`.
        judge: the pictures without the subject -> what scores those with it.
        steps: ``tuning.steps()``, for whoever has to prepare something for each.
        watch: is shown each step and the pictures so far; what it returns says whether to go on.
    """
    drawn: list[Tensor] = []
    validation, best, number = None, None, 0

    def look() -> None:
        nonlocal best
        drawn.append(draw(True))
        if validation.add(number, drawn[-1]) and number:  # before any step there is nothing to go back to
            best = tuning.snapshot()

    try:
        if every:
            validation = judge(draw(False))
            look()
        for step in steps or tuning.steps():
            number = step.number
            if validation and (number % every == 0 or number == tuning.settings.steps):
                look()
            if not watch(step, drawn):
                raise Cancelled
        if validation and validation.scores[-1].step < number:  # a loss that is no number ended it between two looks
            look()
    except Cancelled:
        return Outcome(number, tuning.losses, validation.scores if validation else [], drawn)
    if validation is None:
        return Outcome(number, tuning.losses, [], [])
    if best is not None:
        tuning.restore(best)
    return Outcome(validation.best.step, tuning.losses, validation.scores, drawn)


def check_count(pictures: int) -> None:
    """Refuse a number of pictures that fine-tuning is not made for.

    Raises:
        ValueError: there are none, or too many.
    """
    if not FEWEST <= pictures <= MOST:
        raise ValueError(
            f"There are {pictures} pictures, but a subject is learned from {FEWEST} to {MOST}: choose the 3 to 5 that "
            "show it best."
        )


def check_size(height: int, width: int) -> None:
    """Refuse pictures too small to learn a subject from.

    Raises:
        ValueError: an edge is under 64 pixels.
    """
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"The pictures are {width} x {height} pixels, but a subject's details need {SMALLEST} or more on each "
            "edge: take larger ones."
        )


def draw(latents: Tensor, settings: FinetuneSettings, number: int) -> Draws:
    """Everything random about step ``number``, from the seed alone; each picture comes as often as any other."""
    size = settings.batch_size
    pictures = [_picture_at(len(latents), settings.seed, (number - 1) * size + place) for place in range(size)]
    source = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (size,), generator=source)
    noise = torch.randn(size, *latents.shape[1:], generator=source)
    return Draws(torch.tensor(pictures), timesteps.to(latents.device), noise.to(latents.device))


def _picture_at(count: int, seed: int, place: int) -> int:
    """Which picture comes at a place in the endless sequence of shuffled rounds."""
    which_round, inside = divmod(place, count)
    source = torch.Generator().manual_seed(seed * 1_000_003 - 1 - which_round)
    return int(torch.randperm(count, generator=source)[inside])
