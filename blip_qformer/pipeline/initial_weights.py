"""The model from which the paper's first stage starts, made of published ones (arXiv 2305.14720).

    python -m blip_qformer.pipeline.initial_weights CLIP BERT STABLE_DIFFUSION DST

The image encoder is CLIP's without its last block. The Q-Former is BERT with new cross-attention and query tokens, and
its feed-forward layers for queries start as copies of those for text. U-Net, text encoder, VAE and tokenizer are Stable
Diffusion's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.components import find_components
from ..checkpoint.key_map import KeyMap, qformer_keys
from ..checkpoint.read_tensors import SAFETENSORS, TENSOR_FILES, read_config, read_tensors
from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from .new import init_weights
from .pipeline import COMPONENT_KINDS, Pipeline, build_text_encoder, build_unet, build_vae, load_tokenizer
from .save import save_pipeline

_CLIP_LAYER, _OUR_LAYER = "encoder.layers.{}", "blocks.{}"

CLIP_KEYS = KeyMap(
    {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "position_embedding",
        "pre_layrnorm": "pre_norm",  # the published spelling
        f"{_CLIP_LAYER}.layer_norm1": f"{_OUR_LAYER}.attention_norm",
        f"{_CLIP_LAYER}.self_attn.qkv": f"{_OUR_LAYER}.attention.query_key_value",
        f"{_CLIP_LAYER}.self_attn.out_proj": f"{_OUR_LAYER}.attention.output",
        f"{_CLIP_LAYER}.layer_norm2": f"{_OUR_LAYER}.feed_forward_norm",
        f"{_CLIP_LAYER}.mlp.fc1": f"{_OUR_LAYER}.expand",
        f"{_CLIP_LAYER}.mlp.fc2": f"{_OUR_LAYER}.contract",
    }
)

BERT_KEYS = KeyMap(qformer_keys(prefix="", attention="self"))
BERT_UNUSED_KEYS = ("position_ids", "token_type_embeddings.weight")  # a Q-Former's text is one segment
BERT_OLD_NORMS = {".gamma": ".weight", ".beta": ".bias"}  # in BERT's first files

#: Fields that a published CLIP's config leaves out, because they are transformers' defaults.
CLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def initial_pipeline(clip: Path, bert: Path, stable_diffusion: Path, seed: int = 0) -> Pipeline:
    """Make the initial model.

    Args:
        clip: Folder of a CLIP, or of its vision model alone, in transformers' layout.
        bert: Folder of a BERT in transformers' layout.
        stable_diffusion: Folder of Stable Diffusion in diffusers' layout.
        seed: Seed of the new weights.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ValueError: A folder lacks something, or holds another model.
    """
    encoder = initial_encoder(clip, bert, seed)
    found, problems = find_components(stable_diffusion)
    if missing := [name for name, kind in COMPONENT_KINDS.items() if kind not in found]:
        raise ValueError(" ".join([f"{stable_diffusion} has no {', '.join(missing)}: choose a whole one.", *problems]))
    text_encoder = build_text_encoder(found[COMPONENT_KINDS["text_encoder"]])
    unet, vae = build_unet(found[COMPONENT_KINDS["unet"]]), build_vae(found[COMPONENT_KINDS["vae"]])
    tokenizer = load_tokenizer(stable_diffusion / "tokenizer")
    pipeline = Pipeline(encoder, text_encoder, unet, vae, tokenizer)
    pipeline.check_widths()
    return pipeline


def initial_encoder(clip: Path, bert: Path, seed: int = 0) -> SubjectEncoder:
    """Make the initial subject encoder.

    Args:
        clip: Folder of a CLIP, or of its vision model alone, in transformers' layout.
        bert: Folder of a BERT in transformers' layout.
        seed: Seed of the new weights.

    Returns:
        The subject encoder, in float32 on the CPU.

    Raises:
        ValueError: A folder has no weights, or those of another model.
    """
    vision, vision_weights = _read_vision(clip)
    config = _read_config(bert)
    qformer = QFormerConfig(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        feed_forward_width=config["intermediate_size"],
        vocabulary_size=config["vocab_size"] + 1,  # [DEC]
        text_positions=config["max_position_embeddings"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SubjectEncoder(SubjectEncoderConfig(vision, qformer, 4 * qformer.width))
        init_weights(encoder, qformer.width)
    _load_some(encoder, {f"vision.{name}": weight for name, weight in vision_weights.items()}, clip)
    _load_some(encoder, _read_qformer(bert, encoder.qformer.word_embedding.weight), bert)
    return encoder


def _read_vision(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read CLIP's image encoder under our keys, without its last block and the norm behind it, which is new."""
    config = _read_config(folder)
    config = CLIP_DEFAULTS | config.get("vision_config", config)
    layers = config["num_hidden_layers"] - 1
    prefix = "vision_model."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in _read_weights(folder).items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    for layer in range(layers):
        attention = f"encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            projections = [weights.pop(f"{attention}.{name}_proj.{kind}") for name in "qkv"]  # each [width, ...]
            weights[f"{attention}.qkv.{kind}"] = torch.cat(projections)  # [3 * width, ...]
    unused = (f"encoder.layers.{layers}.", "post_layernorm.")
    named = CLIP_KEYS.to_encoder({name: w for name, w in weights.items() if not name.startswith(unused)}, folder)
    named["class_embedding"] = named["class_embedding"][None, None]
    named["position_embedding"] = named["position_embedding"][None]
    vision = VisionConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        feed_forward_width=config["intermediate_size"],
    )
    return vision, named


def _read_qformer(folder: Path, word_embedding: Tensor) -> dict[str, Tensor]:
    """Read BERT under our keys; tokens that it lacks keep their rows of ``word_embedding`` [vocabulary, width]."""
    weights = {}
    for name, weight in _read_weights(folder).items():
        for old, new in BERT_OLD_NORMS.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        name = name.removeprefix("bert.")
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith(BERT_UNUSED_KEYS):
            weights[name] = weight
    named = BERT_KEYS.to_encoder(weights, folder)
    words = named["qformer.word_embedding.weight"]
    named["qformer.word_embedding.weight"] = torch.cat([words, word_embedding.detach()[len(words) :]])
    queries = {n.replace("text_feed", "query_feed"): w for n, w in named.items() if "text_feed_forward" in n}
    return named | queries


def _load_some(encoder: SubjectEncoder, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Load weights into an encoder, which keeps its own for all other keys.

    Raises:
        ValueError: The weights do not fit the config of their folder.
    """
    try:
        unexpected = encoder.load_state_dict(dict(weights), strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its own config ({' '.join(str(error).split())}).") from error
    if unexpected:
        raise ValueError(f"{folder} has more layers than its config tells: {', '.join(unexpected[:3])}.")


def _read_config(folder: Path) -> dict[str, Any]:
    if not (config := read_config(folder)):
        raise ValueError(f"{folder} has no config.json: choose a folder in transformers' layout.")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [file for file in sorted(folder.glob("*")) if file.suffix in TENSOR_FILES]
    if not files:
        raise ValueError(
            f"{folder} has no weights: choose a folder in transformers' layout, such as bert-base-uncased."
        )
    return read_tensors(min(files, key=lambda file: file.suffix not in SAFETENSORS))


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None reads those of the process.

    Returns:
        The exit code: 0, or 1 with one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m blip_qformer.pipeline.initial_weights", description=__doc__)
    parser.add_argument("clip", metavar="CLIP", type=Path, help="openai/clip-vit-large-patch14 as downloaded")
    parser.add_argument("bert", metavar="BERT", type=Path, help="bert-base-uncased as downloaded")
    parser.add_argument("stable_diffusion", metavar="STABLE_DIFFUSION", type=Path, help="1.5, in diffusers' layout")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        save_pipeline(initial_pipeline(arguments.clip, arguments.bert, arguments.stable_diffusion), arguments.target)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"The model to begin with is in {arguments.target}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
