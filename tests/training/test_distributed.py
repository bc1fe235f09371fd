"""Two processes over gloo: their gradients are those of one with the whole batch, and they train, stop and go on."""

from __future__ import annotations

import json
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tools.host import ROOT

SCRIPTS = Path(__file__).parent / "one_of_two"


def run_two(processes, script: str, **inputs: Any) -> None:
    """Run a script in two processes, and wait for both."""
    inputs_of = [{**inputs, "rank": rank} for rank in range(2)]
    both = [processes.Process(target=runpy.run_path, args=(str(SCRIPTS / script), each)) for each in inputs_of]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]


def without_a_subject(options: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Pairs whose subject is dropped, and others."""
    stage = tiny.make_stage("subject", options=options)
    left_out, kept = [], []
    for number in range(20):
        stage.zero_grad()
        stage(tiny.make_batch("subject", [number]))["loss"].backward()
        (left_out if stage.pipeline.encoder.qformer.query_tokens.grad is None else kept).append(number)
    return left_out, kept


@pytest.fixture(scope="module")
def halves() -> dict[str, tuple[dict[str, Any], tuple[list[int], list[int]]]]:
    """Where the processes differ most: captions of other lengths; and no subject at all in the first."""
    subject = {"data": {"resolution": 32}, "dropout": {"subject": 0.5, "projection": 0.2}}
    left_out, kept = without_a_subject(subject)
    assert {tiny.make_pair(number).caption.split()[-1] for number in (0, 3, 6)} == {"snow"}
    return {
        "vision": (tiny.OPTIONS["vision"], ([0, 1], [2, 3])),
        "multimodal": (tiny.OPTIONS["multimodal"], ([0, 3, 6], [2, 5, 8])),
        "subject": (subject, (left_out[:2], kept[:2])),
    }


def test_two_processes_have_the_gradients_of_one(processes, halves, tmp_path):
    run_two(processes, "gradients.py", root=str(ROOT), folder=str(tmp_path), halves=halves)
    found = torch.load(tmp_path / "found.pt")
    for name, (options, (first, second)) in halves.items():
        stage = tiny.make_stage(name, options=options)
        loss = stage(tiny.make_batch(name, [*first, *second]))["loss"]
        loss.backward()
        losses, gradients = found[name]
        assert torch.stack(losses).mean().item() == pytest.approx(loss.item(), rel=1e-5)
        compared = 0
        for key, parameter in stage.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                assert gradients[key] is None or not gradients[key].any(), key
                continue
            torch.testing.assert_close(
                gradients[key], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k} {m}"
            )
            compared += 1
        assert compared > 30


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_stop_and_go_on(processes, pairs, tmp_path):
    """Through the whole loop, with dropout and accumulation; the learning rate is that of one process."""
    config = tiny.make_config(
        pairs=pairs,
        output=str(tmp_path / "whole"),
        steps=3,
        batch_size=2,
        gradient_accumulation=2,
        warmup_steps=2,
        ema_decay=0.5,
        gradient_checkpointing=True,
        log_every=1,
        checkpoint_every=1,
        options={"data": {"resolution": 32}, "dropout": {"subject": 0.5}},
    )
    run_two(processes, "training.py", config=config, port=free_port())
    resumed = tiny.changed(config, output=tmp_path / "resumed", steps=2)
    run_two(processes, "training.py", config=resumed, port=free_port())
    run_two(processes, "training.py", config=tiny.changed(resumed, steps=3), port=free_port())

    models = [config.output / "model", resumed.output / "model"]
    for file in sorted(models[0].rglob("*.safetensors")):
        expected, found = load_file(file), load_file(models[1] / file.relative_to(models[0]))
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    checkpoint = config.output / "checkpoints" / "step-00000003"
    state = json.loads((checkpoint / "run.json").read_text())
    assert (state["step"], state["processes"], state["batch_size"]) == (3, 2, 2)
    assert {"random_states_0.pkl", "random_states_1.pkl"} < {path.name for path in checkpoint.iterdir()}
    events = EventAccumulator(str(config.output / "log"))
    events.Reload()
    assert [event.value for event in events.Scalars("learning_rate")] == pytest.approx([5e-4, 1e-3, 1e-3])
    with pytest.raises(ValueError, match="was written with processes 2 and cannot be taken up with 1"):
        tiny.run(config)
    tiny.reset_accelerate()
