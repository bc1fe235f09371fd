"""What a run leaves behind, as tests compare it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a saved model."""
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.parent.name}.{name}": weight for file in files for name, weight in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def scalars(log: Path, name: str) -> dict[int, float]:
    """What TensorBoard shows of a metric, by step."""
    events = EventAccumulator(str(log))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}
