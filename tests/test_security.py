"""What files from strangers cannot do; SECURITY.md lists it, and which test holds what."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from blip_qformer.checkpoint import CheckpointError
from blip_qformer.checkpoint.read_tensors import read_tensors
from blip_qformer.data.pairs import encode_pair
from blip_qformer.data.shards import TarShard, find_shards, write_shard
from blip_qformer.data.stream import PairStream
from blip_qformer.imaging.segmentation import Segmenter
from blip_qformer.subject import Subject, load_subject, save_subject
from blip_qformer.subject.file import SubjectFileError
from blip_qformer.subject.file_name import checked_name
from blip_qformer.training.checkpointing import load_checkpoint, save_checkpoint
from blip_qformer.training.config import read_config
from tests import tiny
from tests.clipseg import write_clipseg
from tests.data.examples import first, keys, make_pair
from tools.host import ROOT

#: Names that lead out of a folder, to a device, to a share or to a hidden part of a file, on one system or another.
ELSEWHERE = (
    "../x",
    "..\\x",
    "a/../../x",
    "/etc/x",
    "\\x",
    "C:x",
    "C:\\x",
    "\\\\server\\share\\x",
    "//server/share/x",
    "\\\\?\\C:\\x",
    "file:///x",
    "x:stream",
    "~/x",
    "NUL",
    "con.v2",
    "COM¹",
    "LPT0",
    "x.",
    "x ",
    ".x",
    "a\nb",
    "a\u202eb",
)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", [name for name in ELSEWHERE if name != "x "])
def test_a_name_is_a_name_in_one_folder(name):
    with pytest.raises(ValueError, match="name"):
        checked_name(name)


def test_spaces_around_a_name_are_not_part_of_it():
    assert checked_name("x ") == "x"


#: Lists of what is on the disk. Subject on Background accepts any CLIPSeg as long as a mask makes it needless.
LISTED_FILES = {
    "BLIPDiffusionLoader": "checkpoint",
    "BLIPDiffusionQFormerLoader": "checkpoint",
    "BLIPDiffusionControlNetLoader": "checkpoint",
    "BLIPDiffusionTunedSubjectLoader": "checkpoint",
    "BLIPDiffusionSubjectLoad": "subject_file",
}


@pytest.mark.parametrize("elsewhere", [*ELSEWHERE, str(ROOT / "mini" / "model"), "../../mini/model"])
def test_no_list_takes_what_is_not_in_it(host, elsewhere):
    for node_id, name in LISTED_FILES.items():
        with pytest.raises(ValueError, match="was not found in"):
            host.nodes[node_id].validate_inputs(**{name: elsewhere})
    paths = host.module("nodes.host.model_paths")
    for models in (paths.CHECKPOINTS, paths.SEGMENTATION_MODELS, paths.SUBJECTS):
        with pytest.raises(ValueError, match="was not found in"):
            models.path(elsewhere)


def test_nothing_in_the_pack_starts_processes_fetches_or_runs_text():
    """Names of modules and functions, in every file that users get; what is left is listed here with its reason."""
    modules = {"subprocess", "socket", "requests", "http", "httpx", "urllib", "ftplib", "asyncio", "ctypes", "marshal"}
    modules |= {"shelve", "dill", "runpy", "importlib", "multiprocessing", "webdataset", "huggingface_hub"}
    builtins = {"eval", "exec", "compile", "__import__"}
    methods = {"system", "popen", "startfile", "run_module", "hf_hub_download", "snapshot_download", "urlopen"}
    forbidden = modules | builtins | methods
    found = set()
    for file in [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "blip_qformer").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call):
                function = node.func
                is_builtin = isinstance(function, ast.Name)
                name = function.id if is_builtin else getattr(function, "attr", "")
                names = [name] if name in (builtins if is_builtin else methods) else []
            found |= {(file.relative_to(ROOT).as_posix(), name) for name in names if name in forbidden}
    assert found == {
        ("blip_qformer/__init__.py", "importlib"),  # its own modules, when their names are first asked for
        ("blip_qformer/__main__.py", "importlib"),  # the command line, by this one name
        ("blip_qformer/data/prepare.py", "multiprocessing"),  # its own workers
        ("blip_qformer/data/shards.py", "urllib"),  # to take URLs apart; webdataset opens those that are allowed
        ("blip_qformer/download/hub.py", "huggingface_hub"),  # the model, when a person runs the node or the command
        ("blip_qformer/extras.py", "importlib"),  # optional packages, by names in the code
        ("blip_qformer/version.py", "importlib"),  # the version of the installed package
        ("nodes/host/attention/lost_edits.py", "importlib"),  # the host's module "nodes", by this one name
    }


def test_the_download_node_takes_no_names(host):
    """A graph from a stranger chooses between two fixed downloads, and says nothing about where from or where to."""
    inputs = host.nodes["BLIPDiffusionDownload"].INPUT_TYPES()
    widgets = {name: each for group in ("required", "optional") for name, each in inputs.get(group, {}).items()}
    assert {name: each[0] for name, each in widgets.items()} == {"what": "COMBO", "keep_original": "BOOLEAN"}
    assert widgets["what"][1]["options"] == ["model", "model and ControlNet"]
    assert not any(each[1].get("forceInput") or each[1].get("image_upload") for each in widgets.values())
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / "workflows").glob("*.json")]
    assert workflows
    assert not any("BLIPDiffusionDownload" in workflow for workflow in workflows)


def test_a_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_subject(outside, Subject(torch.zeros(1, 16, 8), "cat"))
    (tmp_path / "embeddings").mkdir()
    link = tmp_path / "embeddings" / "dog.safetensors"
    link.symlink_to(outside)
    save_subject(link, Subject(torch.ones(1, 16, 8), "dog"), overwrite=True)
    assert load_subject(outside).word == "cat"
    assert load_subject(link).word == "dog"
    assert not link.is_symlink()


def test_overwriting_is_for_subjects_only(tmp_path):
    """A graph that somebody shared says replace, and names another embedding of the user."""
    file = tmp_path / "negative.safetensors"
    save_file({"emb_params": torch.zeros(16, 8)}, file)
    with pytest.raises(FileExistsError, match="is no subject that was saved here, so that it is not replaced: choose"):
        save_subject(file, Subject(torch.ones(1, 16, 8), "dog"), overwrite=True)
    assert load_file(file)["emb_params"].sum() == 0


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_runs(tmp_path, suffix, zipped):
    mark, file = tmp_path / "ran", tmp_path / f"model{suffix}"
    if zipped:
        torch.save({"model": {"a": Code(mark)}}, file)
    else:
        file.write_bytes(pickle.dumps({"model": {"a": Code(mark)}}))
    with pytest.raises(CheckpointError):
        read_tensors(file)
    with pytest.raises(SubjectFileError):
        load_subject(file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists()  # so this is what would have happened


def test_no_pickle_runs_in_a_clipseg(tmp_path):
    mark, folder = tmp_path / "ran", write_clipseg(tmp_path / "clipseg")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"a": Code(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a CLIPSeg"):
        Segmenter(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "custom_checkpoint_0.pkl"])
def test_no_pickle_runs_in_a_checkpoint_of_a_run(tmp_path, name):
    class State:
        def state_dict(self):
            return {"updates": 3}

        def load_state_dict(self, state):
            assert state == {"updates": 3}

    tiny.reset_accelerate()
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(2, 2)
    accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    accelerator.register_for_checkpointing(State())
    path = save_checkpoint(accelerator, tmp_path, 1, {})
    assert load_checkpoint(accelerator, path, {}) == 1
    torch.save({"a": Code(tmp_path / "ran")}, path / name)
    with pytest.raises(ValueError, match="holds a pickle that is damaged or would run code, so it was left closed"):
        load_checkpoint(accelerator, path, {})
    assert not (tmp_path / "ran").exists()
    tiny.reset_accelerate()


def test_no_yaml_runs(tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "run.yaml"
    file.write_text(f"stage: !!python/object/apply:os.mkdir [{mark}]")
    with pytest.raises(ValueError, match="run.yaml"):
        read_config(file)
    assert not mark.exists()


@pytest.fixture
def no_process(monkeypatch):
    """Fail when a process is started, whichever way."""

    def started(*arguments, **_):
        pytest.fail(f"a process was started: {arguments}")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "popen"), (os, "posix_spawn"), (os, "fork")):
        monkeypatch.setattr(module, name, started)


@pytest.mark.parametrize("allow", [[], ["urls"]])
@pytest.mark.parametrize(
    "source",
    ["pipe:touch {mark}", " pipe:touch {mark}", "PIPE:touch {mark}", "pipe:touch {mark} index.json"],
)
def test_a_source_of_pairs_runs_no_command(tmp_path, no_process, source, allow):
    mark = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"runs a command of the shell, .* --allow commands if you trust it"):
        first(PairStream(source.format(mark=mark), allow=allow), 1)
    assert not mark.exists()


@pytest.mark.parametrize(
    "source",
    [
        "http://127.0.0.1:9/pairs.tar",
        "https://127.0.0.1:9/index.json",
        "gs://bucket/pairs-{000..003}.tar",
        "hf://datasets/a/b.tar",
        "htgs://127.0.0.1/x.tar",
        "ais://bucket/x.tar",
        "file://server/share/x.tar",
    ],
)
def test_a_source_of_pairs_fetches_nothing(no_process, source):
    with pytest.raises(ValueError, match=r"is fetched from a server, .* --allow urls if you trust it, or name files"):
        find_shards(source)


def test_braces_hide_no_command(tmp_path, no_process):
    for source in (f"{{pipe:touch {tmp_path / 'ran'},x}}", f"x{{,y}}pipe:touch {tmp_path / 'ran'}"):
        with pytest.raises(ValueError, match="There is no folder and no shard"):
            find_shards(source)
    with pytest.raises(ValueError, match="runs a command of the shell"):
        find_shards("pipe:{cat,touch} x", allow=["urls"])


def test_a_run_whose_file_names_a_command_is_refused(tmp_path, no_process):
    mark = tmp_path / "ran"
    config = tiny.make_config("vision", pairs=f"pipe:touch {mark}", output=str(tmp_path / "output"))
    with pytest.raises(ValueError, match="--allow commands"):
        tiny.run(config)
    assert not mark.exists()


def test_what_is_allowed_works(tmp_path):
    write_shard(tmp_path / "x.tar", map(make_pair, range(4)))
    stream = PairStream(f"pipe:cat {tmp_path / 'x.tar'}", allow=["commands"])
    assert sorted(keys(first(stream, 4))) == ["0000", "0001", "0002", "0003"]


@pytest.mark.parametrize(
    "name", ["../x.tar", "/tmp/x.tar", "..\\x.tar", "pipe:x", "\\\\server\\x.tar", "a/b.tar", "x|y"]
)
def test_an_index_names_files_beside_it(tmp_path, no_process, name):
    (tmp_path / "index.json").write_text(json.dumps({"complete": True, "shards": {name: 3}}))
    with pytest.raises(ValueError, match="shards lie beside their index: correct it"):
        find_shards(tmp_path)


def test_members_of_a_shard_are_never_written_to_disk(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as archive:
        for suffix, content in encode_pair(make_pair(0)).items():
            member = tarfile.TarInfo(f"../../escaped.{suffix}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    (pair,) = TarShard(str(folder / "x.tar")).read()
    assert pair.key == "../../escaped"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "x.tar"]
