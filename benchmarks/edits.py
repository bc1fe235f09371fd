"""Every kind of edit before and after on one sheet, and what it does to the background:

    python -m benchmarks.edits CHECKPOINT PICTURE WORD OUTPUT

It asks for a model whose pictures mean something; the prompts are those of the small world.
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

PLACE = "on the grass"
EDGE, GUIDANCE, SEED = 256, 5.0, 3
STEPS, INVERSION_STEPS = 20, 50
SHEET, REPORT = "edits.png", "edits.md"


@dataclass(frozen=True)
class Studio:
    """One model in the host, one subject, and one noise for all pictures."""

    host: Host
    loaded: SimpleNamespace
    subject: Any
    negative: Any

    @classmethod
    def open(cls, host: Host, checkpoint: str, picture: Tensor, word: str) -> Studio:
        """Args: picture: [1, H, W, 3] of the subject; word: what it is."""
        model, clip, vae, qformer = host.run("BLIPDiffusionLoader", checkpoint=checkpoint)
        loaded = SimpleNamespace(model=model, clip=clip, vae=vae)
        subject, *_ = host.run("BLIPDiffusionSubjectEncode", qformer=qformer, image=picture, subject_word=word)
        (negative,) = host.run("CLIPTextEncode", clip=clip, text="")
        return cls(host, loaded, subject, negative)

    def prompt(self, strength: float, target: str = "", place: str = PLACE) -> Any:
        """A conditioning that knows its words; strength 0 leaves the subject out."""
        settings = {"prompt": place, "target_subject": target, "repetitions": 1, "subject_strength": strength}
        return self.host.run("BLIPDiffusionPromptCompose", clip=self.loaded.clip, subject=self.subject, **settings)[0]

    def draw(self, positive: Any, latent: Any = None, steps: int = STEPS) -> dict:
        """Draw a conditioning from the one noise, or a latent as it is."""
        latent = latent or {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}
        return self.host.ddim(self.loaded.model, positive, self.negative, latent, steps, guidance=GUIDANCE, seed=SEED)

    def edit(self, source: Any, edited: Any, **settings: Any) -> dict:
        """Source and edit as one batch, drawn."""
        latent = {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}
        positive, latent = self.host.run(
            "BLIPDiffusionPromptToPrompt", source=source, edited=edited, latent=latent, **settings
        )
        return self.draw(positive, latent)

    def reweight(self, conditioning: Any, weights: str) -> Any:
        """The conditioning with words louder or quieter."""
        return self.host.run("BLIPDiffusionAttentionReweight", conditioning=conditioning, weights=weights)[0]

    def pictures(self, latent: dict) -> Tensor:
        """A latent -> pictures [B, H, W, 3]."""
        return self.host.run("VAEDecode", samples=latent, vae=self.loaded.vae)[0]


def edits(studio: Studio, picture: Tensor, word: str) -> tuple[list[tuple[str, Tensor]], list[tuple[str, str]]]:
    """Pairs (before, after) by name, and the figures."""
    plain, with_subject = studio.prompt(0.0), studio.prompt(1.0)
    other = studio.prompt(0.0, target="dog")
    last_word = PLACE.split()[-1]
    refined = studio.edit(plain, with_subject)
    blended = studio.edit(plain, with_subject, blend_words="<subject>", source_blend_words=word.split()[-1])
    shown = [
        ("swap", studio.pictures(studio.edit(other, plain))),
        ("refine: the subject inserted", studio.pictures(refined)),
        ("refine, only where it looks", studio.pictures(blended)),
        ("replace, its shape kept", studio.pictures(studio.edit(plain, with_subject, cross_end=1.0, self_end=0.8))),
    ]
    subject = studio.pictures(studio.draw(with_subject))
    for weights in (f"{last_word}:3", f"{last_word}:0", "<subject>:2", "<subject>:0.3"):
        drawn = studio.pictures(studio.draw(studio.reweight(with_subject, weights)))
        shown.append((f"re-weight {weights}", torch.cat([subject, drawn])))
    (mask,) = studio.host.run("BLIPDiffusionEditMask", latent=blended)
    return shown, [
        ("background outside the mask: change with blend / without", f"{kept_background(shown, mask):.3f}"),
        (
            f"inversion, {INVERSION_STEPS} steps: PSNR of the given picture drawn again",
            f"{inversion_psnr(studio, picture):.1f} dB",
        ),
    ]


def kept_background(shown: list[tuple[str, Tensor]], mask: Tensor) -> float:
    """Outside the mask, the mean change that local blend leaves, over the change without it."""
    by_name = dict(shown)
    outside = (mask[0] == 0)[..., None].float()
    changes = [
        float(((after - before).abs() * outside).mean())
        for before, after in (by_name["refine, only where it looks"], by_name["refine: the subject inserted"])
    ]
    return changes[0] / max(changes[1], 1e-9)


def inversion_psnr(studio: Studio, picture: Tensor) -> float:
    """A picture [1, H, W, 3] inverted by DDIM Inversion and drawn again by KSampler (Advanced), in decibels."""
    square = F.interpolate(picture.movedim(-1, 1), (EDGE, EDGE), mode="area").movedim(1, -1)
    prompt = studio.prompt(1.0)
    (encoded,) = studio.host.run("VAEEncode", pixels=square, vae=studio.loaded.vae)
    inverted, _ = studio.host.run(
        "BLIPDiffusionDDIMInversion",
        model=studio.loaded.model,
        conditioning=prompt,
        latent=encoded,
        steps=INVERSION_STEPS,
    )
    (again,) = studio.host.run(
        "KSamplerAdvanced",
        model=studio.loaded.model,
        positive=prompt,
        negative=studio.negative,
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
    error = (studio.pictures(again) - square).square().mean()
    return float(-10 * error.log10())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edits", description="Every edit before and after.")
    parser.add_argument("checkpoint", type=Path, help="a model in the Hub layout")
    parser.add_argument("picture", type=Path, help="of the subject")
    parser.add_argument("word", help="what it shows")
    parser.add_argument("output", type=Path, help=f"the folder for {SHEET} and {REPORT}")
    chosen = parser.parse_args()
    picture = torch.from_numpy(np.asarray(Image.open(chosen.picture).convert("RGB"), np.float32) / 255)[None]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        host = load_host(Path(folder))
        placed = host.base / "models" / "blip_diffusion" / "model"
        placed.symlink_to(chosen.checkpoint.resolve())
        shown, figures = edits(Studio.open(host, placed.name, picture, chosen.word), picture, chosen.word)
    pictures = torch.cat([pair for _, pair in shown])
    labels = [label for name, _ in shown for label in (f"{name}: before", "after")]
    chosen.output.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(pictures, labels=labels, columns=4)[0]
    Image.fromarray((sheet * 255).round().byte().numpy()).save(chosen.output / SHEET)
    text = markdown_table(("what", "measured"), figures)
    (chosen.output / REPORT).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
