"""Commands, code and messages in the README and on the pages that it leads to are those that there are."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess

import pytest
from PIL import Image

from blip_qformer.cli import main
from blip_qformer.pipeline import new_pipeline, save_pipeline
from blip_qformer.training.config import read_config
from tests import oracle, tiny
from tests.clipseg import write_clipseg
from tests.random_weights import write_hub_folder
from tests.test_archive import git_files
from tools.host import ROOT, comfyui_path

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/models.md", "docs/training.md")
}
BLOCKS = [
    block
    for page in PAGES.values()
    for block in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)
]
COMMANDS = {line.strip() for language, block in BLOCKS if not language for line in block.splitlines()}
COMMAND = "python -m blip_qformer "
MINI_RUNS = ROOT / "mini" / "runs"

NEEDS_THE_NETWORK = {
    "python -m blip_qformer download",  # tests/cli/test_download.py, against a server of its own
    "hf download Salesforce/blipdiffusion --local-dir models/blip_diffusion/blipdiffusion",
    "pip install accelerate diffusers tensorboard webdataset pymatting",
}
RUN_BY_OTHER_TESTS = {
    "make demo",  # tests/test_demo.py
    "python -m blip_qformer.pipeline.initial_weights clip-vit-large-patch14 bert-base-uncased "
    "stable-diffusion-v1-5 first",  # tests/pipeline/test_initial_weights.py
}
LINKS_THE_SMALL_MODEL = (
    "mkdir -p ../../models/blip_diffusion",
    'ln -s "$PWD/mini/model" ../../models/blip_diffusion/blipdiffusion',
)
TAKES_A_DAY = {"make mini"}  # what it runs, and with what, is tested here

QUICKLY = ["--steps", "1", "--resolution", "64", "--validate-every", "0"]  # what takes a minute on a graphics card
IN_THIS_PROCESS = ["--workers", "1"]

PUBLISHED = "../../models/blip_diffusion/blipdiffusion"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A small one of everything that the commands name, by its name there."""
    folder = tmp_path_factory.mktemp("paths")
    for name in ("photographs", "backgrounds"):
        (folder / name).mkdir()
        Image.new("RGB", (64, 64), "green").save(folder / name / "one.png")
    line = {"file": "one.png", "word": "lawn"}
    (folder / "photographs" / "metadata.jsonl").write_text(json.dumps(line))
    tiny.write_pairs(folder / "given")
    run = {
        "stage": "multimodal",
        "model": tiny.SIZES,
        "pairs": str(folder / "given"),
        "output": str(folder / "trained"),
    }
    run |= {"steps": 1, "batch_size": 4, "learning_rate": 1e-4, "num_workers": 0, "options": tiny.OPTIONS["multimodal"]}
    (folder / "run.yaml").write_text(json.dumps(run))  # all JSON is YAML
    rex = [f"rex-{number}.jpg" for number in (1, 2, 3)]
    for name in rex:
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / name)
    named = {
        name: folder / name for name in ("photographs", "backgrounds", "pairs", "run.yaml", "converted", "tuned", *rex)
    }
    named["models/blip_diffusion/blipdiffusion"] = save_pipeline(new_pipeline(tiny.SIZES, seed=0), folder / "model")
    published = write_hub_folder(oracle.pipeline(oracle.SMALL, folder / "bert", comfyui_path()), folder / "hub")
    return {**named, PUBLISHED: published, "clipseg-rd64-refined": write_clipseg(folder / "clipseg")}


def test_every_command_is_accounted_for():
    ours = {command for command in COMMANDS if command.startswith(COMMAND)}
    assert len(ours) > 5
    assert ours | NEEDS_THE_NETWORK | RUN_BY_OTHER_TESTS | TAKES_A_DAY | {*LINKS_THE_SMALL_MODEL} == COMMANDS


def test_the_small_model_gets_the_name_that_the_workflows_ask_for(tmp_path):
    pack = tmp_path / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    (pack / "mini").symlink_to(ROOT / "mini")
    for command in LINKS_THE_SMALL_MODEL:
        assert command in (ROOT / "mini" / "README.md").read_text(encoding="utf-8")
        subprocess.run(["bash", "-c", command], cwd=pack, check=True)
    nodes = json.loads((ROOT / "workflows" / "subject-generation.json").read_text(encoding="utf-8"))["nodes"]
    (name,) = [node["widgets_values"][0] for node in nodes if node["type"] == "BLIPDiffusionLoader"]
    assert (tmp_path / "models" / "blip_diffusion" / name / "model_index.json").is_file()


@pytest.mark.parametrize("command", sorted(line for line in COMMANDS - NEEDS_THE_NETWORK if line.startswith(COMMAND)))
def test_commands_run_in_the_packs_folder(command, paths, monkeypatch, capsys):
    """In this process: tests/cli/test_command_line.py starts it in its own, from here and by its path."""
    name, *words = shlex.split(command.removeprefix(COMMAND))
    options = {"finetune": QUICKLY, "prepare": IN_THIS_PROCESS}.get(name, [])
    monkeypatch.chdir(ROOT)
    code = main([name, *(str(paths.get(word, word)) for word in words), *options])
    assert code == 0, capsys.readouterr().err


def test_make_mini_runs_every_run_and_evaluates_the_last():
    dry = subprocess.run(["make", "--dry-run", "mini"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"-m mini pretrain (mini/runs/\S+\.yaml)", dry)
    runs = [read_config(ROOT / name) for name in names]
    assert names == [str(file.relative_to(ROOT)) for file in sorted(MINI_RUNS.glob("[0-9]*.yaml"))]
    made = {ROOT / word for word in shlex.split(dry.replace(";", " ")) if "pairs-" in word}
    ((placed_from, placed_pairs, placed),) = re.findall(r"place-queries (\S+) (\S+) (\S+)", dry)
    models_made = {ROOT / each.output / "model" for each in runs}
    assert ROOT / placed_from in models_made
    assert ROOT / placed_pairs in made
    for run in runs:
        assert {ROOT / pairs.partition("/pairs-{")[0] for pairs in run.pairs} <= made
        models = [*run.networks.values(), *([run.model] if isinstance(run.model, str) else [])]
        assert {ROOT / model for model in models} <= models_made | {ROOT / placed}
    assert f"evaluate report {runs[-1].output / 'model'} " in dry


def test_python_example_runs_as_it_stands(monkeypatch):
    (example,) = [block for language, block in BLOCKS if language == "python"]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - the README's own text
    assert names["subject"].word == "buoy"
    assert names["subject"].vectors.shape[:2] == (1, 16)
    assert names["subject"].vectors.isfinite().all()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`(?:\w+=\S+ )?make (\w+)", "".join(PAGES.values())))))
def test_make_knows_the_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_workflow_has_a_recipe_with_its_image():
    names = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    row = r'^\| <img src="\S+/workflows/([\w-]+)\.jpg".* \*\*\[`([\w-]+)`\]\(workflows/([\w-]+)\.json\)'
    recipes = re.findall(row, README, re.MULTILINE)
    assert {name for recipe in recipes for name in recipe} == names
    assert all(len(set(recipe)) == 1 for recipe in recipes)


def sentences() -> set[str]:
    """Return all texts in the code of nodes and library; what is inserted into them is an ellipsis."""
    found = set()
    for file in (*(ROOT / "nodes").rglob("*.py"), *(ROOT / "blip_qformer").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_that_it_explains_are_in_the_code():
    table = README.partition("## When a message comes")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE)
    assert len(messages) > 10
    known = sentences()
    assert [message for message in messages if not any(message in sentence for sentence in known)] == []


def repository() -> str:
    """Return the address that pyproject.toml names, which is the one place to change it."""
    found = re.search(r'^Repository = "https://github\.com/(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_what_leads_out_of_the_archive_has_a_whole_address():
    """The registry's copy has neither docs nor assets; and no image is shown there by a relative path."""
    archive = git_files() - git_files("--ignored", "--exclude-from=.comfyignore")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)#\s]+)\)", README)
    assert links
    relative = [link for _, link in links if not link.startswith("http")]
    assert [link for link in relative if link not in archive] == []
    assert [link for image, link in links if image and not link.startswith("https://")] == []


def test_addresses_of_this_repository_are_of_files_that_it_has():
    here = repository()
    texts = [README, *((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CONTRIBUTING.md"))]
    on_main = r"https://(?:github\.com/(\S+?)/blob|raw\.githubusercontent\.com/(\S+?))/main/([^\s\")#]+)"
    ours = [(blob or raw, path) for text in texts for blob, raw, path in re.findall(on_main, text)]
    assert len(ours) > 20
    assert {owner for owner, _ in ours} == {here}
    assert [path for _, path in ours if not (ROOT / path).exists()] == []
