"""One of two processes that train together, as ``accelerate launch`` starts them.

Run by ``test_distributed.py``, with ``config``, ``rank`` and ``port`` as globals.
"""

import os

from blip_qformer.training.trainer import train

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(port),  # noqa: F821
    "WORLD_SIZE": "2",
    "RANK": str(rank),  # noqa: F821
    "LOCAL_RANK": str(rank),  # noqa: F821
}
train(config)  # noqa: F821
