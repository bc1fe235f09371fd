"""How a command refuses."""

import pytest


def assert_one_line_refusal(code: int, capsys: pytest.CaptureFixture, *words: str) -> None:
    """The command failed with one line on stderr that holds these words, and printed nothing else."""
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("blip-qformer: ")
    for word in words:
        assert word in printed.err
