"""A file or a folder is written whole or not at all."""

import errno
import os

import pytest

from blip_qformer.atomic import (
    atomic_file,
    atomic_files,
    atomic_folder,
    only_writer,
    remove_folder,
    remove_partial,
    shared_partial,
)


def write(path, content, failure=None):
    """Write a file, or a folder with one file in it, and fail before it is complete if asked."""
    with (atomic_file if path.suffix else atomic_folder)(path) as temporary:
        if path.suffix:
            temporary.write_text(content)
        else:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "file").write_text(content)
        if failure:
            raise failure


def read(path):
    return path.read_text() if path.suffix else (path / "inner" / "file").read_text()


TARGETS = pytest.mark.parametrize("name", ["a.txt", "folder"])


@TARGETS
def test_it_is_there_afterwards_and_nothing_else(tmp_path, name):
    for content in ("first", "second"):
        write(tmp_path / name, content)
        assert read(tmp_path / name) == content
        assert os.listdir(tmp_path) == [name]


@TARGETS
@pytest.mark.parametrize("failure", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_changes_nothing(tmp_path, name, failure, existing):
    path = tmp_path / name
    if existing:
        write(path, "old")
    with pytest.raises(type(failure)):
        write(path, "half", failure)
    assert os.listdir(tmp_path) == ([name] if existing else [])
    if existing:
        assert read(path) == "old"


@TARGETS
@pytest.mark.parametrize("refused", ["first", "last"])
def test_a_rename_that_fails_leaves_the_old_one(tmp_path, name, refused, monkeypatch):
    write(tmp_path / name, "old")
    replace = os.replace

    def refuse(source, target):
        if refused == "first" or str(source).endswith(".partial"):
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="in use"):
        write(tmp_path / name, "new")
    assert read(tmp_path / name) == "old"
    assert os.listdir(tmp_path) == [name]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def note(descriptor):
        assert not (tmp_path / "folder").exists()
        flushed.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "folder", "four")
    assert flushed == [4]


def test_the_parents_of_a_folder_are_made(tmp_path):
    write(tmp_path / "a" / "b", "content")
    assert read(tmp_path / "a" / "b") == "content"


def test_the_longest_name_can_be_written(tmp_path):
    name = "x" * 251 + ".txt"
    write(tmp_path / name, "content")
    assert os.listdir(tmp_path) == [name]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    shared_partial(tmp_path / "step-1").mkdir()
    (shared_partial(tmp_path / "step-1") / "file").touch()
    (tmp_path / ".0123.partial").touch()
    (tmp_path / "kept.partial").touch()
    (tmp_path / ".hidden").touch()
    for name in (".ab.0.partial", ".ab.1.partial", ".ab.partial.lock"):
        (tmp_path / name).touch()
    remove_partial(tmp_path, exclusive=True)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "kept.partial"]


def test_the_next_write_removes_what_no_process_holds(tmp_path):
    (tmp_path / ".ab.partial.lock").touch()
    (tmp_path / ".ab.0.partial").mkdir()
    (tmp_path / ".ab.0.partial" / "gigabytes").touch()
    write(tmp_path / "a.txt", "content")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_running_write_is_let_be(tmp_path):
    with atomic_file(tmp_path / "slow.txt") as temporary, atomic_folder(tmp_path / "slow") as folder:
        temporary.write_text("half")
        (folder / "file").write_text("half")
        write(tmp_path / "quick.txt", "content")
        remove_partial(tmp_path, exclusive=True)
        assert temporary.read_text() == (folder / "file").read_text() == "half"
    assert sorted(os.listdir(tmp_path)) == ["quick.txt", "slow", "slow.txt"]


def test_without_a_lock_age_decides(tmp_path):
    """As with what earlier versions left; a folder is as old as the newest file in it."""
    for name in ("old", "new"):
        folder = tmp_path / f".{name}.partial"
        folder.mkdir()
        (folder / "file").touch()
        os.utime(folder, (0, 0))
    os.utime(tmp_path / ".old.partial" / "file", (0, 0))
    write(tmp_path / "a.txt", "content")
    assert sorted(os.listdir(tmp_path)) == [".new.partial", "a.txt"]


def test_files_that_belong_together_are_exchanged_together(tmp_path):
    paths = [tmp_path / "subject", tmp_path / "lora"]
    for content in ("old", "new"):
        with atomic_files(paths) as temporaries:
            for temporary in temporaries:
                temporary.write_text(content)
        assert [path.read_text() for path in paths] == [content] * 2
        assert sorted(os.listdir(tmp_path)) == ["lora", "subject"]

    def fail():
        with atomic_files(paths) as temporaries:
            temporaries[0].write_text("half")
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert [path.read_text() for path in paths] == ["new"] * 2
    assert sorted(os.listdir(tmp_path)) == ["lora", "subject"]


@pytest.mark.parametrize("existing", [True, False])
def test_an_exchange_of_which_one_file_is_in_use_is_taken_back(tmp_path, monkeypatch, existing):
    paths = [tmp_path / "subject", tmp_path / "lora"]
    if existing:
        for path in paths:
            path.write_text("old")
    replace = os.replace

    def refuse(source, target):
        if target == paths[1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))
        replace(source, target)

    def write_both():
        with atomic_files(paths) as temporaries:
            for temporary in temporaries:
                temporary.write_text("new")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="another program has it open: close that, or choose another folder"):
        write_both()
    assert sorted(os.listdir(tmp_path)) == (["lora", "subject"] if existing else [])
    assert [path.read_text() for path in paths if existing] == ["old", "old"] * existing


def test_a_write_within_a_write_names_what_the_user_asked_for(tmp_path, monkeypatch):
    def write_inside():
        with atomic_folder(tmp_path / "model") as folder, atomic_file(folder / "weights") as temporary:
            temporary.write_text("content")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        OSError, match=f"^{tmp_path / 'model'} could not be written .No space left on device.: make room"
    ):
        write_inside()


def test_an_exchange_that_was_killed_halfway_is_brought_to_its_end(tmp_path):
    (tmp_path / "subject").write_text("new")
    (tmp_path / "lora").write_text("old")
    (tmp_path / ".ab.1.partial").write_text("new")
    (tmp_path / ".ab.partial.moves").write_text('{".ab.0.partial": "subject", ".ab.1.partial": "lora"}')
    (tmp_path / ".ab.partial.lock").touch()
    write(tmp_path / "a.txt", "content")
    assert (tmp_path / "lora").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "lora", "subject"]


@pytest.mark.parametrize(
    "moves",
    [
        '{".ab.0.partial": "../stolen"}',
        '{".ab.0.partial": "..\\\\stolen"}',
        '{".ab.0.partial": "/tmp/stolen"}',
        '{"precious": ".ab.partial"}',
        '{"../precious": "stolen"}',
        '{".ab.0.par',
        "[" * 100_000,
        "7",
    ],
)
def test_a_list_of_renames_from_elsewhere_does_nothing(tmp_path, moves):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "precious", tmp_path / "precious", folder / ".ab.0.partial"):
        path.write_text("content")
    (folder / ".ab.partial.moves").write_text(moves)
    (folder / ".ab.partial.lock").touch()
    write(folder / "a.txt", "content")
    assert sorted(os.listdir(folder)) == ["a.txt", "precious"]
    assert sorted(os.listdir(tmp_path)) == ["folder", "precious"]


@pytest.mark.parametrize("new", [True, False])
def test_a_folder_whose_exchange_was_killed_comes_back(tmp_path, new):
    write(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".ab.model.old")
    if new:
        write(tmp_path / "model", "new")
    (tmp_path / ".ab.partial.lock").touch()
    remove_partial(tmp_path)
    assert read(tmp_path / "model") == ("new" if new else "old")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, r"could not be written \(No space left on device\): make room on that disk or choose another"),
        (errno.EDQUOT, r"could not be written \(Disk quota exceeded\): make room on that disk"),
        (errno.EACCES, r"could not be written \(Permission denied\): you may not write there"),
        (errno.EROFS, r"could not be written \(Read-only file system\): you may not write there"),
    ],
)
@TARGETS
def test_an_error_names_the_file_and_what_to_do(tmp_path, monkeypatch, name, number, sentence):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"^{tmp_path / name} {sentence}"):
        write(tmp_path / name, "content")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_long_name_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*gone is not there: create it, or choose another one\.$"):
        write(tmp_path / "gone" / "a.txt", "content")
    with pytest.raises(OSError, match=r"could not be written \(File name too long\): choose a shorter name"):
        write(tmp_path / ("x" * 260 + ".txt"), "content")


def test_an_error_about_another_file_is_not_blamed_on_this_one(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(FileNotFoundError, match=r"source/gone"), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_bytes((tmp_path / "source" / "gone").read_bytes())


def test_one_process_at_a_time_writes_into_a_folder(tmp_path):
    with only_writer(tmp_path, "prepare"):
        for _ in range(2):  # the second one does not free the first one's lock
            with pytest.raises(ValueError, match="Another prepare is writing .*: wait until it has ended, or choose"):
                only_writer(tmp_path, "prepare").__enter__()
    with only_writer(tmp_path, "prepare"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_removed_half_counts_as_left_behind(tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    (tmp_path / "step-1").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "step-1")
    remove_partial(tmp_path, exclusive=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [".*.partial.lock", ".**.partial.lock", ".[0-9a-f]*.partial.lock"])
def test_a_name_that_is_a_pattern_touches_no_write(tmp_path, name):
    """Such a file, which no write of ours makes, once removed what a running write held, or stopped every write."""
    with atomic_file(tmp_path / "one.txt") as temporary:
        temporary.write_text("one")
        (tmp_path / name).touch()
        with atomic_file(tmp_path / "two.txt") as other:
            other.write_text("two")
    assert (tmp_path / "one.txt").read_text() == "one"
    assert (tmp_path / "two.txt").read_text() == "two"
    assert (tmp_path / name).exists()
