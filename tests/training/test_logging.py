"""The log of a run: metrics, samples, and what cannot be written."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.training.results import scalars


def test_the_log_has_the_metrics_and_the_samples(pairs, tmp_path):
    config = tiny.make_config(
        pairs=pairs, output=str(tmp_path), steps=4, log_every=2, validate_every=4, learning_rate=0.5e-3, batch_size=2
    )
    tiny.run(config)
    for name in ("loss", "learning_rate", "samples_per_second"):
        assert scalars(tmp_path / "log", name).keys() == {2, 4}
    assert scalars(tmp_path / "log", "learning_rate")[4] == pytest.approx(0.5e-3)
    assert all(value > 0 for value in scalars(tmp_path / "log", "samples_per_second").values())
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (4, 2 * 32, 3 * 32)
    assert (tmp_path / "samples.png").is_file()


def test_what_cannot_be_read_is_among_the_metrics(tmp_path):
    """A pair and a whole shard; where everything can be read there is no such metric."""
    folder = tiny.write_pairs(tmp_path / "pairs", shards=2)
    settings = {"pairs": str(folder), "log_every": 1, "validate_every": 0, "batch_size": 8}
    tiny.run(tiny.make_config(output=str(tmp_path / "whole"), steps=2, **settings))
    with pytest.raises(KeyError, match="unreadable"):
        scalars(tmp_path / "whole" / "log", "unreadable")

    (folder / "0.tar").write_bytes(b"no archive")
    tiny.run(tiny.make_config(output=str(tmp_path / "damaged"), steps=3, **settings))
    counts = [*scalars(tmp_path / "damaged" / "log", "unreadable").values()]
    assert counts[-1] == 3  # once in each epoch, of which one batch is left
    assert counts == sorted(counts)


def test_a_log_that_cannot_be_written_stops_nothing(pairs, tmp_path, monkeypatch, caplog):
    """On a full disk, what counts is the sentence about the checkpoint."""

    def full(*inputs, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    settings = {"pairs": pairs, "output": str(tmp_path), "log_every": 1, "validate_every": 2, "batch_size": 2}
    assert tiny.run(tiny.make_config(steps=2, **settings)).is_dir()
    (warning,) = [message for message in caplog.messages if "cannot be written" in message]
    reason = "[Errno 28] No space left on device"
    assert warning == f"The log in {tmp_path / 'log'} cannot be written ({reason}): the run goes on without it."


def test_what_was_logged_behind_the_last_checkpoint_is_logged_anew(pairs, tmp_path):
    settings = {"pairs": pairs, "output": str(tmp_path), "log_every": 1, "num_workers": 0}
    tiny.run(tiny.make_config("vision", steps=2, checkpoint_every=2, **settings))
    before = scalars(tmp_path / "log", "loss")
    (tmp_path / "checkpoints" / "step-00000002").rename(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "checkpoints" / "step-00000001" / "run.json").write_text('{"step": 1}')
    tiny.run(tiny.make_config("vision", steps=3, checkpoint_every=0, **settings))
    after = scalars(tmp_path / "log", "loss")
    assert after.keys() == {1, 2, 3}
    assert after[1] == before[1]
    assert after[2] != before[2]
