"""Open workflows in ComfyUI's real frontend in a headless browser, and read what its Run button would send."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import requests
from playwright.sync_api import ConsoleMessage, sync_playwright

from tools.host import PACK_NAME, ComfyServer

Result = TypeVar("Result")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGUMENTS = (
    "--no-sandbox",  # root, as in a container, cannot have one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Settings of a returning user: no tutorial, no template browser, no news.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingNodesWarning": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Validation.Workflows": True,  # repairs of a faulty graph are reported; newer frontends only do so if asked
    "Comfy.Graph.CanvasInfo": False,
}
DISMISSED = "localStorage.setItem('vueNodesBannerDismissed', 'true')"
# Loads a graph as dropping its file would, and returns its nodes and the prompt that Run would send.
OPEN_WORKFLOW = """async graph => {
    await window.app.loadGraphData(graph, true, true)
    const known = window.LiteGraph.registered_node_types
    const missing = graph.nodes.map(node => node.type).filter(type => !(type in known))
    const prompt = await window.app.graphToPrompt()
    return {nodeCount: window.app.graph.nodes.length, missing: [...new Set(missing)], prompt: prompt.output}
}"""
# Pop-up messages are read, then closed, so that the next workflow's are its own.
READ_MESSAGES = """() => {
    const texts = [...document.querySelectorAll('.p-toast-message-text')].map(message => message.innerText)
    document.querySelectorAll('.p-toast-close-button').forEach(button => button.click())
    return texts
}"""


class BrowserError(RuntimeError):
    """There is no browser, or the frontend did not come up in it."""


@dataclass(frozen=True)
class OpenedWorkflow:
    """A workflow after the frontend has opened it.

    Attributes:
        node_count: Number of nodes on the canvas.
        missing_types: Classes of nodes that the frontend does not know.
        console_errors: Errors that the page reported while it opened it.
        messages: Pop-up messages that a user would see, such as the frontend's repairs to a faulty graph.
        prompt: Prompt that Run would send.
    """

    node_count: int
    missing_types: tuple[str, ...]
    console_errors: tuple[str, ...]
    messages: tuple[str, ...]
    prompt: dict[str, dict[str, Any]]


def find_browser() -> str:
    """Return the path of a Chromium: ``CHROMIUM`` if set, else the first of the usual names.

    Raises:
        BrowserError: If there is none.
    """
    for name in (os.environ.get("CHROMIUM", ""), *BROWSERS):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BrowserError("No Chromium was found: run `make browser`, or set CHROMIUM to a browser's path.")


class Frontend:
    """The frontend of a running server, open in a browser as long as the ``with`` block lasts.

    Args:
        server: Running server.
        width: Width of the page in pixels.
        height: Height of the page in pixels.
    """

    def __init__(self, server: ComfyServer, width: int = 1600, height: int = 900):
        self.server = server
        self.size = {"width": width, "height": height}
        self._errors: list[str] = []
        # Playwright's blocking interface keeps an event loop running in its thread, where asyncio.run would then fail.
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Frontend:
        try:
            self._run(self._start)
        except BaseException:
            self._thread.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop)
        self._thread.shutdown()

    def open_workflow(self, graph: dict[str, Any]) -> OpenedWorkflow:
        """Open a saved workflow, which replaces the one on the canvas."""

        def open_it() -> OpenedWorkflow:
            self._errors.clear()
            answer = self._page.evaluate(OPEN_WORKFLOW, graph)
            self._page.wait_for_timeout(300)  # for errors of the canvas while it renders
            messages = tuple(self._page.evaluate(READ_MESSAGES))
            self._page.wait_for_selector(".p-toast-message-text", state="detached")  # they fade out
            errors = tuple(self._errors)
            return OpenedWorkflow(answer["nodeCount"], tuple(answer["missing"]), errors, messages, answer["prompt"])

        return self._run(open_it)

    def screenshot(self, path: Path) -> Path:
        """Write a PNG of the page, zoomed to the whole graph, and return its path."""

        def write() -> Path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._page.keyboard.press(".")  # the frontend's key for "fit the view"
            self._page.wait_for_timeout(1000)
            self._page.screenshot(path=path)
            return path

        return self._run(write)

    def node_help(self, node_id: str, pack: str = PACK_NAME) -> str | None:
        """Return the Markdown of a node's help page, or None if the server has none."""
        response = requests.get(f"{self.server.url}/extensions/{quote(pack)}/docs/{quote(node_id)}.md", timeout=60)
        return response.text if response.status_code == 200 else None

    def _run(self, action: Callable[[], Result]) -> Result:
        return self._thread.submit(action).result()

    def _start(self) -> None:
        executable = find_browser()
        self.server.save_settings(SETTINGS)
        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(executable_path=executable, args=list(BROWSER_ARGUMENTS))
            self._page = self._browser.new_page(viewport=self.size)
            self._page.add_init_script(DISMISSED)
            self._page.on("console", self._note_console)
            self._page.on("pageerror", lambda error: self._errors.append(str(error)))
            # A request to anything but the server fails at once instead of timing out.
            self._page.route(
                lambda url: not url.startswith((self.server.url, "data:", "blob:")), lambda route: route.abort()
            )
            self._page.goto(self.server.url)
            self._page.wait_for_function("window.app && window.app.graph && window.app.vueAppReady", timeout=120_000)
        except BaseException:
            self._playwright.stop()
            raise

    def _stop(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def _note_console(self, message: ConsoleMessage) -> None:
        # The frontend asks ComfyUI's own site for news; that this is refused here is no error of a workflow.
        if message.type == "error" and "Content Security Policy" not in message.text:
            self._errors.append(f"{message.text} [{message.location['url']}]")
