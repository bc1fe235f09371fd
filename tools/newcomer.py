"""ComfyUI's page as someone meets it for the first time: the template browser, the messages, what covers what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from tools.frontend import SHOWN_IMAGES, Frontend
from tools.host import PACK_NAME, ComfyServer

# The frontend then begins with its template browser, as on a new installation.
FIRST_VISIT = {"Comfy.TutorialCompleted": False}
TEMPLATE_BROWSER = "[data-testid^=template-workflow-], [data-testid=template-filter-bar]"
# What a user cannot miss: dialogs, pop-ups, and the box of newer frontends that names an error.
MESSAGES = """() => [...document.querySelectorAll(
    '[role=dialog], [role=alertdialog], .p-toast-message, [data-testid=error-overlay]'
)].map(message => message.innerText.trim()).filter(Boolean)"""
# Ids of the nodes that have a red ring: as the graph, the server's last answer and the elements of Nodes 2.0 know it.
RINGED = """() => {
    const ids = new Set(Object.keys(window.app.lastNodeErrors ?? {}))
    window.app.graph.nodes.filter(node => node.has_errors).forEach(node => ids.add(String(node.id)))
    document.querySelectorAll('[data-node-id]').forEach(element => {
        const parts = [element, ...element.querySelectorAll('[data-testid=node-inner-wrapper]')]
        if (parts.some(part => /(^|\\s)(border-node-stroke-error|ring-destructive\\S*)/.test(part.className)))
            ids.add(element.dataset.nodeId)
    })
    return [...ids]
}"""
# Boxes in pixels of the page: of all nodes with all that belongs to them, and of the images that nodes show. On the
# canvas, a node's image is taken to fill its lower half.
BOXES = """() => {
    const canvas = window.app.canvas.canvas.getBoundingClientRect()
    const {scale, offset} = window.app.canvas.ds
    const box = ({left, top, right, bottom}) => ({left, top, right, bottom})
    const union = boxes => ({
        left: Math.min(...boxes.map(each => each.left)), top: Math.min(...boxes.map(each => each.top)),
        right: Math.max(...boxes.map(each => each.right)), bottom: Math.max(...boxes.map(each => each.bottom)),
    })
    const nodes = {}, images = {}
    for (const node of window.app.graph.nodes) {
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        if (element) {
            const parts = [element, ...element.querySelectorAll(':not([data-testid^=slot])')]
            const boxes = parts.map(part => part.getBoundingClientRect())
            nodes[node.id] = union(boxes.filter(part => part.width && part.height))
            const image = [...element.querySelectorAll('img')].find(image => image.naturalWidth)
            if (image) images[node.id] = box(image.getBoundingClientRect())
        } else {
            const [x, y, width, height] = node.boundingRect
            const left = canvas.left + (x + offset[0]) * scale, top = canvas.top + (y + offset[1]) * scale
            nodes[node.id] = {left, top, right: left + width * scale, bottom: top + height * scale}
            if (node.imgs?.some(image => image.naturalWidth))
                images[node.id] = {...nodes[node.id], top: top + height * scale / 2}
        }
    }
    return {nodes, images, titles: Object.fromEntries(window.app.graph.nodes.map(node => [node.id, node.title]))}
}"""
# What lies on top at points of the page: the id of a node, "" for the canvas, else a description of the element.
ON_TOP = """points => points.map(([x, y]) => {
    const element = document.elementFromPoint(x, y)
    if (element === null) return 'the edge of the page'
    if (element === window.app.canvas.canvas) return ''
    return element.closest('[data-node-id]')?.dataset.nodeId
        ?? `${element.tagName.toLowerCase()} ${element.dataset.testid ?? element.className}`
})"""
# Adds a node below the others: type, values of its widgets, links into it and out of it.
ADD_NODE = """({type, values, inputs, outputs}) => {
    const graph = window.app.graph
    const node = window.LiteGraph.createNode(type)
    node.pos = [graph.nodes[0].pos[0], Math.max(...graph.nodes.map(each => each.pos[1] + each.size[1])) + 100]
    graph.add(node)
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = value
        widget.callback?.(value)
    }
    const link = (from, output, to, input) => from.connect(
        from.outputs.findIndex(each => each.name === output), to, to.inputs.findIndex(each => each.name === input))
    for (const [origin, output, input] of inputs) link(graph.getNodeById(Number(origin)), output, node, input)
    for (const [output, target, input] of outputs) link(node, output, graph.getNodeById(Number(target)), input)
    return String(node.id)
}"""
TOUCHING = 2  # pixels by which boxes may overlap: borders and rounding


class Newcomer(Frontend):
    """The page of a user who has never opened this ComfyUI; the ``with`` block is the visit.

    Args:
        server: Running server.
        renderer: Who shows the nodes.
        locale: Language of the page, as the setting ``Comfy.Locale`` names it.
    """

    def __init__(self, server: ComfyServer, renderer: str, locale: str = "en") -> None:
        super().__init__(server, renderer, width=1920, height=1080)
        self.settings = {**FIRST_VISIT, "Comfy.Locale": locale}

    def template_names(self) -> list[str]:
        """Open the template browser at this pack, and return the names of the templates in the order shown."""
        return self._run(self._browse_templates)

    def open_template(self, name: str) -> None:
        """Open a template of this pack from the template browser.

        Args:
            name: Name of its file, without ``.json``.
        """

        def open_it() -> None:
            self._browse_templates()
            self._errors.clear()
            self._page.get_by_test_id(f"template-workflow-{name}").click()
            self._page.wait_for_selector(TEMPLATE_BROWSER, state="detached")
            self._page.wait_for_function("window.app.graph.nodes.length > 0")
            self._page.wait_for_timeout(2000)  # messages about missing files come later, if they come

        self._run(open_it)

    def press_run(self) -> tuple[str, ...]:
        """Press Run for a workflow that cannot run, and return the messages that come without a further click."""

        def press() -> tuple[str, ...]:
            self._page.get_by_test_id("queue-button").first.click()
            with suppress(PlaywrightTimeoutError):
                self._page.wait_for_function(f"({MESSAGES})().length > 0", timeout=15_000)
            return tuple(self._page.evaluate(MESSAGES))

        return self._run(press)

    def refresh_lists(self) -> None:
        """Press R, which reads the lists of models and files anew."""

        def refresh() -> None:
            self._page.evaluate("document.activeElement?.blur()")
            with self._page.expect_response(lambda response: "object_info" in response.url):
                self._page.keyboard.press("r")
            self._page.wait_for_timeout(500)

        self._run(refresh)

    def messages(self) -> tuple[str, ...]:
        """Return the texts of all dialogs, pop-ups and error boxes on the page."""
        return tuple(self._run(lambda: self._page.evaluate(MESSAGES)))

    def ringed_nodes(self) -> tuple[str, ...]:
        """Return the ids of the nodes with a red ring."""
        return tuple(self._run(lambda: self._page.evaluate(RINGED)))

    def console_errors(self) -> tuple[str, ...]:
        """Return the errors that the page has reported since a template was opened or a workflow was run."""
        return tuple(self._errors)

    def dismiss(self) -> None:
        """Close what dialog is open, as Escape does."""
        self._run(lambda: self._page.keyboard.press("Escape"))

    def node_ids(self, node_type: str) -> list[str]:
        """Return the ids of the nodes of one class on the canvas."""
        script = "type => window.app.graph.nodes.filter(node => node.type === type).map(node => String(node.id))"
        return self._run(lambda: self._page.evaluate(script, node_type))

    def widgets(self) -> dict[str, list[str]]:
        """Return the names of the widgets of each node, by its id."""
        script = """() => Object.fromEntries(window.app.graph.nodes.map(
            node => [node.id, (node.widgets ?? []).map(widget => widget.name)]))"""
        return self._run(lambda: self._page.evaluate(script))

    def add_node(
        self,
        node_type: str,
        values: Mapping[str, Any],
        inputs: Sequence[tuple[str, str, str]] = (),
        outputs: Sequence[tuple[str, str, str]] = (),
    ) -> str:
        """Add a node below the others and return its id.

        Args:
            node_type: Its class.
            values: Values of its widgets.
            inputs: Links into it: id of the origin, name of the origin's output, name of the input.
            outputs: Links out of it: name of the output, id of the target, name of the target's input.
        """
        node = {"type": node_type, "values": dict(values), "inputs": list(inputs), "outputs": list(outputs)}
        return self._run(lambda: self._page.evaluate(ADD_NODE, node))

    def nodes_out_of_sight(self) -> list[str]:
        """Return the titles of the nodes that are not whole in the window."""

        def find() -> list[str]:
            found = self._page.evaluate(BOXES)
            width, height = self.size["width"], self.size["height"]
            return [
                found["titles"][node]
                for node, box in found["nodes"].items()
                if box["left"] < 0 or box["top"] < 0 or box["right"] > width or box["bottom"] > height
            ]

        return self._run(find)

    def covered_images(self) -> list[str]:
        """Return a sentence for each image of a node that another node or a part of the page lies over.

        The whole graph is brought into view first.
        """

        def find() -> list[str]:
            self._fit_view()
            self._page.wait_for_timeout(1000)
            found = self._page.evaluate(BOXES)
            titles, sentences = found["titles"], []
            for node, image in found["images"].items():
                for other, box in found["nodes"].items():
                    if other != node and _overlap(image, box):
                        sentences.append(f"{titles[other]} lies over the image of {titles[node]}.")
                on_top = self._page.evaluate(ON_TOP, _points(image))
                sentences += [
                    f"{titles.get(each, each)} lies over the image of {titles[node]}."
                    for each in dict.fromkeys(on_top)
                    if each not in ("", node)
                ]
            return sentences

        return self._run(find)

    def shown_images(self) -> frozenset[str]:
        """Return the ids of the nodes that show an image."""
        return frozenset(self._run(lambda: self._page.evaluate(SHOWN_IMAGES[self.renderer])))

    def picture_as_it_is(self, path: Path) -> Path:
        """Write a PNG of the page without moving the view, and return its path."""

        def write() -> Path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._page.screenshot(path=path)
            return path

        return self._run(write)

    def _browse_templates(self) -> list[str]:
        page = self._page
        with suppress(PlaywrightTimeoutError):  # on the first visit it opens by itself
            page.wait_for_selector(TEMPLATE_BROWSER, timeout=3000)
        if page.query_selector(TEMPLATE_BROWSER) is None:
            page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
            page.wait_for_selector(TEMPLATE_BROWSER)
        page.get_by_text(PACK_NAME, exact=True).last.click()
        page.wait_for_function(
            """count => document.querySelectorAll('[data-testid^=template-workflow-]').length === count""",
            arg=len(self._own_templates()),
        )
        cards = page.query_selector_all("[data-testid^=template-workflow-]")
        return [str(card.get_attribute("data-testid")).removeprefix("template-workflow-") for card in cards]

    def _own_templates(self) -> list[str]:
        script = "async () => (await (await fetch('/api/workflow_templates')).json())"
        return self._page.evaluate(script)[PACK_NAME]


def _overlap(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    width = min(one["right"], other["right"]) - max(one["left"], other["left"])
    height = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return width > TOUCHING and height > TOUCHING


def _points(box: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return the middle of a box and four points near its corners."""
    width, height = box["right"] - box["left"], box["bottom"] - box["top"]
    shares = ((0.5, 0.5), (0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9))
    return [(box["left"] + x * width, box["top"] + y * height) for x, y in shares]
