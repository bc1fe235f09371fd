"""The soak: its prompts are as meant, and its figures are told from its readings. The long run is `make soak`."""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest

from tools.host import ComfyServer
from tools.soak import FLAT, Outcome, Reading, Soak, report


def outcome(*sizes: int) -> Outcome:
    return Outcome([Reading(20 * number, size, 13, 3, 1000) for number, size in enumerate(sizes)])


@pytest.mark.parametrize(
    ("sizes", "growth"),
    [
        ((50, 90, 100, 100, 100, 100, 100, 100), 0),  # the warm-up does not count
        ((50, 90, 100, 100, 100, 500, 100, 100), 0),  # nor does a single reading
        ((50, 90, 100, 101, 102, 103, 104, 105), 0.04),
        ((100, 100), 0),
    ],
)
def test_growth_is_that_after_the_warm_up(sizes, growth):
    assert outcome(*sizes).growth() == pytest.approx(growth, abs=0.011)
    assert FLAT == 0.02


def test_a_report_names_what_went_wrong():
    found = outcome(100, 100)
    found.problems.append("A prompt was lost.")
    found.counts.update(["two-subjects: done"] * 3)
    found.is_compared = True
    lines = list(report(found))
    assert lines[-1] == "A prompt was lost."
    assert "3 prompts" in lines[0]
    assert "     3  two-subjects: done" in lines
    assert list(report(Outcome(is_compared=True)))[-2:] == [
        "no prompt was lost",
        "the reference graphs give the same images",
    ]


def test_a_report_of_a_soak_that_was_ended_does_not_speak_of_the_references():
    """SIGTERM comes as KeyboardInterrupt, at any moment: also before the first reading."""

    class Server:
        def object_info(self):
            return {}

        def free(self):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.soak.small_prompt", lambda *_: {})
        soak = Soak(cast("ComfyServer", Server()), "mini")
    with pytest.raises(KeyboardInterrupt):
        soak.run(20, 10)
    assert soak.outcome.seconds > 0
    assert list(report(soak.outcome))[1:] == [
        "no prompt was lost",
        "ended from outside: the reference graphs did not run again",
    ]


def test_its_prompts_are_many_and_the_same_for_a_seed(server):
    jobs = [[soak.make_job() for _ in range(200)] for soak in (Soak(server, "mini"), Soak(server, "mini"))]
    assert jobs[0] == jobs[1]
    ends = Counter(job.ends for job in jobs[0])
    assert min(ends["done"], ends["refused"], ends["cancelled"]) > 10
    sizes = {
        (node["inputs"]["width"], node["inputs"]["height"])
        for job in jobs[0]
        for node in job.prompt.values()
        if node["class_type"] == "EmptyLatentImage"
    }
    assert len(sizes) >= 6
    assert len({job.kind for job in jobs[0]}) >= 15


@pytest.mark.parametrize("ends", ["done", "refused", "cancelled"])
def test_a_prompt_that_ends_otherwise_is_a_problem(server, monkeypatch, ends):
    """A graph that the host refuses: right for one that must fail, and a problem for the others."""
    soak = Soak(server, "mini")
    job = next(job for job in iter(soak.make_job, None) if job.kind == 'failure "The name"')
    changed = type(job)(job.kind, job.prompt, ends, job.sentence)
    soak._run_jobs([changed])
    assert soak.outcome.counts == {f"{job.kind}: {ends}": 1}
    assert bool(soak.outcome.problems) == (ends != "refused")
