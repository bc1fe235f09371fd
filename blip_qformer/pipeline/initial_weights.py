"""The model from which the paper's first stage starts, made of published ones (arXiv 2305.14720).

    python -m blip_qformer.pipeline.initial_weights CLIP BERT STABLE_DIFFUSION DST

The image encoder is CLIP's without its last block. The Q-Former is BERT with new cross-attention and query tokens, and
its feed-forward layers for queries start as copies of those for text. U-Net, text encoder, VAE and tokenizer are Stable
Diffusion's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..checkpoint.components import find_components
from ..checkpoint.key_map import KeyMap, format_keys, qformer_keys
from ..checkpoint.read_tensors import SAFETENSORS, TENSOR_FILES, CheckpointError, naming_file, read_config, read_tensors
from ..checkpoint.weights import check_dtypes, check_finite
from ..encoder import QFormerConfig, SubjectEncoder, SubjectEncoderConfig, VisionConfig
from ..encoder.config import Heads, Layers, Pixels, Positions, Vocabulary, Width
from ..limits import MAX_LAYERS, MAX_WIDTH
from ..plain_data import validate, whole_number
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

WORDS = "qformer.word_embedding.weight"
PROJECTION = 4  # the hidden layer behind the Q-Former, in widths of the Q-Former
NEW_KEYS = ("vision.post_norm.", "query_tokens", ".cross_attention.")  # in neither CLIP nor BERT


class ClipSizes(BaseModel):
    """The fields of CLIP's vision config that decide sizes; what a config leaves out is transformers' default."""

    image_size: Pixels = 224
    patch_size: Pixels = 32
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Annotated[int, whole_number(2, MAX_LAYERS)] = 12
    num_attention_heads: Heads = 12


class BertSizes(BaseModel):
    """The fields of BERT's config that decide sizes."""

    hidden_size: Annotated[int, whole_number(1, MAX_WIDTH // PROJECTION)]
    num_hidden_layers: Layers
    num_attention_heads: Heads
    intermediate_size: Width
    vocab_size: Vocabulary
    max_position_embeddings: Positions


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
    with naming_file(clip):
        vision, vision_weights = _read_vision(clip)
    with naming_file(bert):
        config = validate(BertSizes, _read_config(bert), f"{bert / 'config.json'}")
        sizes = {
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "feed_forward_width": config.intermediate_size,
            "vocabulary_size": config.vocab_size + 1,  # [DEC]
            "text_positions": config.max_position_embeddings,
        }
        qformer = validate(QFormerConfig, sizes, f"{bert / 'config.json'}")
        qformer_weights = _read_qformer(bert)
    all_sizes = SubjectEncoderConfig(vision, qformer, PROJECTION * qformer.width)
    shapes = {name: weight.shape for name, weight in SubjectEncoder(all_sizes, device="meta").state_dict().items()}
    _check_fit(vision_weights, {name: shape for name, shape in shapes.items() if name.startswith("vision.")}, clip)
    _check_fit(qformer_weights, {name: shape for name, shape in shapes.items() if name.startswith("qformer.")}, bert)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SubjectEncoder(all_sizes)
        init_weights(encoder, qformer.width)
    words = qformer_weights[WORDS]  # tokens that BERT lacks keep their new rows
    rest = encoder.qformer.word_embedding.weight.detach()[len(words) :]
    encoder.load_state_dict({**vision_weights, **qformer_weights, WORDS: torch.cat([words, rest])}, strict=False)
    return encoder


def _read_vision(folder: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Read CLIP's image encoder under our keys, without its last block and the norm behind it, which is new."""
    config = _read_config(folder)
    config = validate(ClipSizes, config.get("vision_config", config), f"{folder / 'config.json'}")
    layers = config.num_hidden_layers - 1
    prefix = "vision_model."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in _read_weights(folder).items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    for layer in range(layers):
        attention = f"encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            names = [f"{attention}.{name}_proj.{kind}" for name in "qkv"]
            _require(names, weights, folder)
            projections = [weights.pop(name) for name in names]  # each [width, ...]
            weights[f"{attention}.qkv.{kind}"] = torch.cat(projections)  # [3 * width, ...]
    unused = (f"encoder.layers.{layers}.", "post_layernorm.")
    named = CLIP_KEYS.to_encoder({name: w for name, w in weights.items() if not name.startswith(unused)}, folder)
    _require(["class_embedding", "position_embedding"], named, folder)
    named["class_embedding"] = named["class_embedding"][None, None]
    named["position_embedding"] = named["position_embedding"][None]
    sizes = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.hidden_size,
        "layers": layers,
        "heads": config.num_attention_heads,
        "feed_forward_width": config.intermediate_size,
    }
    vision = validate(VisionConfig, sizes, f"{folder / 'config.json'}")
    return vision, {f"vision.{name}": weight for name, weight in named.items()}


def _read_qformer(folder: Path) -> dict[str, Tensor]:
    """Read BERT under our keys."""
    weights = {}
    for name, weight in _read_weights(folder).items():
        for old, new in BERT_OLD_NORMS.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        name = name.removeprefix("bert.")
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith(BERT_UNUSED_KEYS):
            weights[name] = weight
    named = BERT_KEYS.to_encoder(weights, folder)
    queries = {n.replace("text_feed", "query_feed"): w for n, w in named.items() if "text_feed_forward" in n}
    return named | queries


def _require(names: Collection[str], weights: Mapping[str, Tensor], folder: Path) -> None:
    if missing := [name for name in names if name not in weights]:
        raise CheckpointError(f"{folder} lacks {format_keys(missing)}: download it again.")


def _check_fit(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], folder: Path) -> None:
    """Refuse weights that are not those of their config, before anything of its sizes is made.

    Raises:
        CheckpointError: Weights are missing, too many, of another shape or dtype, or not finite.
    """
    if unexpected := weights.keys() - shapes.keys():
        raise CheckpointError(f"{folder} has more layers than its config tells: {format_keys(unexpected)}.")
    _require([name for name in shapes if not any(new in name for new in NEW_KEYS)], weights, folder)
    for name, weight in weights.items():
        fits = weight.shape == shapes[name]
        if name == WORDS:  # which may have fewer rows
            fits = weight.shape[1:] == shapes[name][1:] and weight.ndim == 2 and len(weight) <= shapes[name][0]
        if not fits:
            raise CheckpointError(
                f"{folder} does not fit its own config: {name} has the shape {list(weight.shape)}, and the config asks "
                f"for {list(shapes[name])}. Download it again."
            )
    check_dtypes(weights, folder)
    check_finite(weights, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (config := read_config(folder)):
        raise CheckpointError(f"{folder} has no config.json: choose a folder in transformers' layout.")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [file for file in sorted(folder.glob("*")) if file.suffix in TENSOR_FILES]
    if not files:
        raise CheckpointError(
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
