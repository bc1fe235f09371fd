"""Save Subject · Load Subject."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..blip_qformer.subject import Subject
from ..blip_qformer.subject.file import load_subject, save_subject
from ..blip_qformer.subject.file_name import checked_name
from ..blip_qformer.subject.preview import preview_image
from ..blip_qformer.subject.provenance import encoder_mismatch
from .host.lists import takes_lists
from .host.managed import ManagedEncoder
from .host.model_paths import SUBJECTS, FileMarks, new_subject_path
from .types import CATEGORY, Blip2QFormer, BlipSubject, io, newer_fields, ui

logger = logging.getLogger("blip_diffusion")


class SaveSubject(io.ComfyNode):
    """Saves a subject as a file that any CLIP text box can use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectSave",
            display_name="Save Subject",
            category=CATEGORY,
            **newer_fields(["textual inversion", "save embedding", "export subject", "share subject"]),
            description="Saves a subject as one small file in models/embeddings. Load Subject loads it again. Friends "
            "with a BLIP-Diffusion model can use it without this pack: embedding:name in any prompt draws it.",
            is_output_node=True,
            inputs=[
                BlipSubject.Input("subject", tooltip="One subject. A batch of several does not fit into one file."),
                io.String.Input(
                    "name",
                    default="my_subject",
                    tooltip="The name of the file. In a prompt you write it after embedding: and so it may have only "
                    "letters, digits and - _ . but no spaces.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    label_on="replace",
                    label_off="keep",
                    tooltip="If there is a subject of that name already. keep: nothing is saved, and the node says "
                    "so. replace: the old one is lost.",
                ),
                io.Boolean.Input(
                    "save_preview",
                    default=True,
                    optional=True,
                    label_on="with picture",
                    label_off="without",
                    tooltip="Puts a small picture of your subject (256 pixels) into the file. You see it in the model "
                    "library and in Load Subject. without: for a file that you share while the picture stays "
                    "private.",
                ),
            ],
            outputs=[
                BlipSubject.Output(
                    display_name="subject", tooltip="The same subject. Connect it to Subject Prompt Compose."
                ),
                io.String.Output(
                    display_name="embedding",
                    tooltip="The words to write into a prompt, after the word a. Looks like embedding:name.",
                ),
            ],
            is_input_list=True,
        )

    @classmethod
    def validate_inputs(cls, name: Sequence[str | None]) -> bool:
        """Refuse an unsafe name; one that comes over a link is None here and checked when it is saved."""
        return all(each is None or bool(checked_name(each)) for each in name)

    @classmethod
    @takes_lists("subject")
    def execute(cls, subject: list[Subject], name: str, overwrite: bool, save_preview: bool = True) -> io.NodeOutput:
        """Write the subject to the first embeddings folder."""
        if len(subject) > 1:  # the host would write one after the other under the same name
            raise ValueError(
                f"There is a list of {len(subject)} subjects and a file holds one: take one of them with Subject "
                "Interpolate, or encode all pictures as one subject."
            )
        path = new_subject_path(name)
        save_subject(path, subject[0], overwrite, save_preview)
        embedding = f"embedding:{path.stem}"
        return io.NodeOutput(subject[0], embedding, ui={"text": [embedding]})


class LoadSubject(io.ComfyNode):
    """Loads a subject from such a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectLoad",
            display_name="Load Subject",
            category=CATEGORY,
            **newer_fields(["textual inversion", "load embedding", "import subject", "saved subject"]),
            description="Loads a subject that you saved with Save Subject, or a file that somebody gave you. No "
            "picture is needed. If the file holds a small picture of the subject, the node shows it.",
            inputs=[
                io.Combo.Input(
                    "subject_file",
                    options=SUBJECTS.options(),
                    tooltip="A .safetensors file in models/embeddings or a folder in it. Press R after you put a new "
                    "one there. Other embeddings are in this list too: if you choose one, the node stops and says "
                    "what it is.",
                ),
                io.String.Input(
                    "subject_word",
                    default="",
                    placeholder="the word it was saved with",
                    tooltip="The word for the subject in the prompt. Empty: the word it was saved with.",
                ),
                Blip2QFormer.Input(
                    "qformer",
                    optional=True,
                    tooltip="Can stay empty. Connect qformer of the model you draw with, and the node warns you if "
                    "the subject was made with another model.",
                ),
            ],
            outputs=[
                BlipSubject.Output(display_name="subject", tooltip="Your thing. Connect it to Subject Prompt Compose."),
                io.String.Output(
                    display_name="report",
                    tooltip="Text to read: what was loaded, and a warning if it may not fit the model.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, subject_file: str | None) -> bool:
        """Refuse a file that is gone."""
        return SUBJECTS.validate(subject_file)

    @classmethod
    def fingerprint_inputs(cls, subject_file: str | None, **_: object) -> FileMarks:
        """Tell the host to read another file under the same name again."""
        return SUBJECTS.fingerprint(subject_file)

    @classmethod
    def execute(cls, subject_file: str, subject_word: str, qformer: ManagedEncoder | None = None) -> io.NodeOutput:
        """Read the subject, and compare its encoder with the connected one."""
        subject = load_subject(SUBJECTS.path(subject_file), subject_word)
        warning = encoder_mismatch(subject, qformer.encoder_hash) if qformer else ""
        if warning:
            logger.warning(warning)
        report = f'"{subject.word}" from {subject_file}. {warning}'.strip()
        image = preview_image(subject.preview)
        if image is None:
            return io.NodeOutput(subject, report)
        return io.NodeOutput(subject, report, ui=ui.PreviewImage(image, cls=cls))


NODES = [SaveSubject, LoadSubject]
