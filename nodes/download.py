"""Download BLIP-Diffusion."""

from __future__ import annotations

from .host.download import download, download_marks, show_text
from .host.model_paths import FileMarks
from .types import CATEGORY, advanced, io, newer_fields

MODEL, WITH_CONTROLNET = "model", "model and ControlNet"

NEXT = "The model is there. Press R, then choose blipdiffusion in Load BLIP-Diffusion."


class DownloadBLIPDiffusion(io.ComfyNode):
    """Downloads the published model and converts it, as far as it is not there yet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionDownload",
            display_name="Download BLIP-Diffusion",
            category=f"{CATEGORY}/setup",
            **newer_fields(["install model", "get model", "missing model", "huggingface", "salesforce blipdiffusion"]),
            description="Downloads the published model: 6.2 GB, of which 3.1 GB stay on your disk. You need it once. "
            "Put this node alone on an empty canvas and press Run. If you press Cancel, or the network fails, press "
            "Run again: it goes on where it was. If the files are there, it does nothing. The model comes from "
            "huggingface.co/Salesforce/blipdiffusion; that page has its licence (Apache 2.0 when this was written). "
            "It is made from Stable Diffusion 1.5.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "what",
                    options=[MODEL, WITH_CONTROLNET],
                    default=MODEL,
                    tooltip="model: all that most workflows need. model and ControlNet: also the one that follows the "
                    "edges of a picture (Canny), 1.4 GB more to download, for the workflow style-canny.",
                ),
                advanced(
                    io.Boolean.Input(
                        "keep_original",
                        default=False,
                        label_on="keep",
                        label_off="remove",
                        tooltip="The model comes in a form that only this pack can read, and is made into two files "
                        "that every ComfyUI can read. remove: the first form is deleted then. keep: it stays too, "
                        "6.2 GB more.",
                    )
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="report", tooltip="What was downloaded, and where it is now.")],
        )

    @classmethod
    def fingerprint_inputs(cls, what: str, **_: object) -> FileMarks:
        """Tell the host to run it again once a file is gone."""
        return download_marks(what == WITH_CONTROLNET)

    @classmethod
    def execute(cls, what: str, keep_original: bool) -> io.NodeOutput:
        """Download what is missing, and say what to do next."""
        node = cls.hidden.unique_id if cls.hidden else None
        done = download(what == WITH_CONTROLNET, keep_original, node)
        show_text(node, NEXT)
        report = "\n".join([*done, NEXT])
        return io.NodeOutput(report, ui={"text": [report]})


NODES = [DownloadBLIPDiffusion]
