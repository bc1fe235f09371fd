"""From an image and a word to vectors, and from vectors and a prompt to a conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from benchmarks.measuring import compare
from benchmarks.table import Row
from blip_qformer.encoder import SubjectEncoder
from tests.host import Host
from tests.oracle import BlipDiffusionPipeline

PAIRS = {1: 7, 8: 3}  # timed runs by batch size
AIM = {1: "0.85", 8: "0.95"}
PROMPT = "swimming underwater"


def encoder_rows(encoder: SubjectEncoder, pipeline: BlipDiffusionPipeline) -> Iterator[Row]:
    """Compare the subject encoder alone, on 1 and 8 images."""
    for batch, pairs in PAIRS.items():
        pixel_values = torch.randn(batch, 3, 224, 224, device=pipeline.device)
        words = ["dog"] * batch

        def ours(pixel_values=pixel_values, words=words):
            return encoder(pixel_values, words)

        def peer(pixel_values=pixel_values, words=words):
            return pipeline.qformer(image_input=pixel_values, text_input=words, return_dict=False)

        torch.testing.assert_close(ours(), peer(), atol=1e-4, rtol=0)
        yield Row(f"encode, batch {batch}", "diffusers Blip2QFormerModel", compare(ours, peer, pairs), AIM[batch])


def compose_rows(host: Host, loaded: SimpleNamespace, pipeline: BlipDiffusionPipeline) -> Iterator[Row]:
    """Compare our nodes from an image to a conditioning with what the reference's ``__call__`` does."""
    image = torch.rand(1, 512, 512, 3)

    def ours():
        subject, *_ = host.run(
            "BLIPDiffusionSubjectEncode",
            qformer=loaded.qformer,
            image=image,
            subject_word="dog",
            preprocessing="squash",
        )
        return host.run("BLIPDiffusionPromptCompose", clip=loaded.clip, subject=subject, prompt=PROMPT)

    def peer():
        pixel_values = pipeline.image_processor.preprocess(
            [image[0].numpy()],
            image_mean=pipeline.config.mean,
            image_std=pipeline.config.std,
            do_rescale=False,
            return_tensors="pt",
        )["pixel_values"]
        vectors = pipeline.get_query_embeddings(pixel_values.to(pipeline.device), ["dog"])
        return pipeline.encode_prompt(vectors, pipeline._build_prompt([PROMPT], ["dog"]), pipeline.device)

    yield Row(
        "Subject Encode + Subject Prompt Compose",
        "diffusers get_query_embeddings + encode_prompt",
        compare(ours, peer, PAIRS[1]),
        AIM[1],
    )
