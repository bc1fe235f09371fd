"""The Cancel button of the host, for nodes whose unfinished result is worth keeping.

The host's way is an exception, ``InterruptProcessingException``: whoever asks first raises it and takes the flag down,
and the host's progress bar asks too. A node that keeps what it has must not be ended by it, and must leave the flag up:
then the host stops in front of the next node, and has this node's result for the next run of the same graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

from ...blip_qformer.finetune.loop import FinetuneCancelledError


@contextmanager
def stop_when_cancelled() -> Iterator[None]:
    """Turn the host's interruption of a block into :class:`FinetuneCancelledError`, and leave the host's flag up.

    The host is asked before the block: cancelling does not rest on the progress bar, as the host drops some updates.

    Raises:
        FinetuneCancelledError: The user has cancelled.
    """
    management = comfy.model_management
    if management.processing_interrupted():
        raise FinetuneCancelledError
    try:
        yield
    except management.InterruptProcessingException as interruption:
        management.interrupt_current_processing()  # raising it took the flag down
        raise FinetuneCancelledError from interruption
