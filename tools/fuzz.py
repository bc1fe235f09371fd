"""Damage files of every kind and read them: nothing may hang, crash, fill the memory or show a traceback.

    python -m tools.fuzz --count 100000 --resume fuzz.json     # `make fuzz`; again, and it goes on where it was ended
    python -m tools.fuzz --only shard --first 1200 --count 1 --keep case.tar    # one case again

A case is its number: the same files and the same damage each time, so that ``--first`` and ``--count`` share a long run
between processes. Cases are read in a process of their own, which is watched from outside and started again where it
ended. Whoever ends a run with SIGTERM or Ctrl-C gets the report of what it read so far.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
HANG = 5.0  # seconds of the processor for one file
PATIENCE = 60.0  # seconds on the clock in which a process that waits for nothing but its turn may stand still
START = 600.0  # seconds on the clock in which a process must begin: imports, on a loaded machine
SAVED_EVERY = 500  # cases
MEMORY_SLACK = 48 * 2**20  # bytes: what allocators keep or libraries load now and then, whatever the file


@dataclass
class Report:
    """What a run found.

    Args:
        cases: Number of files read.
        answers: How many were read, and how many got one sentence.
        faults: A line for each fault.
        slowest: The most seconds of the processor that one file took.
        largest: The most memory that one file took beyond its valid file's, in bytes.
        seconds: Seconds of the processor by kind of file.
        following: Number of the case after the last one.
    """

    cases: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    following: int = 0

    def add(self, case: dict[str, Any]) -> None:
        """Count one case, and keep its faults."""
        self.cases += 1
        self.following = case["number"] + 1
        self.answers[case["answer"]] += 1
        self.seconds[case["target"]] += case["seconds"]
        self.slowest, self.largest = max(self.slowest, case["seconds"]), max(self.largest, case["memory"])
        name = f"case {case['number']}, {case['target']}"
        if case["answer"] == "traceback":
            self.faults.append(f"{name}: {case['detail']}")
        if case["seconds"] > HANG:
            self.faults.append(f"{name}: took {case['seconds']:.1f} s")
        if case["memory"] > case["valid_memory"] + MEMORY_SLACK:  # valid twice: the file's own, and as much again
            self.faults.append(f"{name}: took {case['memory'] / 2**20:.0f} MB more than the valid file")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Return the report of a run that was ended."""
        held = json.loads(path.read_text())
        return cls(**{**held, "answers": Counter(held["answers"]), "seconds": Counter(held["seconds"])})

    def save(self, path: Path) -> None:
        """Write the report, so that the run can go on later."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # the library could write it, but its torch would come with it
        partial.write_text(json.dumps(vars(self), indent=1))
        partial.replace(path)

    def __str__(self) -> str:
        lines = [
            f"{self.cases} files: {self.answers['read']} read, {self.answers['sentence']} refused in one sentence."
        ]
        lines.append(f"Slowest {self.slowest:.2f} s, most memory beyond the valid file {self.largest / 2**20:.0f} MB.")
        longest = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.most_common(8))
        lines.append(f"Seconds of the processor {self.seconds.total():.0f}: {longest}.")
        return "\n".join([*lines, f"{len(self.faults)} faults", *self.faults[:50]])


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="only kinds of file whose name holds this")
    parser.add_argument("--keep", type=Path, help="write the damaged file there as well")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--resume", type=Path, help="keep the report in this file, and go on where it ends")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        _work(arguments)
        return 0
    kept: Path | None = arguments.resume
    report = Report.load(kept) if kept and kept.exists() else Report(following=arguments.first)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with closing(_cases(arguments, report.following, time.monotonic() + arguments.seconds)) as cases:
            for case in cases:
                report.add(case)
                if report.cases % SAVED_EVERY == 0:
                    print(f"{report.cases} ... {len(report.faults)} faults", file=sys.stderr, flush=True)
                    if kept:
                        report.save(kept)
    except KeyboardInterrupt:
        print(f"Ended from outside before case {report.following}.")
    if kept:
        report.save(kept)
    print(report)
    return bool(report.faults)


def _cases(arguments: argparse.Namespace, number: int, end: float) -> Iterator[dict[str, Any]]:
    """Yield the result of each case from ``number`` on, from as many processes as it takes."""
    last = arguments.first + arguments.count
    while number < last and time.monotonic() < end:
        command = [sys.executable, "-m", "tools.fuzz", "--worker", "--only", arguments.only]
        command += ["--first", str(number), "--count", str(last - number)]
        command += ["--keep", str(arguments.keep)] if arguments.keep else []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        ) as process:
            try:
                begun: dict[str, Any] | None = None
                for case in _watch(process, end):
                    begun = None if "answer" in case else case
                    if begun is None:
                        number = case["number"] + 1
                        yield case
            finally:
                process.kill()
        if begun and time.monotonic() < end:
            is_killed = process.returncode == -signal.SIGKILL
            how = "hung, or was killed" if is_killed else f"ended the process ({process.returncode})"
            yield {**begun, "answer": "traceback", "detail": how, "seconds": 0.0, "memory": 0, "valid_memory": 0}
            number = begun["number"] + 1
        elif number < last and time.monotonic() < end:
            raise RuntimeError(f"The process that reads the files could not begin at case {number}.")


def _watch(process: subprocess.Popen[str], end: float) -> Iterator[dict[str, Any]]:
    """Yield what the process prints, until it ends or hangs."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    observed = psutil.Process(process.pid)
    is_reading, since, used = False, time.monotonic(), 0.0
    while time.monotonic() < end:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            # Other programs may have the processor: a process that could compute and does not get to is not hung.
            stands = time.monotonic() - since > (PATIENCE if is_reading else START)
            if (is_reading and _processor(observed) - used > HANG) or (
                stands and observed.status() != psutil.STATUS_RUNNING
            ):
                return
            continue
        if not line:
            process.wait()
            return
        case = json.loads(line)
        is_reading, since, used = "answer" not in case, time.monotonic(), _processor(observed)
        yield case


def _processor(process: psutil.Process) -> float:
    """Return the seconds of the processor that a process has used."""
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended meanwhile
        return 0.0
    return times.user + times.system


def _pass_on(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _work(arguments: argparse.Namespace) -> None:
    """Read cases one after the other, and print each when it begins and when it is done."""
    import warnings

    import torch

    from .fuzz_readers import make_targets

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        targets = [target for target in make_targets(Path(folder)) if arguments.only in target.name]
        chances = [target.weight for target in targets]
        valid = {}
        for number in range(arguments.first, arguments.first + arguments.count):
            rng = Random(number)
            (target,) = rng.choices(targets, chances)
            whole = target.file.read_bytes()
            if target.name not in valid:
                target.read()  # imports and caches are not what is measured
                before = _memory("VmRSS", reset=True)
                target.read()
                valid[target.name] = max(0, _memory("VmHWM") - before)
            damaged = target.mutate(whole, rng)
            if arguments.keep:
                arguments.keep.write_bytes(damaged)
            case: dict[str, Any] = {"number": number, "target": target.name}
            print(json.dumps(case), flush=True)
            target.file.write_bytes(damaged)
            before, start = _memory("VmRSS", reset=True), time.process_time()
            try:
                target.read()
                case |= {"answer": "read", "detail": ""}
            except Exception as error:
                case |= _answer(error, target.file)
            seconds = time.process_time() - start
            grown = max(0, _memory("VmHWM") - before - valid[target.name])
            case |= {"seconds": seconds, "memory": grown, "valid_memory": valid[target.name]}
            print(json.dumps(case), flush=True)
            target.file.write_bytes(whole)


def _answer(error: Exception, file: Path) -> dict[str, str]:
    """Tell whether an exception is one of our sentences: it names the file or its folder, in one line, with an end."""
    text = str(error)
    names = (str(file), str(file.parent), str(file.parent.parent))
    is_sentence = isinstance(error, ValueError | OSError) and type(error).__module__ not in ("json.decoder",)
    if is_sentence and any(name in text for name in names) and "\n" not in text.strip() and text.endswith("."):
        return {"answer": "sentence", "detail": text}
    return {"answer": "traceback", "detail": f"{type(error).__name__}: {text[:300]!r}"}


def _memory(field_name: str, reset: bool = False) -> int:
    """Return a field of /proc/self/status in bytes; 0 where there is none. ``reset`` lets VmHWM begin anew."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
