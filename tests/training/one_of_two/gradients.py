"""One of two processes: what each stage's loss and gradients are for its half of a batch.

Run by ``test_distributed.py``, with ``root``, ``folder``, ``rank`` and ``halves`` (stage -> options and two lists of
pairs) as globals; the first process writes what it found into the folder.
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

# The host's `tests` has an __init__.py, and would be taken for ours wherever it stands on the path.
others = [path for path in sys.path if not Path(path, "tests", "__init__.py").is_file()]
sys.path[:] = [root, *others]  # noqa: F821
from tests import tiny  # noqa: E402

torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)  # noqa: F821
found = {}
for name, (options, numbers) in halves.items():  # noqa: F821
    stage = tiny.make_stage(name, options=options)
    model = DistributedDataParallel(stage, find_unused_parameters=True)  # as trainer.train wraps it
    loss = model(tiny.make_batch(name, numbers[rank]))["loss"]  # noqa: F821
    loss.backward()
    losses = [torch.empty(()), torch.empty(())]
    torch.distributed.all_gather(losses, loss.detach())
    gradients = {key: parameter.grad for key, parameter in stage.named_parameters() if parameter.requires_grad}
    found[name] = losses, gradients
if rank == 0:  # noqa: F821
    torch.save(found, f"{folder}/found.pt")  # noqa: F821
torch.distributed.destroy_process_group()
