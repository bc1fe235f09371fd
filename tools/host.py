"""Run the real ComfyUI as a process: find it, lay out its folders, start it, queue prompts, stop it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import websocket

ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "blip-diffusion"
MODEL_FOLDERS = (
    "blip_diffusion",
    "checkpoints",
    "clip",
    "controlnet",
    "diffusers",
    "embeddings",
    "loras",
    "text_encoders",
    "vae",
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}

Prompt = dict[str, dict[str, Any]]
"""A graph as the host executes it: node id -> ``{"class_type": ..., "inputs": {...}}``."""


class ServerError(RuntimeError):
    """The host could not be started, or ended on its own."""


class WorkflowError(RuntimeError):
    """The host refused a prompt, or a node in it failed.

    Attributes:
        node_id: Id of the node that failed, or "" if the prompt as a whole was refused.
        class_type: Class of that node, or "".
        exception_type: Name of the Python exception, or the host's name for the refusal.
        message: Message of the node or the host.
    """

    def __init__(self, node_id: str, class_type: str, exception_type: str, message: str):
        self.node_id, self.class_type = node_id, class_type
        self.exception_type, self.message = exception_type, message
        where = f"node {node_id} ({class_type})" if node_id else "the prompt"
        super().__init__(f"{where}: {exception_type}: {message}")


@dataclass
class History:
    """The outcome of one queued prompt.

    Attributes:
        prompt_id: Id that the host gave it.
        executed: Ids of the nodes that ran, in order.
        cached: Ids of the nodes whose earlier results were used.
        files: Files that each node wrote, by its id.
        texts: Texts that each node shows, by its id.
        outputs: Everything that each node sent to the browser, by its id, in the host's form.
    """

    prompt_id: str
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)


def comfyui_path() -> Path:
    """Return the folder of the ComfyUI to develop against: ``COMFYUI_PATH``, or the one that ``make env`` unpacked.

    Raises:
        ServerError: If there is no ComfyUI.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    path = Path(chosen).expanduser().resolve() if chosen else ROOT / ".host" / "ComfyUI"
    if not (path / "main.py").is_file():
        remedy = "set COMFYUI_PATH to a folder with main.py, or unset it" if chosen else "run `make env`"
        raise ServerError(f"No ComfyUI is at '{path}' (main.py is missing): {remedy}.")
    return path


def make_base_directory(base: Path, pack: Path | None = ROOT) -> Path:
    """Make the folders that ComfyUI's ``--base-directory`` expects, with the pack in ``custom_nodes``.

    Args:
        base: Folder to fill; existing files stay.
        pack: Folder of the pack, or None for a host with stock nodes only.

    Returns:
        The absolute path of ``base``.
    """
    base = Path(base).resolve()
    folders = ["custom_nodes", "input", "output", "temp", "user", *(f"models/{name}" for name in MODEL_FOLDERS)]
    for folder in folders:
        (base / folder).mkdir(parents=True, exist_ok=True)
    installed = base / "custom_nodes" / PACK_NAME
    if pack is not None and not installed.exists():
        try:
            installed.symlink_to(pack, target_is_directory=True)
        except OSError:
            # The root also holds the environment and the host, both in folders with a dot.
            ignored = shutil.ignore_patterns(".*", "output", "__pycache__", "*.egg-info")
            shutil.copytree(pack, installed, ignore=ignored)
    return base


class ComfyServer:
    """A ComfyUI server that runs as long as the ``with`` block does.

    Everything it writes, its log included, stays in the base directory.

    Args:
        base: Folder made by :func:`make_base_directory`.
        arguments: Further options for ComfyUI's ``main.py``.
        start_timeout: Seconds after which a server that does not answer has failed.
    """

    def __init__(self, base: Path, arguments: tuple[str, ...] = (), start_timeout: float = 300.0) -> None:
        self.base = Path(base).resolve()
        self.arguments = arguments
        self.start_timeout = start_timeout
        self.log_file = self.base / "server.log"
        self.address = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of the server and its frontend, such as ``http://127.0.0.1:50123``."""
        return f"http://{self.address}"

    def __enter__(self) -> ComfyServer:
        port = _free_port()
        self.address = f"127.0.0.1:{port}"
        command = [sys.executable, "main.py", "--base-directory", str(self.base), "--port", str(port)]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--cpu"] if not _has_cuda() else []
        command += self.arguments
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=comfyui_path(),
                env={**os.environ, **OFFLINE, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, so that stopping it also stops what it started
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Terminate the server, then kill whatever it started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        with suppress(ProcessLookupError):  # raised when nothing is left to end
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill(self) -> None:
        """End the server as a power failure does; it stays down until the block ends."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def log(self) -> str:
        """Return what the server has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def object_info(self) -> dict[str, Any]:
        """Return the definition of every node that the server knows, by its class."""
        return self._get("/object_info")

    def add_input(self, file: Path) -> str:
        """Copy a file into the input folder, and return its name in Load Image's list."""
        shutil.copy(file, self.base / "input" / file.name)
        return file.name

    def queue(
        self,
        prompt: Prompt,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        timeout: float = 900.0,
    ) -> History:
        """Run a prompt and wait for its end.

        Args:
            prompt: Prompt in the API's form.
            on_event: Function that is called with the kind and the data of each message of the host.
            timeout: Seconds without a message after which the run has failed.

        Returns:
            The outcome.

        Raises:
            WorkflowError: If the prompt was refused, a node failed, or the run was interrupted.
            ServerError: If the connection to the server was lost.
        """
        client = uuid.uuid4().hex
        # The socket opens before the prompt is sent, or the first messages would be missed.
        connection = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=timeout)
        try:
            history = History(self._submit(prompt, client))
            self._follow(connection, history, on_event)
        except (websocket.WebSocketException, OSError) as problem:
            raise ServerError(
                f"The connection to ComfyUI was lost ({problem}); its log ends:\n{self._log_end()}"
            ) from None
        finally:
            connection.close()
        self._collect_outputs(history)
        return history

    def interrupt(self) -> None:
        """Ask the server to stop the prompt it is running."""
        self._post("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask the server to unload its models and to forget cached results, as soon as it is idle."""
        self._post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def save_settings(self, settings: dict[str, Any]) -> None:
        """Store settings of the frontend, as its settings dialog does."""
        self._post("/settings", settings)

    def _submit(self, prompt: Prompt, client: str) -> str:
        response = requests.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}, timeout=60)
        answer = response.json()
        if response.status_code != 200:
            raise _refusal(answer)
        return answer["prompt_id"]

    def _follow(
        self,
        connection: websocket.WebSocket,
        history: History,
        on_event: Callable[[str, dict[str, Any]], None] | None,
    ) -> None:
        """Read messages until the prompt has ended; a failure is raised only then, so that the server is idle again."""
        failure: WorkflowError | None = None
        while True:
            message = connection.recv()
            if not isinstance(message, str):
                continue  # a preview image
            event = json.loads(message)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id", history.prompt_id) != history.prompt_id:
                continue
            if on_event is not None:
                on_event(kind, data)
            if kind == "execution_cached":
                history.cached = list(data["nodes"])
            elif kind == "execution_error":
                failure = WorkflowError(
                    data["node_id"], data["node_type"], data["exception_type"], data["exception_message"].strip()
                )
            elif kind == "execution_interrupted":
                failure = WorkflowError(data["node_id"], data["node_type"], "Interrupted", "the run was interrupted")
            elif kind == "executing" and data["node"] is None:
                break
            elif kind == "executing" and data["node"] not in history.executed:
                history.executed.append(data["node"])
        if failure is not None:
            raise failure

    def _collect_outputs(self, history: History) -> None:
        history.outputs = self._get(f"/history/{history.prompt_id}")[history.prompt_id]["outputs"]
        for node_id, output in history.outputs.items():
            for items in output.values():
                for item in items if isinstance(items, (list, tuple)) else []:
                    if isinstance(item, dict) and "filename" in item:
                        file = self.base / item["type"] / item["subfolder"] / item["filename"]
                        history.files.setdefault(node_id, []).append(file)
                    elif isinstance(item, str):
                        history.texts.setdefault(node_id, []).append(item)

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise ServerError(f"ComfyUI ended with code {code} while starting; its log ends:\n{self._log_end()}")
            try:
                self._get("/system_stats")
                return
            except requests.RequestException:
                time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {self.start_timeout:.0f} s; its log ends:\n{self._log_end()}")

    def _log_end(self, lines: int = 30) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _get(self, path: str) -> Any:
        response = requests.get(self.url + path, timeout=60)
        response.raise_for_status()
        return response.json()

    def _post(self, path: str, content: dict[str, Any]) -> None:
        requests.post(self.url + path, json=content, timeout=60).raise_for_status()


def _refusal(answer: dict[str, Any]) -> WorkflowError:
    """Make an error of the host's reasons for refusing a prompt, at the first node that it names."""
    error = answer["error"]
    named = answer.get("node_errors") or {}
    reasons = [
        f"{node['class_type']} ({node_id}): {reason['message']}: {reason['details']}"
        for node_id, node in named.items()
        for reason in node["errors"]
    ]
    message = "; ".join(reasons) or f"{error['message']} {error['details']}".strip()
    node_id = next(iter(named), "")
    return WorkflowError(node_id, named[node_id]["class_type"] if node_id else "", error["type"], message)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_cuda() -> bool:
    import torch  # slow to import, and only asked when a server starts

    return torch.cuda.is_available()
