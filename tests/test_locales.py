"""The nodes in other languages: nothing missing, nothing stale, and nothing translated that must stay as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from tools import locales
from tools.host import ComfyServer

ENGLISH = {
    "nodeDefs.Encode.display_name": "BLIP-2 Subject Encode",
    "nodeDefs.Encode.description": "Looks at a picture. Connect it to KSampler.",
    "nodeDefs.Encode.inputs.mode.name": "crop_mode",
    "nodeDefs.Encode.inputs.mode.tooltip": "crop: keeps the middle. 0.5: half of <subject>.",
    "nodeDefs.Encode.inputs.image.name": "image",
    "nodeDefs.Encode.inputs.image.tooltip": "See crop_mode of BLIP-2 Subject Encode.",
}
GERMAN = {
    "nodeDefs.Encode.display_name": "BLIP-2-Motiv kodieren",
    "nodeDefs.Encode.description": "Sieht ein Bild an. Verbinde es mit KSampler.",
    "nodeDefs.Encode.inputs.mode.name": "Zuschnitt",
    "nodeDefs.Encode.inputs.mode.tooltip": "crop: behält die Mitte. 0.5: die Hälfte von <subject>.",
    "nodeDefs.Encode.inputs.image.name": "Bild",
    "nodeDefs.Encode.inputs.image.tooltip": "Siehe Zuschnitt von BLIP-2-Motiv kodieren.",
}
GLOSSARY = [locales.Word("picture", "word", ("Bild",)), locales.Word("KSampler", "name", ("KSampler",))]
VALUES = {"nodeDefs.Encode.inputs.mode.tooltip": ["crop"]}


def problems(tmp_path: Path, changed: dict[str, str], english: dict[str, str] = ENGLISH) -> list[str]:
    """Faults of a German that was whole before the change."""
    locales.write_texts(tmp_path, GERMAN)
    locales.mark_translated(tmp_path, ENGLISH)
    texts = {key: text for key, text in {**GERMAN, **changed}.items() if text}
    return locales.find_problems(english, texts, locales.read_sources(tmp_path), GLOSSARY, VALUES)


def test_a_whole_language_has_no_faults(tmp_path):
    assert problems(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("key", "text", "fault"),
    [
        ("inputs.image.tooltip", "", "missing: nodeDefs.Encode.inputs.image.tooltip"),
        ("inputs.gone.name", "Weg", "stale: nodeDefs.Encode.inputs.gone.name is no longer in English"),
        ("inputs.mode.tooltip", "Mitte. 0.5: Hälfte von <subject>.", "'crop' stays as it is, and is not there"),
        ("inputs.mode.tooltip", "crop: Mitte. Hälfte von <subject>.", "'0.5' stays as it is, and is not there"),
        ("inputs.mode.tooltip", "crop: Mitte. 0.5: Hälfte von <motiv>.", "'<subject>' stays as it is"),
        ("inputs.image.tooltip", "Siehe BLIP-2-Motiv kodieren.", "crop_mode is called 'crop_mode' or 'Zuschnitt'"),
        ("inputs.image.tooltip", "Siehe Zuschnitt.", "BLIP-2 Subject Encode is called 'BLIP-2-Motiv kodieren'"),
        ("description", "Sieht ein Foto an, für KSampler.", "'picture' is 'Bild' in the glossary"),
        ("description", "Sieht ein Bild an, für den Sampler.", "KSampler is called 'KSampler'"),
        ("description", "Sieht {ein} Bild an, für KSampler.", "{ } is syntax of the frontend's messages"),
        ("inputs.image.name", "Zuschnitt", "'Zuschnitt' is also the name of"),
    ],
)
def test_a_fault_of_a_translation_is_named(tmp_path, key, text, fault):
    assert [found for found in problems(tmp_path, {f"nodeDefs.Encode.{key}": text}) if fault in found]


def test_a_translation_of_an_english_text_that_has_changed_is_named(tmp_path):
    key = "nodeDefs.Encode.description"
    changed = {**ENGLISH, key: "Looks at a picture for long. Connect it to KSampler."}
    assert problems(tmp_path, {}, changed) == [f"changed: the English of {key} is now {changed[key]!r}"]


def test_the_english_source_is_what_the_nodes_say(server: ComfyServer):
    object_info = server.object_info()
    assert locales.read_texts(locales.LOCALES / "en") == locales.english_texts(object_info)
    assert locales.read_values() == locales.fixed_values(object_info)


def test_the_languages_are_those_that_the_pack_promises():
    assert set(locales.present_languages()) == set(locales.LANGUAGES)


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_a_language_is_whole(language):
    assert locales.problems_of(language) == []


def test_the_host_hands_every_language_to_the_page(server: ComfyServer):
    handed = requests.get(f"{server.url}/i18n", timeout=60).json()
    for language in locales.LANGUAGES:
        title = handed[language]["nodeDefs"]["BLIPDiffusionSubjectEncode"]["display_name"]
        texts = locales.read_texts(locales.LOCALES / language)
        assert title == texts["nodeDefs.BLIPDiffusionSubjectEncode.display_name"]
