"""The cost of a subject in the sampler: none, because to the U-Net it is 77 tokens like any prompt."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from benchmarks.encoding import PROMPT
from benchmarks.measuring import compare
from benchmarks.table import Row
from tests.host import Host

PAIRS, STEPS = 3, 10
EDGE = 512 if torch.cuda.is_available() else 256  # pixels


def sampling_rows(host: Host, loaded: SimpleNamespace) -> Iterator[Row]:
    """Compare the stock KSampler with a subject in its positive conditioning and without."""
    image = torch.rand(1, 512, 512, 3)
    subject, *_ = host.run("BLIPDiffusionSubjectEncode", qformer=loaded.qformer, image=image, subject_word="dog")
    with_subject, text = host.run("BLIPDiffusionPromptCompose", clip=loaded.clip, subject=subject, prompt=PROMPT)
    (plain,) = host.run("CLIPTextEncode", clip=loaded.clip, text=f"a dog {PROMPT}")
    (negative,) = host.run("CLIPTextEncode", clip=loaded.clip, text="ugly")
    assert with_subject[0][0].shape == plain[0][0].shape  # the same number of tokens

    def sample(positive):
        empty = {"samples": torch.zeros(1, 4, EDGE // 8, EDGE // 8)}
        return host.ddim(loaded.model, positive, negative, empty, STEPS, guidance=7.5, seed=0)

    yield Row(
        f"KSampler with a subject, {STEPS} steps, {EDGE}x{EDGE}",
        "the same graph with CLIP Text Encode",
        compare(lambda: sample(with_subject), lambda: sample(plain), PAIRS),
        "1.00",
    )
