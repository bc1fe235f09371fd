"""One noise for every picture of a batch."""

from __future__ import annotations

Latent = dict  # the host's: "samples" [B, C, H, W], and perhaps "noise_mask" and "batch_index"


def repeat_with_same_noise(latent: Latent, rows: int) -> Latent:
    """A latent's first picture ``rows`` times; the sampler gives all of them the noise that it gives the first.

    The host counts noise by ``batch_index``: equal numbers get equal noise.
    """
    samples = latent["samples"][:1]
    repeated = {**latent, "samples": samples.repeat(rows, *[1] * (samples.ndim - 1))}
    repeated["batch_index"] = list(latent.get("batch_index", [0]))[:1] * rows
    if "noise_mask" in latent:
        repeated["noise_mask"] = latent["noise_mask"][:1]
    return repeated
