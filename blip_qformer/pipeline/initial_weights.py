"""The model that the paper's first stage begins with, of published pipeline (arXiv 2305.14720, section 3; 2301.12597):

    python -m blip_qformer.pipeline.initial_weights CLIP BERT STABLE_DIFFUSION DST

The image encoder is CLIP's without its last block; the Q-Former is BERT with new cross-attention and queries, whose own
feed-forward layers begin as the text's; U-Net, text encoder, VAE and tokenizer are Stable Diffusion's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..checkpoint.components import find_components
from ..checkpoint.key_map import KeyMap, qformer_keys
from ..checkpoint.read_tensors import SAFETENSORS, TENSOR_FILES, read_config, read_tensors
from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from .pipeline import KINDS, Pipeline, build_network, initialise, save_pipeline

_CLIP_LAYER, _OUR_LAYER = "encoder.layers.{}", "blocks.{}"


CLIP_NAMES = KeyMap(
    {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "position_embedding",
        "pre_layrnorm": "pre_norm",  # so it is spelled
        f"{_CLIP_LAYER}.layer_norm1": f"{_OUR_LAYER}.attention_norm",
        f"{_CLIP_LAYER}.self_attn.qkv": f"{_OUR_LAYER}.attention.query_key_value",
        f"{_CLIP_LAYER}.self_attn.out_proj": f"{_OUR_LAYER}.attention.output",
        f"{_CLIP_LAYER}.layer_norm2": f"{_OUR_LAYER}.feed_forward_norm",
        f"{_CLIP_LAYER}.mlp.fc1": f"{_OUR_LAYER}.expand",
        f"{_CLIP_LAYER}.mlp.fc2": f"{_OUR_LAYER}.contract",
    }
)


BERT_NAMES = KeyMap(qformer_keys(prefix="", attention="self"))


UNUSED = ("position_ids", "token_type_embeddings.weight")  # a Q-Former's text is one segment


OLD_NORMS = {".gamma": ".weight", ".beta": ".bias"}  # BERT's first files


def first_encoder(clip: Path, bert: Path, seed: int = 0) -> SubjectEncoder:
    """A subject encoder of two folders in transformers' layout.

    Args:
        clip: with a CLIP, or its vision model alone; ``bert``: with a BERT.
        seed: of what is new.

    Raises:
        ValueError: a folder has no weights, or others.
    """
    vision, vision_weights = _vision(clip)
    config = _config(bert)
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
        initialise(encoder, qformer.width)
    _take(encoder, {f"vision.{name}": weight for name, weight in vision_weights.items()}, clip)
    _take(encoder, _qformer(bert, encoder.qformer.word_embedding.weight), bert)
    return encoder


def first_model(clip: Path, bert: Path, stable_diffusion: Path, seed: int = 0) -> Pipeline:
    """A whole model: its encoder from :func:`first_encoder`, the rest from a folder in diffusers' layout.

    Raises:
        ValueError: a folder lacks something.
    """
    encoder = first_encoder(clip, bert, seed)
    found, problems = find_components(stable_diffusion)
    if missing := [name for name, kind in KINDS.items() if kind not in found]:
        raise ValueError(" ".join([f"{stable_diffusion} has no {', '.join(missing)}: choose a whole one.", *problems]))
    networks = {name: build_network(name, found[kind]) for name, kind in KINDS.items()}
    if not (stable_diffusion / "tokenizer" / "vocab.json").is_file():
        raise ValueError(f"{stable_diffusion} has no tokenizer/vocab.json: choose a whole one.")
    pipeline = Pipeline(encoder, **networks, tokenizer=CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer"))
    pipeline.check_widths()
    return pipeline


def _vision(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """CLIP's image encoder under our names, but for its last block and the norm behind it, which is new."""
    config = _config(folder)
    config = _CLIP_DEFAULTS | config.get("vision_config", config)
    layers = config["num_hidden_layers"] - 1
    prefix = "vision_model."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in _weights(folder).items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    for layer in range(layers):
        attention = f"encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            pipeline = [weights.pop(f"{attention}.{name}_proj.{kind}") for name in "qkv"]
            weights[f"{attention}.qkv.{kind}"] = torch.cat(pipeline)
    unused = (f"encoder.layers.{layers}.", "post_layernorm.")
    named = CLIP_NAMES.to_encoder({name: w for name, w in weights.items() if not name.startswith(unused)}, folder)
    named["class_embedding"] = named["class_embedding"][None, None]
    named["position_embedding"] = named["position_embedding"][None]
    sizes = VisionConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        feed_forward_width=config["intermediate_size"],
    )
    return sizes, named


#: What a published CLIP's config leaves out, because it is transformers' default.
_CLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def _qformer(folder: Path, word_embedding: Tensor) -> dict[str, Tensor]:
    """BERT under our names; ``word_embedding`` has the words that it does not have, behind its own."""
    weights = {}
    for name, weight in _weights(folder).items():
        for old, new in OLD_NORMS.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        name = name.removeprefix("bert.")
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith(UNUSED):
            weights[name] = weight
    named = BERT_NAMES.to_encoder(weights, folder)
    words = named["qformer.word_embedding.weight"]
    named["qformer.word_embedding.weight"] = torch.cat([words, word_embedding.detach()[len(words) :]])
    queries = {n.replace("text_feed", "query_feed"): w for n, w in named.items() if "text_feed_forward" in n}
    return named | queries


def _take(encoder: SubjectEncoder, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put weights into an encoder that keeps its own for all others."""
    try:
        unexpected = encoder.load_state_dict(dict(weights), strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its own config ({' '.join(str(error).split())}).") from error
    if unexpected:
        raise ValueError(f"{folder} has more layers than its config tells: {', '.join(unexpected[:3])}.")


def _config(folder: Path) -> dict[str, Any]:
    if not (config := read_config(folder)):
        raise ValueError(f"{folder} has no config.json: choose a folder in transformers' layout.")
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    files = [file for file in sorted(folder.glob("*")) if file.suffix in TENSOR_FILES]
    if not files:
        raise ValueError(
            f"{folder} has no weights: choose a folder in transformers' layout, such as bert-base-uncased."
        )
    return read_tensors(min(files, key=lambda file: file.suffix not in SAFETENSORS))


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m blip_qformer.pipeline.initial_weights", description=__doc__)
    parser.add_argument("clip", metavar="CLIP", type=Path, help="openai/clip-vit-large-patch14 as downloaded")
    parser.add_argument("bert", metavar="BERT", type=Path, help="bert-base-uncased as downloaded")
    parser.add_argument("stable_diffusion", metavar="STABLE_DIFFUSION", type=Path, help="1.5, in diffusers' layout")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        save_pipeline(first_model(arguments.clip, arguments.bert, arguments.stable_diffusion), arguments.target)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"The model to begin with is in {arguments.target}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
