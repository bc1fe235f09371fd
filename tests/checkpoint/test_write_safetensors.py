"""The .safetensors writer, read back with the safetensors library."""

import errno
import json
import math
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip_qformer.checkpoint.write_safetensors import (
    DTYPE_NAMES,
    check_free_space,
    check_target,
    data_size,
    write_safetensors,
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values that every bit of the dtype takes part in, but for floats, which stay finite."""
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


def assert_same(read: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in shape, dtype and every bit."""
    assert read.shape == expected.shape
    assert read.dtype == expected.dtype
    assert read.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))


def header_size(path: Path) -> int:
    """The bytes before a file's data: eight for a length, and that many."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def anonymous_memory() -> int:
    """The bytes this process holds that are no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon line")


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__" and name.isprintable())


@settings(deadline=None)
@given(
    contents=st.dictionaries(names, st.tuples(shapes, st.sampled_from(list(DTYPE_NAMES)), st.booleans()), max_size=6),
    metadata=st.dictionaries(names, st.text(max_size=20).filter(str.isprintable), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_whatever_is_written_is_read_back(tmp_path_factory, contents, metadata, seed):
    torch.manual_seed(seed)
    tensors = {}
    for name, (shape, dtype, transposed) in contents.items():
        tensors[name] = random_tensor(shape, dtype)
        if transposed and len(shape) > 1:
            tensors[name] = tensors[name].transpose(0, 1)
    path = tmp_path_factory.mktemp("written") / "file.safetensors"
    reported = []

    write_safetensors(path, tensors, metadata=metadata, progress=reported.append)

    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata
    assert sum(reported) == data_size(tensors) == path.stat().st_size - header_size(path)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_floating_tensors_are_cast(tmp_path, dtype):
    tensors = {
        "float64": torch.randn(3, 5, dtype=torch.float64),
        "float32": torch.randn(4),
        "float16": torch.randn(2, 2).half(),
        "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
        "int64": torch.tensor([2**40, -1]),
        "bool": torch.tensor([True, False, True]),
    }
    path = tmp_path / "file.safetensors"
    write_safetensors(path, tensors, dtype=dtype)
    read = load_file(path)
    for name, tensor in tensors.items():
        assert_same(read[name], tensor.to(dtype) if tensor.is_floating_point() else tensor)
    assert data_size(tensors, dtype) == path.stat().st_size - header_size(path)


def test_tied_sliced_and_expanded_tensors_are_each_written_in_full(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base, "b": base, "slice": base[1:, ::2], "row": base[0].expand(3, 6), "turned": base.t()}
    write_safetensors(tmp_path / "file.safetensors", tensors)
    read = load_file(tmp_path / "file.safetensors")
    for name, tensor in tensors.items():
        assert_same(read[name], tensor)


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path):
    dtypes = {"a": torch.bool, "b": torch.float64, "c": torch.float16, "d": torch.uint8, "e": torch.float32}
    write_safetensors(tmp_path / "file", {name: random_tensor((3,), dtype) for name, dtype in dtypes.items()})
    data = (tmp_path / "file").read_bytes()
    header = data[8 : header_size(tmp_path / "file")]
    assert len(header) % 8 == 0
    for name, entry in json.loads(header).items():
        assert entry["data_offsets"][0] % dtypes[name].itemsize == 0


def test_parameters_that_require_grad_are_written(tmp_path):
    module = torch.nn.Linear(2, 3)
    write_safetensors(tmp_path / "file", dict(module.named_parameters()))
    assert_same(load_file(tmp_path / "file")["weight"], module.weight.detach())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_in_the_middle_leaves_the_folder_as_it_was(tmp_path, failure, existing):
    path = tmp_path / "file.safetensors"
    if existing:
        path.write_bytes(b"the old file")
    seen = []

    def fail_at_the_third(written):
        seen.append([name for name in os.listdir(tmp_path) if not name.endswith(".lock")])
        if len(seen) == 3:
            raise failure

    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        write_safetensors(
            path, {name: torch.zeros(10) for name in "abcd"}, overwrite=existing, progress=fail_at_the_third
        )
    assert len(seen[0]) == (2 if existing else 1)  # it was writing, beside the target
    assert os.listdir(tmp_path) == ([path.name] if existing else [])
    if existing:
        assert path.read_bytes() == b"the old file"


def test_a_failure_of_the_rename_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"the old file")

    def refuse(source, target):
        raise PermissionError("in use")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="in use"):
        write_safetensors(path, {"a": torch.zeros(10)}, overwrite=True)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"the old file"


def test_an_existing_file_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"the old file")
    reported = []
    with pytest.raises(FileExistsError) as raised:
        write_safetensors(path, {"a": torch.zeros(10)}, progress=reported.append)
    assert str(raised.value) == (
        f"{path} exists already: choose another name, or allow overwriting it "
        "(overwrite=True; on the command line, --force)."
    )
    assert reported == []
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == [path.name]


def test_an_existing_file_is_replaced_if_asked_even_by_its_own_tensors(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.randn(1000), "b": torch.randn(3)}
    save_file(tensors, path)
    write_safetensors(path, load_file(path), dtype=torch.float16, overwrite=True)
    for name, tensor in load_file(path).items():
        assert_same(tensor, tensors[name].half())


def test_a_folder_in_the_way_and_a_folder_not_there_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match=r"folder is a folder, and .*: choose another name\.$"):
        write_safetensors(tmp_path / "folder", {"a": torch.zeros(1)}, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder, so x cannot .*: create it first\.$"):
        check_target(tmp_path / "nowhere" / "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    tensors = {"a": torch.zeros(1000)}
    write_safetensors(tmp_path / "file", tensors)
    needed = (tmp_path / "file").stat().st_size
    (tmp_path / "file").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - needed + 1, needed - 1))
    with pytest.raises(OSError, match="bytes free") as raised:
        write_safetensors(tmp_path / "file", tensors)
    assert str(raised.value) == (
        f"{tmp_path} has {needed - 1} bytes free and {needed} are needed: make room there or choose another disk."
    )
    assert os.listdir(tmp_path) == []
    check_free_space(tmp_path, needed - 1)


def test_a_value_too_large_for_the_dtype_is_named_and_not_made_infinite(tmp_path):
    with pytest.raises(ValueError, match="too large") as raised:
        write_safetensors(tmp_path / "file", {"layer.bias": torch.tensor([1.0, -70000.0])}, dtype=torch.float16)
    assert str(raised.value) == (
        "The tensor layer.bias holds 70000, too large for torch.float16: write bfloat16 or float32."
    )
    assert os.listdir(tmp_path) == []


def test_infinities_and_nans_that_were_there_stay(tmp_path):
    write_safetensors(
        tmp_path / "file", {"a": torch.tensor([math.inf, 1.0]), "b": torch.tensor([math.nan])}, dtype=torch.float16
    )
    read = load_file(tmp_path / "file")
    assert read["a"].tolist() == [math.inf, 1.0]
    assert read["b"].isnan().all()


@pytest.mark.parametrize(
    ("tensors", "metadata", "sentence"),
    [
        (
            {"a": torch.zeros(2, dtype=torch.complex128)},
            None,
            "The tensor a is torch.complex128, which safetensors cannot",
        ),
        ({"__metadata__": torch.zeros(2)}, None, "A tensor is named __metadata__, which"),
        ({"a": torch.zeros(2)}, {"steps": 5}, "The metadata 'steps' is 5, and safetensors holds only text"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, tensors, metadata, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        write_safetensors(tmp_path / "file", tensors, metadata=metadata)
    assert os.listdir(tmp_path) == []


def test_memory_stays_at_one_tensor_however_large_the_file(tmp_path):
    megabyte, count = 2**20, 20
    elements = 10 * megabyte // 4
    header = json.dumps(
        {
            f"layer.{number}": {
                "dtype": "F32",
                "shape": [elements],
                "data_offsets": [number * elements * 4, (number + 1) * elements * 4],
            }
            for number in range(count)
        }
    ).encode()
    source = tmp_path / "source.safetensors"
    with source.open("wb") as file:  # 200 MB of zeros that take no room on the disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * elements * 4)
    tensors = load_file(source)

    write_safetensors(tmp_path / "warm up", {"a": torch.zeros(8)}, dtype=torch.float16)
    before = anonymous_memory()
    peak, done = [before], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_memory())

    def note(written):
        peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    write_safetensors(tmp_path / "target.safetensors", tensors, dtype=torch.float16, progress=note)
    done.set()
    watcher.join()

    assert (tmp_path / "target.safetensors").stat().st_size > 100 * megabyte
    assert peak[0] - before < 40 * megabyte  # the file is 100 MB, the largest tensor 10
