"""Attention Re-weight Edit on a conditioning."""

from __future__ import annotations

from collections.abc import Sequence

from ....blip_qformer.attention.edits import PromptToPrompt, Reweight
from ....blip_qformer.attention.schedule import StepRange
from ....blip_qformer.attention.words import WordWeight, weight_tokens
from ....blip_qformer.prompt import TokenSpan
from ..conditioning import Conditioning
from .hooks import get_edits, set_edits


def reweight(
    conditioning: Conditioning,
    words: Sequence[Sequence[TokenSpan]],
    weights: Sequence[WordWeight],
    steps: StepRange,
    *,
    in_model: bool = False,
) -> Conditioning:
    """Return a copy of a conditioning in which words have weights, beside the edits that it carries already.

    Args:
        conditioning: Conditioning of one prompt.
        words: Words of each entry of the conditioning, in order.
        weights: Weights of some of the words.
        steps: Steps in which the weights apply.
        in_model: Whether the sampler gets a MODEL that knows of edits.

    Returns:
        The conditioning itself if nothing is to be done.

    Raises:
        ValueError: If the prompt does not have one of the words.
    """
    factors = weight_tokens(words, weights, [tensor.shape[1] for tensor, _ in conditioning])
    if steps.is_empty or all((each == 1).all() for each in factors):
        return conditioning
    edits = [(*edits, Reweight(each, steps)) for edits, each in zip(get_edits(conditioning), factors, strict=True)]
    return set_edits(conditioning, edits, in_model=in_model)


def require_single_prompt(conditioning: Conditioning) -> None:
    """Refuse to re-weight a conditioning that holds the prompts of several images.

    Args:
        conditioning: Conditioning whose words are about to get weights.

    Raises:
        ValueError: If it comes from Prompt-to-Prompt Edit.
    """
    if any(isinstance(edit, PromptToPrompt) for edits in get_edits(conditioning) for edit in edits):
        raise ValueError(
            "This conditioning comes from Prompt-to-Prompt Edit and holds several prompts: put Attention Re-weight "
            "Edit before it, on the prompt it is for, or use that node's own weights."
        )
