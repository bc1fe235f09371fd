"""A file or a folder is written whole or not at all."""

import os

import pytest

from blip_qformer.atomic import atomic_file, atomic_folder, remove_folder, remove_partial, shared_partial


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
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "kept.partial"]


def test_a_folder_that_is_removed_half_counts_as_left_behind(tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    (tmp_path / "step-1").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "step-1")
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == []
