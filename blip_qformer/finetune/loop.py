"""Fine-tuning on one subject (arXiv 2305.14720, section 4): 3 to 5 images of it, 40 to 120 steps.

The mean of the images' subject vectors trains, and so does the U-Net or the LoRA beside it; the rest is frozen. The
loop knows neither ComfyUI nor diffusers: it is given the denoiser and the text encoder as functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.noise_schedule import NUM_TRAIN_TIMESTEPS, Denoiser, add_noise
from .snapshots import Snapshots
from .validation import Score, Validation

LOW_RANK, FULL = "low-rank", "full"  # which weights of the U-Net train, as users choose it
LORA_LEARNING_RATE_FACTOR = 20  # the paper's rate suits a whole U-Net; a LoRA begins at zero and has further to go
MIN_IMAGES, MAX_IMAGES = 1, 64
MIN_EDGE = 64  # of an image, in pixels

#: ``vectors [16, width] -> context [1, T, width]``: the caption with the subject in it through the frozen text encoder.
CaptionEncoder = Callable[[Tensor], Tensor]

#: Called after each step with the loss of each step so far, and with the images of each validation so far.
StepCallback = Callable[[Sequence[float], Sequence[Tensor]], None]

BASELINE = "baseline"  # key of a snapshot: images without the subject before any step

log = logging.getLogger("blip_diffusion")


@dataclass(frozen=True)
class FinetuneSettings:
    """Hyperparameters; the defaults are the paper's.

    Args:
        steps: Number of optimizer steps.
        learning_rate: Learning rate of everything that trains; a LoRA gets ``LORA_LEARNING_RATE_FACTOR`` times as much.
        batch_size: Number of latents in a step.
        weight_decay: AdamW's weight decay.
        betas: AdamW's decay rates of the two moments.
        epsilon: AdamW's term for numerical stability.
        seed: Seed of the order of the images, the noise and the timesteps.

    Raises:
        ValueError: If a value would train nothing.
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
    """One finished optimizer step.

    Args:
        number: Number of the step, from 1 on.
        loss: Loss of the step.
    """

    number: int
    loss: float


@dataclass(frozen=True)
class Batch:
    """Everything random about one step.

    Args:
        indices: Indices of the latents, of shape [B].
        timesteps: Timesteps of shape [B].
        noise: Standard normal noise of shape [B, 4, h, w].
    """

    indices: Tensor
    timesteps: Tensor
    noise: Tensor


class SubjectTuning:
    """A fine-tuning in progress; its parameters hold what has been learned so far.

    Args:
        denoiser: The U-Net with the weights that train; it may hold frozen ones too.
        weights: The parameters of the denoiser that train, in whatever precision it computes in.
        vectors: The mean of the images' subject vectors, of shape [16, width].
        latents: The images through the VAE, of shape [N, 4, h, w], scaled as the denoiser expects them.
        encode_caption: Encodes the caption with given subject vectors, differentiable in them.
        settings: Hyperparameters.
        lora: Whether ``weights`` are those of a LoRA.
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
        lora: bool,
    ) -> None:
        self.denoiser, self.encode_caption = denoiser, encode_caption
        self.latents, self.settings = latents, settings
        self.vectors = nn.Parameter(vectors.detach().clone().float())
        self.weights = list(weights)
        weights_lr = settings.learning_rate * (LORA_LEARNING_RATE_FACTOR if lora else 1)
        self.optimizer = torch.optim.AdamW(
            [{"params": self.weights, "lr": weights_lr}, {"params": [self.vectors], "lr": settings.learning_rate}],
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self.losses: list[float] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that train: the denoiser's weights, then the subject vectors."""
        return [*self.weights, self.vectors]

    def steps(self) -> Iterator[Step]:
        """Train, from where it is on, yielding each step when it is done; a caller may stop at any step.

        Training ends before a loss or gradient that is not finite reaches the weights.
        """
        with torch.enable_grad():
            for number in range(len(self.losses) + 1, self.settings.steps + 1):
                loss = self.loss(sample_batch(self.latents, self.settings, number))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if not self._is_finite(loss):
                    log.warning(
                        "Step %d has a loss or gradient that is no number: step %d is kept.", number, number - 1
                    )
                    return
                self.optimizer.step()
                self.losses.append(loss.item())
                yield Step(number, self.losses[-1])

    def loss(self, batch: Batch) -> Tensor:
        """Compute the mean squared error of the predicted noise (arXiv 2006.11239, equation 14).

        Args:
            batch: Latents, timesteps and noise of the step.

        Returns:
            A scalar that gradients flow back from.
        """
        latents = self.latents[batch.indices]  # [B, 4, h, w]
        context = self.encode_caption(self.vectors).expand(len(latents), -1, -1)  # [B, T, width]
        noisy_latents = add_noise(latents, batch.noise, batch.timesteps)
        noise_pred = self.denoiser(noisy_latents, batch.timesteps, context)
        return F.mse_loss(noise_pred.float(), batch.noise)

    def snapshot(self) -> list[Tensor]:
        """Copy the parameters to the CPU."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Put the parameters of a snapshot back.

        Args:
            snapshot: What :meth:`snapshot` returned.
        """
        for parameter, saved in zip(self.parameters, snapshot, strict=True):
            parameter.copy_(saved)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that training changes; what is random in a step depends on the seed and its number alone.

        Returns:
            The parameters themselves, the optimizer's moments and the losses, by names that :meth:`load_state_dict`
            reads.
        """
        tensors = {f"parameters.{index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": moment for name, moment in moments.items()}
        return {**tensors, "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from where a fine-tuning with the same settings was.

        Args:
            tensors: What :meth:`state_dict` returned; others are left alone.
        """
        self.restore([tensors[f"parameters.{index}"] for index in range(len(self.parameters))])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.losses = tensors["losses"].tolist()

    def _is_finite(self, loss: Tensor) -> bool:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        return bool(loss.isfinite() & norms.isfinite().all())


class FinetuneCancelledError(Exception):
    """Raised by the functions that :func:`finetune` is given, when the user has cancelled."""


@dataclass(frozen=True)
class FinetuneResult:
    """The course of a fine-tuning.

    Args:
        kept_step: The step whose weights are in place now; 0 if it was cancelled before any.
        losses: The loss of each step.
        scores: The score of each validation, the first before any step; empty without validation.
        samples: The images of each validation, each of shape [P, 3, H, W] in 0..1.
        cancelled: Whether the user cancelled before the end.
    """

    kept_step: int
    losses: list[float]
    scores: list[Score]
    samples: list[Tensor]
    cancelled: bool = False


def finetune(
    tuning: SubjectTuning,
    *,
    validate_every: int = 0,
    sample: Callable[[bool], Tensor] | None = None,
    make_validation: Callable[[Tensor], Validation] | None = None,
    steps: Iterator[Step] | None = None,
    on_step: StepCallback = lambda losses, samples: None,
    snapshots: Snapshots | None = None,
) -> FinetuneResult:
    """Train to the end, sample validation images on the way, and restore the step whose images scored best.

    Any of the functions may raise :class:`FinetuneCancelledError`: then training ends there with the last step's
    weights.

    Args:
        tuning: The fine-tuning to run.
        validate_every: Number of steps between two validations; 0 means none, and the last step is kept.
        sample: Samples an image for each validation prompt with the weights as they are, with or without the subject in
            the prompt; of shape [P, 3, H, W] in 0..1.
        make_validation: Makes the validation from the images without the subject.
        steps: ``tuning.steps()``, for callers that have to prepare something for each step.
        on_step: Called after each step with the losses and all validation images so far.
        snapshots: Where to go on from, and where to save what is needed to go on. The caller removes them when the
            result is in safety.

    Returns:
        The course of the fine-tuning; the weights of its ``kept_step`` are in place.

    Raises:
        ValueError: If there is to be validation, but nothing to sample or score with.
    """
    validator: _Validator | None = None
    saved = snapshots.load() if snapshots else None
    if saved:
        tuning.load_state_dict(saved)
        log.info("Fine-tuning goes on from its snapshot: step %d of %d.", len(tuning.losses), tuning.settings.steps)
    first = number = len(tuning.losses)

    def state_dict() -> dict[str, Tensor]:
        return {**tuning.state_dict(), **(validator.state_dict() if validator else {})}

    try:
        if validate_every:
            if sample is None or make_validation is None:
                raise ValueError("Validation needs both sample and make_validation.")
            baseline = saved[BASELINE] if saved else sample(False)
            validator = _Validator(tuning, sample, make_validation(baseline), baseline, validate_every)
            if saved:
                validator.load_state_dict(saved)
            validator.validate_if_due(number)
        for step in steps or tuning.steps():
            number = step.number
            if validator:
                validator.validate_if_due(number)
            on_step(tuning.losses, validator.samples if validator else [])
            if snapshots:
                snapshots.save_if_due(state_dict)
        if validator and validator.scores[-1].step < number:  # a loss that is not finite ended it between two
            validator.validate(number)
    except FinetuneCancelledError:
        cancelled, kept_step = True, number
        if snapshots and number > first:
            snapshots.save_cancelled(state_dict())
    else:
        cancelled, kept_step = False, validator.restore_best() if validator else number
    scores, samples = (validator.scores, validator.samples) if validator else ([], [])
    return FinetuneResult(kept_step, tuning.losses, scores, samples, cancelled)


class _Validator:
    """Validates a fine-tuning on the way and keeps a copy of the best step's parameters."""

    def __init__(
        self,
        tuning: SubjectTuning,
        sample: Callable[[bool], Tensor],
        validation: Validation,
        baseline: Tensor,
        every: int,
    ) -> None:
        self.tuning, self.sample, self.validation, self.baseline = tuning, sample, validation, baseline
        self.every = every
        self.samples: list[Tensor] = []
        self._best: list[Tensor] | None = None

    @property
    def scores(self) -> list[Score]:
        return self.validation.scores

    def validate_if_due(self, number: int) -> None:
        """Validate after step ``number``, unless it is none of those to validate, or one that was validated."""
        is_due = number % self.every == 0 or number == self.tuning.settings.steps
        if is_due and not (self.scores and self.scores[-1].step == number):
            self.validate(number)

    def validate(self, number: int) -> None:
        """Sample and score images after step ``number``; 0 is before any."""
        samples = self.sample(True)
        is_best = self.validation.add(number, samples)
        self.samples.append(samples)  # only now: whoever cancels in between leaves as many images as scores
        if is_best and number:  # before any step there is nothing to go back to
            self._best = self.tuning.snapshot()

    def restore_best(self) -> int:
        """Put the best step's parameters back; returns its number."""
        if self._best is not None:
            self.tuning.restore(self._best)
        return self.validation.best.step

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was sampled, scored and kept, by names that :meth:`load_state_dict` reads."""
        scores = [(score.step, score.likeness, score.agreement) for score in self.scores]
        best = {f"best.{index}": parameter for index, parameter in enumerate(self._best or [])}
        tensors = {BASELINE: self.baseline, "samples": torch.stack(self.samples)}
        return {**tensors, "scores": torch.tensor(scores, dtype=torch.float64), **best}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` returned; other tensors are left alone."""
        self.samples = list(tensors["samples"])
        self.scores[:] = [Score(int(step), *scores) for step, *scores in tensors["scores"].tolist()]
        if "best.0" in tensors:
            self._best = [tensors[f"best.{index}"] for index in range(len(self.tuning.parameters))]


def sample_batch(latents: Tensor, settings: FinetuneSettings, number: int) -> Batch:
    """Sample everything random about a step from the seed alone; no image comes more often than another.

    Args:
        latents: All latents, of shape [N, 4, h, w].
        settings: Hyperparameters, of which the seed and the batch size matter here.
        number: Number of the step, from 1 on.

    Returns:
        The batch, timesteps and noise on the device of the latents.
    """
    size = settings.batch_size
    first = (number - 1) * size
    indices = [_image_index(len(latents), settings.seed, position) for position in range(first, first + size)]
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (size,), generator=generator)
    noise = torch.randn(size, *latents.shape[1:], generator=generator)
    return Batch(torch.tensor(indices), timesteps.to(latents.device), noise.to(latents.device))


def check_count(images: int) -> None:
    """Refuse a number of images that fine-tuning is not made for.

    Args:
        images: Number of images.

    Raises:
        ValueError: If there are none, or too many.
    """
    if not MIN_IMAGES <= images <= MAX_IMAGES:
        raise ValueError(
            f"There are {images} pictures, but a subject is learned from {MIN_IMAGES} to {MAX_IMAGES}: choose the 3 "
            "to 5 that show it best."
        )


def check_size(height: int, width: int) -> None:
    """Refuse images too small to learn a subject from.

    Args:
        height: Height in pixels.
        width: Width in pixels.

    Raises:
        ValueError: If an edge is shorter than 64 pixels.
    """
    if min(height, width) < MIN_EDGE:
        raise ValueError(
            f"The pictures are {width} x {height} pixels, but a subject's details need {MIN_EDGE} or more on each "
            "edge: take larger ones."
        )


def _image_index(count: int, seed: int, position: int) -> int:
    """Index of the image at a position of the endless sequence of shuffled epochs."""
    epoch, index = divmod(position, count)
    generator = torch.Generator().manual_seed(seed * 1_000_003 - 1 - epoch)
    return int(torch.randperm(count, generator=generator)[index])
