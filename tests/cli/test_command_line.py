"""The command line as a whole: one line for what went wrong, and the ways to start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import blip_qformer
from blip_qformer.cli.command_line import main
from tests.cli.refusal import assert_one_line_refusal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["inspect"], ["convert", "out"]])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys, command):
    (tmp_path / "text.bin").write_text("not a checkpoint")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{")
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name in ("nothing there", "text.bin", "empty.safetensors", "cut.safetensors", "folder"):
        path = tmp_path / name
        arguments = [command[0], str(path), *(str(tmp_path / word) for word in command[1:])]
        assert_one_line_refusal(main(arguments), capsys, str(path))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("words", [[], ["translate"], ["convert", "a"], ["convert", "a", "b", "--dtype", "int8"]])
def test_words_it_does_not_know_end_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: blip-qformer" in capsys.readouterr().err


def test_it_runs_as_a_module_from_the_packs_folder(sources, tmp_path):
    words = [sys.executable, "-m", "blip_qformer", "inspect"]
    fine = subprocess.run([*words, sources["Hub folder"]], cwd=ROOT, capture_output=True, text=True)
    assert fine.returncode == 0
    assert "Hub folder" in fine.stdout
    wrong = subprocess.run([*words, tmp_path / "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("blip-qformer: ")
    assert wrong.stderr.count("\n") == 1


def test_it_runs_by_its_path_from_anywhere(tmp_path):
    words = [sys.executable, "-P", ROOT / "blip_qformer", "--version"]
    if sys.version_info < (3, 11):
        words.remove("-P")  # the folder of this repository is not on the path, as for ComfyUI portable's Python
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"blip-qformer {blip_qformer.__version__}\n", "")


def test_without_torch_it_says_in_a_line_what_to_do(tmp_path):
    words = [sys.executable, "-I", "-S", ROOT / "blip_qformer", "--version"]  # -S: without any installed package
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("blip-qformer: the package torch is missing in this Python (")
    assert done.stderr.count("\n") == 1
    assert "pip install '.[library]'" in done.stderr


def test_the_library_extra_has_all_that_the_library_may_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = {name.replace("-", "_") for name in project["project"]["optional-dependencies"]["library"]}
    rules = {rule["name"]: rule for rule in project["tool"]["importlinter"]["contracts"]}
    allowed = {
        {"PIL": "pillow"}.get(package, package)
        for rule in (
            "The library's upper half needs only what every ComfyUI brings",
            "imaging adds transformers, which ComfyUI brings too, for CLIPSeg",
        )
        for package in rules[rule]["packages"]
    }
    assert allowed <= extra


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"blip-qformer {blip_qformer.__version__}\n"
