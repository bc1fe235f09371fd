"""Open workflows in ComfyUI's real frontend in a headless browser, and read what its Run button would send."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import requests
from playwright.sync_api import ConsoleMessage, ViewportSize, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from tools.host import PACK_NAME, ComfyServer
from tools.layout import Box

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
REFUSED = ("Content Security Policy", "Error fetching file size")
DISMISSED = "localStorage.setItem('vueNodesBannerDismissed', 'true')"
# Loads a graph as dropping its file would, and returns its nodes and the prompt that Run would send.
OPEN_WORKFLOW = """async graph => {
    await window.app.loadGraphData(graph, true, true)
    const known = window.LiteGraph.registered_node_types
    const missing = graph.nodes.map(node => node.type).filter(type => !(type in known))
    const prompt = await window.app.graphToPrompt()
    return {nodeCount: window.app.graph.nodes.length, missing: [...new Set(missing)], prompt: prompt.output}
}"""
# The nodes in sight by id: left, top, width and height in pixels of the page.
NODE_BOXES = {
    "classic": """() => Object.fromEntries(window.app.graph.nodes.map(node => {
        const {scale, offset} = window.app.canvas.ds
        const title = window.LiteGraph.NODE_TITLE_HEIGHT
        const [x, y, width, height] = [node.pos[0] + offset[0], node.pos[1] - title + offset[1], ...node.size]
        return [node.id, [x, y, width, height + title].map(value => value * scale)]
    }))""",
    "nodes 2.0": """() => Object.fromEntries([...document.querySelectorAll('[data-node-id]')].map(node => {
        const {left, top, width, height} = node.getBoundingClientRect()
        return [node.dataset.nodeId, [left, top, width, height]]
    }))""",
}
# Sets widgets, given as node id -> name -> value, presses Run, and returns how the run ended.
RUN_WORKFLOW = """async changes => {
    for (const [id, values] of Object.entries(changes)) {
        const node = window.app.graph.getNodeById(Number(id))
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find(widget => widget.name === name)
            widget.value = value
            widget.callback?.(value)
        }
    }
    const ends = ['execution_success', 'execution_error', 'execution_interrupted']
    const end = new Promise((resolve, reject) => {
        ends.forEach(kind =>
            window.app.api.addEventListener(kind, ({detail}) => resolve({kind, ...detail}), {once: true}))
        setTimeout(() => reject(new Error('The run did not end: ' + document.body.innerText)), RUN_TIMEOUT)
    })
    await window.app.extensionManager.command.execute('Comfy.QueuePrompt')
    const {kind, exception_type, exception_message} = await end
    const prompt = await window.app.graphToPrompt()
    return {kind, type: exception_type ?? '', sentence: exception_message ?? '', prompt: prompt.output}
}""".replace("RUN_TIMEOUT", "300_000")
# The ids of the nodes that show an image which the browser has loaded.
SHOWN_IMAGES = {
    "classic": """() => window.app.graph.nodes
        .filter(node => node.imgs?.some(image => image.naturalWidth > 0)).map(node => String(node.id))""",
    "nodes 2.0": """() => [...document.querySelectorAll('[data-node-id]')]
        .filter(node => [...node.querySelectorAll('img')].some(image => image.naturalWidth > 0))
        .map(node => node.dataset.nodeId)""",
}
RENDERERS = tuple(SHOWN_IMAGES)
# Searches nodes as the search box does, and tells whether it searches by aliases, as frontends since 1.38 or later do.
SEARCH_NODES = """text => {
    const pinia = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
    const service = pinia._s.get('nodeDef').nodeSearchService
    const keys = service.nodeFuseSearch.fuse.options.keys
    return {
        found: service.searchNode(text).map(node => node.name),
        byAlias: keys.some(key => (key.name ?? key) === 'search_aliases'),
    }
}"""
# Moves a node to the middle of the page, as large as fits, and returns the rectangle around it and a margin, in pixels.
CENTER_NODE = """({type, marginX, marginY}) => {
    const {canvas, graph} = window.app
    const node = graph.nodes.find(node => node.type === type)
    const [left, top, width, height] = node.getBounding ? node.getBounding() : node.boundingRect
    const page = canvas.canvas.getBoundingClientRect()
    const scale = Math.min(1, (page.height - 2 * marginY - 160) / height)
    canvas.ds.scale = scale
    canvas.ds.offset[0] = page.width / 2 / scale - left - width / 2
    canvas.ds.offset[1] = page.height / 2 / scale - top - height / 2
    canvas.setDirty(true, true)
    const size = {width: width * scale + 2 * marginX, height: height * scale + 2 * marginY}
    return {...size, x: page.x + (page.width - size.width) / 2, y: page.y + (page.height - size.height) / 2}
}"""
RENDERER = "() => window.LiteGraph.vueNodesMode ? 'nodes 2.0' : 'classic'"
# Pop-up messages are read, then closed, so that the next workflow's are its own.
READ_MESSAGES = """() => {
    const texts = [...document.querySelectorAll('.p-toast-message-text')].map(message => message.innerText)
    document.querySelectorAll('.p-toast-close-button').forEach(button => button.click())
    return texts
}"""


class BrowserError(RuntimeError):
    """There is no browser, or the frontend did not come up in it."""


class NoRendererError(BrowserError):
    """The frontend of this version of ComfyUI cannot show nodes in the way that was asked for."""


@dataclass(frozen=True)
class OpenedWorkflow:
    """A workflow after the frontend has opened it.

    Attributes:
        node_count: Number of nodes on the canvas.
        boxes: Where the nodes are in the saved view, by id, in pixels of the page.
        missing_types: Classes of nodes that the frontend does not know.
        console_errors: Errors that the page reported while it opened it.
        messages: Pop-up messages that a user would see, such as the frontend's repairs to a faulty graph.
        prompt: Prompt that Run would send.
    """

    node_count: int
    boxes: dict[str, Box]
    missing_types: tuple[str, ...]
    console_errors: tuple[str, ...]
    messages: tuple[str, ...]
    prompt: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class FinishedRun:
    """A workflow after the page has run it.

    Attributes:
        end: How it ended, as the host calls it: ``execution_success`` or ``execution_error``.
        exception_type: Class of the error that the host reported, or "".
        exception_message: Its sentence, or "".
        text: Text of the page.
        console_errors: Errors that the page reported meanwhile.
        prompt: Prompt that Run would send now.
        shown: Ids of the nodes that show an image.
    """

    end: str
    exception_type: str
    exception_message: str
    text: str
    console_errors: tuple[str, ...]
    prompt: dict[str, dict[str, Any]]
    shown: frozenset[str]


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
        renderer: One of :data:`RENDERERS`: who shows the nodes, the canvas or the page's own elements (Nodes 2.0).
        width: Width of the page in pixels.
        height: Height of the page in pixels.
    """

    def __init__(self, server: ComfyServer, renderer: str = "classic", width: int = 1920, height: int = 1080) -> None:
        self.server, self.renderer, self.settings = server, renderer, SETTINGS
        self.size: ViewportSize = {"width": width, "height": height}
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
            boxes = self._measure_nodes()
            messages = tuple(self._page.evaluate(READ_MESSAGES))
            self._page.wait_for_selector(".p-toast-message-text", state="detached")  # they fade out
            errors = tuple(self._errors)
            return OpenedWorkflow(
                answer["nodeCount"], boxes, tuple(answer["missing"]), errors, messages, answer["prompt"]
            )

        return self._run(open_it)

    def run_workflow(
        self, changes: Mapping[str, Mapping[str, Any]] | None = None, shows: Collection[str] = ()
    ) -> FinishedRun:
        """Press Run for the workflow on the canvas and wait for its end.

        Args:
            changes: Values of widgets to set before, by node id and name.
            shows: Ids of nodes that are waited for until they show an image.
        """

        def run_it() -> FinishedRun:
            self._errors.clear()
            self._fit_view()  # what is out of sight is not rendered
            answer = self._page.evaluate(RUN_WORKFLOW, changes or {})
            shown = SHOWN_IMAGES[self.renderer]
            with suppress(PlaywrightTimeoutError):
                self._page.wait_for_function(
                    f"ids => (shown => ids.every(id => shown.includes(id)))(({shown})())",
                    arg=list(shows),
                    timeout=15_000,
                )
            return FinishedRun(
                end=answer["kind"],
                exception_type=answer["type"],
                exception_message=answer["sentence"].strip(),
                text=self._page.evaluate("document.body.innerText"),
                console_errors=tuple(self._errors),
                prompt=answer["prompt"],
                shown=frozenset(self._page.evaluate(shown)),
            )

        return self._run(run_it)

    def measure_nodes(self) -> dict[str, Box]:
        """Return where the nodes in sight are, by id, in pixels of the page."""
        return self._run(self._measure_nodes)

    def search_nodes(self, text: str) -> tuple[list[str], bool]:
        """Search nodes as the search box does.

        Args:
            text: What is typed.

        Returns:
            Ids of the nodes that are found, best first, and whether this frontend also searches by aliases.
        """
        answer = self._run(lambda: self._page.evaluate(SEARCH_NODES, text))
        return answer["found"], answer["byAlias"]

    def screenshot(self, path: Path) -> Path:
        """Write a PNG of the page, zoomed to the whole graph, and return its path."""

        def write() -> Path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fit_view()
            self._page.wait_for_timeout(1000)
            self._page.screenshot(path=path)
            return path

        return self._run(write)

    def node_screenshot(self, path: Path, node_type: str, margin: tuple[int, int] = (110, 45)) -> Path:
        """Write a PNG of one node of the workflow on the canvas, with its wires and what is near it.

        Args:
            path: File to write.
            node_type: Id of the node; the first of them is shown.
            margin: Width of what is shown around it, in pixels: left and right, above and below.

        Returns:
            The path.
        """

        def write() -> Path:
            path.parent.mkdir(parents=True, exist_ok=True)
            clip = self._page.evaluate(CENTER_NODE, {"type": node_type, "marginX": margin[0], "marginY": margin[1]})
            self._page.wait_for_timeout(700)
            self._page.screenshot(path=path, clip=clip)
            return path

        return self._run(write)

    def node_help(self, node_id: str, pack: str = PACK_NAME) -> str | None:
        """Return the Markdown of a node's help page, or None if the server has none."""
        response = requests.get(f"{self.server.url}/extensions/{quote(pack)}/docs/{quote(node_id)}.md", timeout=60)
        return response.text if response.status_code == 200 else None

    def _measure_nodes(self) -> dict[str, Box]:
        return {number: Box(*box) for number, box in self._page.evaluate(NODE_BOXES[self.renderer]).items()}

    def _fit_view(self) -> None:
        self._page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def _run(self, action: Callable[[], Result]) -> Result:
        return self._thread.submit(action).result()

    def _start(self) -> None:
        executable = find_browser()
        self.server.save_settings({**self.settings, "Comfy.VueNodes.Enabled": self.renderer == "nodes 2.0"})
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
            if self._page.evaluate(RENDERER) != self.renderer:
                raise NoRendererError(f"The frontend of this ComfyUI has no {self.renderer}.")
        except BaseException:
            self._playwright.stop()  # with the browser
            raise

    def _stop(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def _note_console(self, message: ConsoleMessage) -> None:
        # The frontend asks ComfyUI's own site and the Hub; that this is refused here is no error of a workflow.
        if message.type == "error" and not any(refused in message.text for refused in REFUSED):
            self._errors.append(f"{message.text} [{message.location['url']}]")
