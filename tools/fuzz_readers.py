"""Every reader of files from elsewhere, with a valid file for it: what the fuzz run damages and reads."""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import itertools
import json
import logging
import random
import shutil
import tarfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from blip_qformer import Subject
from blip_qformer.checkpoint import load_subject_encoder, open_checkpoint, save_qformer
from blip_qformer.checkpoint.layouts import lavis
from blip_qformer.checkpoint.ldm_config import controlnet_config, text_encoder_config, unet_config, vae_config
from blip_qformer.checkpoint.ldm_keys import network_to_ldm
from blip_qformer.cli import inspect as inspect_command
from blip_qformer.cli.pretrain import read_run
from blip_qformer.data.photographs import parse_annotation
from blip_qformer.data.prepare import SkippedPairError
from blip_qformer.data.shards import find_shards, write_shard
from blip_qformer.data.stream import PairStream
from blip_qformer.finetune.lora import LoRA
from blip_qformer.imaging.image_files import open_upright
from blip_qformer.imaging.segmentation import Segmenter
from blip_qformer.pipeline import load_pipeline, new_pipeline, save_pipeline
from blip_qformer.pipeline.pipeline import load_tokenizer
from blip_qformer.subject.file import load_subject, save_subject
from blip_qformer.subject.preview import checked_preview, make_preview
from tests.clipseg import write_clipseg
from tests.tiny import SIZES, make_pair

from .fuzz_mutations import (
    Mutation,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_pickle,
    mutate_safetensors,
    mutate_yaml,
)

RUNS = Path(__file__).parent.parent / "blip_qformer" / "training" / "runs" / "blip_diffusion"


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Args:
        name: Its name, for the report.
        file: A valid file, which is damaged and made whole again.
        read: Reads it as users do.
        mutate: Damages its content.
        weight: How often it is chosen, in relation to the others; less where a reader is slow.
    """

    name: str
    file: Path
    read: Callable[[], object]
    mutate: Mutation
    weight: float = 4


def make_targets(folder: Path) -> list[Target]:
    """Write a valid file of every kind, small and the same each time.

    Args:
        folder: An empty folder.
    """
    logging.disable(logging.WARNING)
    return [*_checkpoints(folder), *_subjects(folder), *_training(folder), *_clipseg(folder)]


def _checkpoints(folder: Path) -> list[Target]:
    sizes = copy.deepcopy(SIZES)
    sizes["qformer"]["vocabulary_size"] = sizes["text_encoder"]["vocabulary_size"] = 64
    pipeline = new_pipeline(sizes, seed=0)
    hub = save_pipeline(pipeline, folder / "hub")
    encoder = open_checkpoint(hub)
    single = folder / "single" / "blip2_qformer.safetensors"
    single.parent.mkdir()
    save_qformer(single, encoder.encoder_state_dict, encoder.encoder_config, dtype=None)
    theirs = lavis.KEY_MAP.to_file(pipeline.encoder.state_dict())
    projection = {key.removeprefix("proj_layer."): theirs.pop(key) for key in list(theirs) if "proj_layer." in key}
    original = folder / "original"
    for name, weights in (("blip_model/blip_weight.pt", theirs), ("proj_layer/proj_weight.pt", projection)):
        (original / name).parent.mkdir(parents=True)
        torch.save(weights, original / name)
    shutil.copytree(hub / "unet", original / "unet")
    tuned = folder / "tuned" / "checkpoint_40.pth"
    tuned.parent.mkdir()
    vectors = {"ctx_embeddings_cache": torch.zeros(1, 16, 32)}
    prefixed = {f"blip.{key}": tensor for key, tensor in theirs.items()}
    prefixed |= {f"proj_layer.{key}": tensor for key, tensor in projection.items()}
    torch.save({"model": {**prefixed, **vectors}, "epoch": 40}, tuned)
    legacy = folder / "legacy" / "checkpoint_40.pth"
    legacy.parent.mkdir()
    torch.save({"model": {**prefixed, **vectors}}, legacy, _use_new_zipfile_serialization=False)

    networks = partial(_read_networks, hub)
    targets = [
        Target("Q-Former, one .safetensors", single, lambda: load_subject_encoder(single), mutate_safetensors, 12),
        Target("Q-Former, LAVIS pickle", original / "blip_model" / "blip_weight.pt",
               lambda: load_subject_encoder(original), mutate_pickle, 8),
        Target("projection, LAVIS pickle", original / "proj_layer" / "proj_weight.pt",
               lambda: load_subject_encoder(original), mutate_pickle),
        Target("fine-tuned .pth", tuned, lambda: load_subject_encoder(tuned), mutate_pickle, 8),
        Target("fine-tuned .pth, before torch 1.6", legacy, lambda: load_subject_encoder(legacy), mutate_bytes),
        Target("Q-Former of a Hub folder", next((hub / "qformer").glob("*.safetensors")),
               lambda: load_subject_encoder(hub), mutate_safetensors),
        Target("Q-Former's config.json", hub / "qformer" / "config.json",
               lambda: load_subject_encoder(hub), mutate_json, 8),
        Target("model_index.json", hub / "model_index.json", lambda: load_subject_encoder(hub), mutate_json, 2),
    ]  # fmt: skip
    for name in ("unet", "vae", "text_encoder"):
        weights = next((hub / name).glob("*.safetensors"))
        targets += [
            Target(f"{name}: weights", weights, networks, mutate_safetensors, 2),
            Target(f"{name}: config.json", hub / name / "config.json", networks, mutate_json, 2),
            Target(f"{name}: config.json, for training", hub / name / "config.json",
                   lambda: load_pipeline(hub), mutate_json, 0.3),
        ]  # fmt: skip
    for name in ("vocab.json", "merges.txt"):
        file = hub / "tokenizer" / name
        targets.append(Target(f"tokenizer: {name}", file, lambda: load_tokenizer(hub / "tokenizer"), mutate_bytes, 1))
    lora = folder / "lora" / "lora.safetensors"
    lora.parent.mkdir()
    save_file(LoRA(pipeline.unet, rank=2).state_dict(), lora)
    targets.append(Target("LoRA, looked at", lora, lambda: _inspect(lora), mutate_safetensors, 3))
    return targets


def _read_networks(folder: Path) -> None:
    """Read what Load BLIP-Diffusion reads of U-Net, VAE and text encoder before the host builds them."""
    sizes = {
        "unet": unet_config,
        "vae": vae_config,
        "text_encoder": text_encoder_config,
        "controlnet": controlnet_config,
    }
    checkpoint = open_checkpoint(folder)
    for name in ("unet", "vae", "text_encoder"):
        component = checkpoint.require(name)
        try:
            network_to_ldm(name, component.weights(), component.config)
            sizes[name](component.state_dict())
        except ValueError as error:  # the nodes put the file's name before it
            raise ValueError(f"{component.path}: {error}") from error


def _inspect(path: Path) -> None:
    with redirect_stdout(io.StringIO()):
        inspect_command.inspect(argparse.Namespace(path=path))


def _subjects(folder: Path) -> list[Target]:
    ours, plain = folder / "subjects" / "rex.safetensors", folder / "subjects" / "plain.safetensors"
    ours.parent.mkdir()
    preview = make_preview(torch.linspace(0, 1, 64).expand(1, 3, 64, 64))
    save_subject(ours, Subject(torch.zeros(1, 16, 64), "dog", "12ab", "34cd", preview))
    picture = folder / "subjects" / "rex.jpg"  # what stands in the header, in its own bytes
    picture.write_bytes(preview)
    save_file({"emb_params": torch.zeros(16, 64)}, plain)
    return [
        Target("subject", ours, lambda: load_subject(ours), mutate_safetensors, 14),
        Target("preview of a subject", picture, lambda: checked_preview(picture.read_bytes()), mutate_bytes, 8),
        Target("textual inversion", plain, lambda: load_subject(plain, "dog"), mutate_safetensors, 10),
    ]


def _training(folder: Path) -> list[Target]:
    runs, pairs, photographs = folder / "runs", folder / "pairs", folder / "photographs"
    for each in (runs, pairs, photographs):
        each.mkdir()
    run = Path(shutil.copy(RUNS / "stage2.yaml", runs))
    write_shard(pairs / "a.tar", map(make_pair, range(3)))
    (folder / "zipped").mkdir()
    zipped = folder / "zipped" / "a.tar.gz"
    zipped.write_bytes(gzip.compress((pairs / "a.tar").read_bytes(), mtime=0))
    indexed = folder / "indexed"
    indexed.mkdir()
    shutil.copy(pairs / "a.tar", indexed)
    index = indexed / "index.json"
    index.write_text(json.dumps({"complete": True, "pairs": 3, "settings": {"seed": 0}, "shards": {"a.tar": 3}}))
    metadata = photographs / "metadata.jsonl"
    line = {"file": "0a1b.jpg", "word": "dog", "caption": "a dog", "box": [0.1, 0.2, 0.8, 0.9], "mask": "m/0.png"}
    metadata.write_text("\n".join([json.dumps(line)] * 3))
    image = photographs / "dog.webp"
    Image.fromarray(torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()).save(image)
    png = photographs / "dog.png"
    Image.open(image).save(png)
    return [
        Target("run file", run, lambda: read_run(run), mutate_yaml, 8),
        Target("shard", pairs / "a.tar", lambda: _read_pairs(pairs / "a.tar"), _mutate_tar, 8),
        Target("shard, gzip", zipped, lambda: _read_pairs(zipped), _mutate_gzip),
        Target("index.json", index, lambda: find_shards(indexed), mutate_json, 10),
        Target("metadata.jsonl", metadata, lambda: _read_lines(metadata), mutate_lines, 10),
        Target("photograph, WebP", image, lambda: open_upright(image), mutate_bytes, 8),
        Target("photograph, PNG", png, lambda: open_upright(png), mutate_bytes, 8),
    ]


def _clipseg(folder: Path) -> list[Target]:
    clipseg = write_clipseg(folder / "clipseg")
    return [
        Target("CLIPSeg: config.json", clipseg / "config.json", lambda: Segmenter(clipseg), mutate_json, 0.3),
        Target("CLIPSeg: weights", clipseg / "model.safetensors", lambda: Segmenter(clipseg), mutate_safetensors, 0.3),
    ]


def _read_pairs(shard: Path) -> None:
    [*itertools.islice(iter(PairStream(str(shard), shuffle_buffer=0)), 4)]


def _read_lines(file: Path) -> None:
    """Read lines as ``prepare`` does: a bad one is skipped, and does not end the others."""
    for line in file.read_bytes().splitlines():
        try:
            parse_annotation(line)
        except SkippedPairError:
            continue


def _mutate_tar(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, a member, or add a member that claims gigabytes."""
    if rng.random() < 0.5:
        return mutate_bytes(content, rng)
    stream = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as source, tarfile.open(fileobj=stream, mode="w") as target:
        for member in source:
            file = source.extractfile(member)
            data = file.read() if file else b""
            if member.name.endswith(".json") and rng.random() < 0.5:
                data = mutate_json(data, rng)
            if rng.random() < 0.1:
                member.name = rng.choice(("../x.json", "/etc/x.json", "a" * 5000 + ".json", "0000.json", ".json", "\n"))
            if rng.random() < 0.05:
                member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(8 * 2**30), "size": "1" * 30}
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    data = bytearray(stream.getvalue())
    if (
        rng.random() < 0.5
    ):  # a header that claims 8 GB, with a right checksum, perhaps of a sparse or a long-name member
        info = tarfile.TarInfo("0000.json")
        info.size = 8 * 2**30 - 1
        info.type = rng.choice((tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE))
        header = info.tobuf(tarfile.GNU_FORMAT)
        at = rng.choice((0, max(0, len(data) - 1024)))
        data[at:at] = header
    return bytes(data)


def _mutate_gzip(content: bytes, rng: random.Random) -> bytes:
    """Change bytes before or after packing, or pack a hundred megabytes of zeros as one member."""
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    if rng.random() < 0.9:
        return gzip.compress(_mutate_tar(gzip.decompress(content), rng), mtime=0)
    return BOMB


def _bomb() -> bytes:
    info = tarfile.TarInfo("0000.json")
    info.size = 100_000_000
    return gzip.compress(info.tobuf() + bytes(info.size), compresslevel=6, mtime=0)


BOMB = _bomb()
