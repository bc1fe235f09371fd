"""The conditionings of one sampling run that carry edits, and how many images of the batch belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....blip_qformer.attention.edits import Edit, PromptToPrompt


@dataclass(frozen=True)
class EditedConditioning:
    """One conditioning with edits.

    Attributes:
        side: The sampler's name of the list it stands in, such as ``positive``.
        edits: Edits of the conditioning, in the order in which they were made.
        rows: Number of rows of its tensor.
        tokens: Number of tokens of its tensor.
    """

    side: str
    edits: tuple[Edit, ...]
    rows: int
    tokens: int

    @property
    def prompt_to_prompt(self) -> PromptToPrompt | None:
        """The one edit that makes images follow a source, if there is one."""
        return next((edit for edit in self.edits if isinstance(edit, PromptToPrompt)), None)


def common_group_size(conditionings: Sequence[EditedConditioning], batch_size: int) -> int:
    """Return how many images of a batch belong together: a source and its edited images.

    Args:
        conditionings: All edited conditionings of a run.
        batch_size: Number of images in the run.

    Returns:
        Number of images in a group; 1 without Prompt-to-Prompt Edit.

    Raises:
        ValueError: If the batch is no multiple of it, or a conditioning was changed behind Prompt-to-Prompt Edit.
    """
    followers = [(each, each.prompt_to_prompt) for each in conditionings if each.prompt_to_prompt]
    sizes = {edit.group_size for _, edit in followers}
    if len(sizes) > 1:
        raise ValueError(
            f"Prompt-to-Prompt Edits of {' and '.join(map(str, sorted(sizes)))} pictures are combined in one sampler: "
            "give each the same number of edited conditionings."
        )
    group_size = sizes.pop() if sizes else 1
    if batch_size % group_size:
        raise ValueError(
            f"The sampler draws {batch_size} picture(s), but Prompt-to-Prompt Edit needs {group_size} side by side, "
            "the source and its edits: connect its latent output to the sampler."
        )
    for each, edit in followers:
        tokens = len(edit.images[0].steps)
        if (each.rows, each.tokens) != (group_size, tokens):
            raise ValueError(
                f"The conditioning of Prompt-to-Prompt Edit had {group_size} rows of {tokens} tokens and now has "
                f"{each.rows} of {each.tokens}: join or average conditionings before that node, not behind it."
            )
    return group_size
