"""Download the published model and convert it into the files that the loaders read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic import make_folder, only_writer
from ..checkpoint import open_checkpoint, save_qformer
from ..checkpoint.components import NON_EMA, SHARD, find_components
from ..checkpoint.convert import (
    CHECKPOINT_NAME,
    CONTROLNET_FOLDER,
    CONTROLNET_NAME,
    MODEL_FOLDER,
    QFORMER_NAME,
    controlnet_weights,
    stable_diffusion_weights,
)
from ..checkpoint.detect import Kind
from ..checkpoint.read_tensors import SAFETENSORS, TENSOR_FILES, CheckpointError
from ..checkpoint.weights import check_finite
from ..checkpoint.write_safetensors import data_size, write_safetensors
from .comfyui import ModelFolders
from .hub import INCOMPLETE, DownloadError, RemoteFile, fetch_file, is_whole, list_files, sha256_of

MODEL, CONTROLNET = "Salesforce/blipdiffusion", "Salesforce/blipdiffusion-controlnet"

DTYPE = torch.float16  # of the converted files

#: The file beside a component's weights that is needed; others are for other programs.
CONFIG = "config.json"

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""From a title and a number of bytes to a function that is called with each number of bytes done."""


@dataclass(frozen=True)
class Job:
    """What is downloaded together, and what is made of it.

    Args:
        repository: ``owner/name`` on the Hub.
        components: Folders of the repository that are needed.
        folder: Name of the folder in ``models/blip_diffusion`` that the download may be kept as.
        targets: The converted files.
        convert: Function of the download's folder, the targets to be written, and a progress.
    """

    repository: str
    components: tuple[str, ...]
    folder: str
    targets: tuple[Path, ...]
    convert: Callable[[Path, Sequence[Path], Progress], None]


def wanted_files(folders: ModelFolders, controlnet: bool = False) -> list[Path]:
    """Return the converted files, whether they are there or not.

    Args:
        folders: ComfyUI's folders for models.
        controlnet: Whether the ControlNet for Canny edges is wanted too.
    """
    return [target for job in _jobs(folders, controlnet) for target in job.targets]


def download_model(
    folders: ModelFolders,
    progress: Progress,
    report: Callable[[str], object],
    *,
    controlnet: bool = False,
    keep_original: bool = False,
) -> None:
    """Download the published model and convert it to float16, as far as it is not there yet.

    What is downloaded lies in a hidden folder until all of it is converted, so that a call that failed or was cancelled
    goes on where it was. The models folders only ever hold whole files.

    Args:
        folders: ComfyUI's folders for models.
        progress: See :data:`Progress`. What its function raises ends the download, which can go on later.
        report: A function that is called with a sentence for each step.
        controlnet: Whether to add the ControlNet for Canny edges, 1.4 GB, that the authors published.
        keep_original: Whether to keep the published files of the model too, beside the converted ones.

    Raises:
        DownloadError: Something could not be fetched.
        CheckpointError: It is not what it should be.
        OSError: There is too little room, or a folder cannot be written to.
    """
    for job in _jobs(folders, controlnet):
        missing = [target for target in job.targets if not _is_there(target)]
        kept = folders.blip_diffusion / job.folder if keep_original and job.repository == MODEL else None
        if not missing and (kept is None or kept.is_dir()):
            report(f"{' and '.join(str(target) for target in job.targets)}: there already.")
            continue
        for folder in {folders.blip_diffusion, *(target.parent for target in missing)}:
            make_folder(folder)
        download = folders.blip_diffusion / f".{job.folder}.download"
        with only_writer(download, "download"):
            report(f"Downloading {job.repository} to {download}; it is converted when all of it is there.")
            _download(job, download, folders, missing, progress)
            job.convert(download, missing, progress)
        for target in missing:
            report(f"Wrote {target}.")
        _finish(download, kept, report)


def _jobs(folders: ModelFolders, controlnet: bool) -> list[Job]:
    model = Job(
        MODEL,
        ("qformer", "unet", "text_encoder", "vae"),
        MODEL_FOLDER,
        (folders.checkpoints / CHECKPOINT_NAME, folders.blip_diffusion / QFORMER_NAME),
        _convert_model,
    )
    # Its other networks are the model's: the authors' archive has one set of them for both (LAVIS, blip-diffusion).
    canny = Job(CONTROLNET, ("controlnet",), CONTROLNET_FOLDER, (folders.controlnet / CONTROLNET_NAME,), _convert_canny)
    return [model, canny] if controlnet else [model]


def _download(
    job: Job,
    download: Path,
    folders: ModelFolders,
    missing: Sequence[Path],
    progress: Progress,
) -> None:
    """Fetch the files of a job, after it is known that there is room for them and for what is made of them."""
    files = needed_files(list_files(job.repository), job.components)
    _take_over(folders.blip_diffusion / job.folder, download, files)
    _check_room(download, files, missing)
    for file in files:
        with progress(file.name, file.size) as update:
            fetch_file(file, download, update)


def needed_files(files: Iterable[RemoteFile], components: Sequence[str]) -> list[RemoteFile]:
    """Return the files of a repository that a loader reads: of each component one set of weights, and the config.

    A repository may hold the same weights several times. The choice is that of ``find_components``: no ``non_ema``,
    ``.safetensors`` before pickles, the larger before the smaller.

    Args:
        files: All files.
        components: Folders that are needed.

    Raises:
        DownloadError: A component has no weights.
    """
    files, needed = list(files), []
    for component in components:
        weights: dict[tuple[str, str], list[RemoteFile]] = {}
        for file in files:
            path = PurePosixPath(file.name)
            if path.parent.as_posix() != component:
                continue
            if path.name == CONFIG:
                needed.append(file)
            elif path.suffix.lower() in TENSOR_FILES:
                shard = SHARD.search(path.name)
                weights.setdefault((SHARD.sub("", path.name), shard["count"] if shard else ""), []).append(file)
        if not weights:
            names = {file.repository for file in files}
            raise DownloadError(
                f"{', '.join(names) or 'The repository'} holds no weights in {component}, where they were published: "
                "it has changed, or the mirror has not got all of it. Look for a newer version of this pack."
            )
        needed += min(weights.values(), key=_preference)
    return needed


def _preference(files: Sequence[RemoteFile]) -> tuple[bool, bool, int, int, str]:
    """Return a sort key that puts the preferred weights first."""
    path = PurePosixPath(files[0].name)
    return (
        NON_EMA.search(path.name) is not None,
        path.suffix.lower() not in SAFETENSORS,
        -sum(file.size for file in files),
        len(path.name),
        path.name,
    )


def _take_over(folder: Path, download: Path, files: Iterable[RemoteFile]) -> None:
    """Give whole files of a folder that was downloaded by other means a second name among ours."""
    for file in files:
        theirs, ours = folder / file.name, download / file.name
        if ours.exists() or not is_whole(theirs, file) or (file.sha256 and sha256_of(theirs) != file.sha256):
            continue
        ours.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # the file system knows no second names: then it is fetched
            os.link(theirs, ours)


def _check_room(download: Path, files: Sequence[RemoteFile], missing: Sequence[Path]) -> None:
    """Refuse disks with too little room for what is still to be fetched and for the converted files."""
    needs: dict[int, tuple[Path, int, int]] = {}  # device -> folder, bytes to fetch, bytes to write
    for folder, fetched, written in [(download, sum(map(_lacking(download), files)), 0), *_sizes(files, missing)]:
        device = folder.stat().st_dev
        first, *sums = needs.get(device, (folder, 0, 0))
        needs[device] = (first, sums[0] + fetched, sums[1] + written)
    for folder, fetched, written in needs.values():
        free = shutil.disk_usage(folder).free
        if free < fetched + written:
            raise OSError(
                f"{folder} has {_gigabytes(free)} free, and {_gigabytes(fetched + written)} are needed: "
                f"{_gigabytes(fetched)} to download and {_gigabytes(written)} for the converted files. Make room there "
                "and run it again."
            )


def _lacking(download: Path) -> Callable[[RemoteFile], int]:
    def lacking(file: RemoteFile) -> int:
        path = download / file.name
        partial = path.with_name(path.name + INCOMPLETE)
        there = next((each.stat().st_size for each in (path, partial) if each.is_file()), 0)
        return max(0, file.size - there)

    return lacking


def _sizes(files: Iterable[RemoteFile], missing: Iterable[Path]) -> list[tuple[Path, int, int]]:
    """Return folder and size of the files to be converted: half of what is published, which is in float32."""
    qformer = sum(file.size for file in files if file.name.startswith("qformer/")) // 2
    rest = sum(file.size for file in files) // 2 - qformer
    return [(target.parent, 0, qformer if target.name == QFORMER_NAME else rest) for target in missing]


def _gigabytes(count: int) -> str:
    return f"{count / 10**9:.2f} GB"


def _convert_model(download: Path, targets: Sequence[Path], progress: Progress) -> None:
    checkpoint = open_checkpoint(download)
    check_finite(checkpoint.encoder_state_dict, checkpoint.encoder_path)
    for target in targets:
        if target.name == QFORMER_NAME:
            weights, config = checkpoint.encoder_state_dict, checkpoint.encoder_config
            with progress(target.name, data_size(weights, DTYPE)) as update:
                save_qformer(target, weights, config, dtype=DTYPE, progress=update)
        else:
            _write(target, stable_diffusion_weights(checkpoint)[0], progress)


def _convert_canny(download: Path, targets: Sequence[Path], progress: Progress) -> None:
    components, problems = find_components(download)
    weights = controlnet_weights(components.get(Kind.CONTROLNET))
    if not weights:
        raise CheckpointError(" ".join([f"{download} holds no ControlNet that can be read.", *problems]))
    for target in targets:
        _write(target, weights, progress)


def _write(target: Path, weights: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a file for a stock loader."""
    with progress(target.name, data_size(weights, DTYPE)) as update:
        write_safetensors(target, weights, metadata={"format": "pt"}, dtype=DTYPE, progress=update)


def _is_there(target: Path) -> bool:
    """Return whether a converted file is there, whole.

    Raises:
        FileExistsError: There is a file of that name that is not whole. We leave none, so that it is the user's.
    """
    if not target.exists():
        return False
    try:
        with safe_open(target, "pt"):  # the header says how long the file must be
            return True
    except (SafetensorError, OSError) as error:
        raise FileExistsError(
            f"{target} is there already and is not whole ({error}): move or delete it, and run this again."
        ) from error


def _finish(download: Path, kept: Path | None, report: Callable[[str], object]) -> None:
    """Give the download its name among the models, or remove it."""
    if kept is not None and not kept.exists():
        download.rename(kept)
        report(f"Kept what was downloaded as {kept}.")
    else:
        shutil.rmtree(download)
