"""Show every kind of edit before and after on one sheet, and measure what it does to the background.

    python -m benchmarks.edits CHECKPOINT IMAGE WORD OUTPUT

It needs a trained model; the prompts are those of the small world.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.table import markdown_table
from blip_qformer.imaging.contact_sheet import contact_sheet
from tests.host import Host, load_host

PROMPT = "on the grass"
EDGE, GUIDANCE, SEED = 256, 5.0, 3
STEPS, INVERSION_STEPS = 20, 50
SHEET, REPORT = "edits.png", "edits.md"


@dataclass(frozen=True)
class Setup:
    """One model in the host, one subject, and one noise for all images.

    Attributes:
        host: The loaded host.
        loaded: MODEL, CLIP and VAE of the model.
        subject: BLIP_SUBJECT of the subject.
        negative: CONDITIONING of the empty prompt.
    """

    host: Host
    loaded: SimpleNamespace
    subject: Any
    negative: Any

    @classmethod
    def load(cls, host: Host, checkpoint: str, image: Tensor, word: str) -> Setup:
        """Load a model and encode a subject.

        Args:
            host: The loaded host.
            checkpoint: Name of the model in the host's folder.
            image: Image of the subject, of shape [1, H, W, 3] in 0..1.
            word: What the subject is.
        """
        model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint=checkpoint)
        loaded = SimpleNamespace(model=model, clip=clip, vae=vae)
        subject, *_ = host.run("BLIPDiffusionSubjectEncode", qformer=qformer, image=image, subject_word=word)
        (negative,) = host.run("CLIPTextEncode", clip=clip, text="")
        return cls(host, loaded, subject, negative)

    def encode(self, strength: float, target: str = "") -> Any:
        """Return a conditioning that knows its words; strength 0 leaves the subject out."""
        settings = {"prompt": PROMPT, "target_subject": target, "repetitions": 1, "subject_strength": strength}
        return self.host.run("BLIPDiffusionPromptCompose", clip=self.loaded.clip, subject=self.subject, **settings)[0]

    def sample(self, positive: Any, latent: Any = None) -> dict:
        """Return the LATENT of a conditioning, from the one noise; for an empty latent of one image by default."""
        latent = latent or {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}
        return self.host.ddim(self.loaded.model, positive, self.negative, latent, STEPS, guidance=GUIDANCE, seed=SEED)

    def edit(self, source: Any, edited: Any, **settings: Any) -> dict:
        """Return the LATENT of source and edited image, sampled as one batch."""
        latent = {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}
        positive, latent, _ = self.host.run(
            "BLIPDiffusionPromptToPrompt", source=source, edited=edited, latent=latent, **settings
        )
        return self.sample(positive, latent)

    def reweight(self, conditioning: Any, weights: str) -> Any:
        """Return a conditioning with weights on its words."""
        return self.host.run("BLIPDiffusionAttentionReweight", conditioning=conditioning, weights=weights)[0]

    def decode(self, latent: dict) -> Tensor:
        """Return the images [B, H, W, 3] of a LATENT."""
        return self.host.run("VAEDecode", samples=latent, vae=self.loaded.vae)[0]


def edit_all(setup: Setup, image: Tensor, word: str) -> tuple[list[tuple[str, Tensor]], list[tuple[str, str]]]:
    """Sample every kind of edit, and measure the background and the inversion.

    Args:
        setup: Model, subject and noise.
        image: Image of the subject, of shape [1, H, W, 3] in 0..1.
        word: What the subject is.

    Returns:
        The name of each edit with its images before and after, of shape [2, H, W, 3]; and the measurements with their
        names.
    """
    plain, with_subject = setup.encode(0.0), setup.encode(1.0)
    other = setup.encode(0.0, target="dog")
    refined = setup.edit(plain, with_subject)
    blended = setup.edit(plain, with_subject, blend_words="<subject>", source_blend_words=word.split()[-1])
    shown = [
        ("swap", setup.decode(setup.edit(other, plain))),
        ("refine: the subject inserted", setup.decode(refined)),
        ("refine, only where it looks", setup.decode(blended)),
        ("replace, its shape kept", setup.decode(setup.edit(plain, with_subject, cross_end=1.0, self_end=0.8))),
    ]
    subject = setup.decode(setup.sample(with_subject))
    # Weights on the word of the place change almost nothing: in the small model <end> carries it.
    for weights in ("<end>:3", "<end>:0", "<subject>:2", "<subject>:0.3"):
        reweighted = setup.decode(setup.sample(setup.reweight(with_subject, weights)))
        shown.append((f"re-weight {weights}", torch.cat([subject, reweighted])))
    (mask,) = setup.host.run("BLIPDiffusionEditMask", latent=blended)
    return shown, [
        ("background outside the mask: change with blend / without", f"{kept_background(shown, mask):.3f}"),
        (
            f"inversion, {INVERSION_STEPS} steps: PSNR of the given picture drawn again",
            f"{inversion_psnr(setup, image):.1f} dB",
        ),
    ]


def kept_background(shown: list[tuple[str, Tensor]], mask: Tensor) -> float:
    """Return the mean change outside the mask with local blend, divided by the one without.

    Args:
        shown: What :func:`edit_all` returns.
        mask: Mask of the edit with local blend, of shape [1, H, W].
    """
    by_name = dict(shown)
    outside = (mask[0] == 0)[..., None].float()
    changes = [
        float(((after - before).abs() * outside).mean())
        for before, after in (by_name["refine, only where it looks"], by_name["refine: the subject inserted"])
    ]
    return changes[0] / max(changes[1], 1e-9)


def inversion_psnr(setup: Setup, image: Tensor) -> float:
    """Return the PSNR, in decibels, of an image that DDIM Inversion inverts and KSampler (Advanced) samples again.

    Args:
        setup: Model, subject and noise.
        image: Image of shape [1, H, W, 3] in 0..1.
    """
    square = F.interpolate(image.movedim(-1, 1), (EDGE, EDGE), mode="area").movedim(1, -1)
    prompt = setup.encode(1.0)
    (encoded,) = setup.host.run("VAEEncode", pixels=square, vae=setup.loaded.vae)
    inverted, _ = setup.host.run(
        "BLIPDiffusionDDIMInversion",
        model=setup.loaded.model,
        conditioning=prompt,
        latent=encoded,
        steps=INVERSION_STEPS,
    )
    (again,) = setup.host.run(
        "KSamplerAdvanced",
        model=setup.loaded.model,
        positive=prompt,
        negative=setup.negative,
        latent_image=inverted,
        add_noise="disable",
        noise_seed=0,
        steps=INVERSION_STEPS,
        cfg=1.0,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        start_at_step=0,
        end_at_step=10000,
        return_with_leftover_noise="disable",
    )
    error = (setup.decode(again) - square).square().mean()
    return float(-10 * error.log10())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edits", description="Every edit before and after.")
    parser.add_argument("checkpoint", type=Path, help="a model in the Hub layout")
    parser.add_argument("image", type=Path, help="of the subject")
    parser.add_argument("word", help="what it shows")
    parser.add_argument("output", type=Path, help=f"the folder for {SHEET} and {REPORT}")
    chosen = parser.parse_args()
    image = torch.from_numpy(np.asarray(Image.open(chosen.image).convert("RGB"), np.float32) / 255)[None]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        host = load_host(Path(folder))
        link = host.base / "models" / "blip_diffusion" / "model"
        link.symlink_to(chosen.checkpoint.resolve())
        shown, measured = edit_all(Setup.load(host, link.name, image, chosen.word), image, chosen.word)
    images = torch.cat([pair for _, pair in shown])
    labels = [label for name, _ in shown for label in (f"{name}: before", "after")]
    chosen.output.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(images, labels=labels, columns=4)[0]
    Image.fromarray((sheet * 255).round().byte().numpy()).save(chosen.output / SHEET)
    text = markdown_table(("what", "measured"), measured)
    (chosen.output / REPORT).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
