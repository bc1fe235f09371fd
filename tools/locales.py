"""Texts of the nodes in other languages: write the English source, and say what a language lacks.

    python -m tools.locales                  # what is missing, stale, changed or wrong, by language
    python -m tools.locales english          # start ComfyUI, and write locales/en from the nodes' schemas
    python -m tools.locales translated zh    # zh is now a translation of today's English

ComfyUI reads ``locales/<language>/nodeDefs.json`` and ``main.json`` of each pack, and its frontend merges them into its
own (``app/custom_node_manager.py`` of the host). Beside them lie files of ours: ``glossary.csv``, one word for each
English word, and ``translated_from.json``, hashes of the English texts that the translations were made from; beside
English ``values.json``, what tooltips name and the frontend does not translate.

The frontend translates titles, descriptions, tooltips, and labels of inputs, widgets and outputs. It shows values of
drop-down lists, labels of switches and placeholders as the server sends them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.host import PACK_NAME, ROOT, ComfyServer, make_base_directory

LOCALES = ROOT / "locales"
ENGLISH = "en"
#: The issue's languages. No frontend up to 1.49.6 offers German, and those before 1.37 have no Brazilian Portuguese.
LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru", "pt-BR")
#: Files that the host reads, each with the key under which it reaches the frontend; "" is the top.
FILES = {"main.json": "", "nodeDefs.json": "nodeDefs."}

#: Marks of vue-i18n's message syntax. Frontends before 1.45 or so read tooltips as messages too.
MESSAGE_SYNTAX = frozenset("{}@|")
#: What stays as it is in every language: <subject>, dog#2, embedding:name, (word:1.2), file names and paths.
VERBATIM = re.compile(
    r"<\w+>|\w+#\d|\(word:[\d.]+\)|embedding:\w*|\b(?:models|Salesforce)/[\w/]+|\b\w+\.(?:safetensors|pth)\b|\.(?:safetensors|pth)\b"
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
WIDGET_NAME = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b")

Texts = dict[str, str]
"""Texts by their keys in the frontend, such as ``nodeDefs.BLIPDiffusionLoader.inputs.checkpoint.tooltip``."""


@dataclass(frozen=True)
class Word:
    """A row of a glossary.

    Attributes:
        english: English word, or name of a stock node or widget.
        kind: ``name`` for names, which are written exactly so; ``word`` for words, which may be inflected.
        forms: Accepted forms, the first of which is the dictionary's; others may be stems.
    """

    english: str
    kind: str
    forms: tuple[str, ...]


def english_texts(object_info: Mapping[str, Any]) -> Texts:
    """Collect what a user reads of the pack's nodes.

    Args:
        object_info: Definitions of all nodes, as the server sends them.
    """
    texts: Texts = {}
    for node_id, node in sorted(object_info.items()):
        if not node["python_module"].endswith(f".{PACK_NAME}"):
            continue
        for folder in node["category"].split("/"):
            texts[f"nodeCategories.{_key(folder)}"] = folder
        here = f"nodeDefs.{_key(node_id)}"
        texts[f"{here}.display_name"] = node["display_name"]
        texts[f"{here}.description"] = node["description"]
        for name, (_, options) in _inputs(node).items():
            texts[f"{here}.inputs.{_key(name)}.name"] = name
            texts[f"{here}.inputs.{_key(name)}.tooltip"] = options["tooltip"]
        for index, (name, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"], strict=True)):
            texts[f"{here}.outputs.{index}.name"] = name
            texts[f"{here}.outputs.{index}.tooltip"] = tooltip
    return texts


def fixed_values(object_info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Collect the values and switch labels that a tooltip explains, which the frontend shows untranslated.

    Args:
        object_info: Definitions of all nodes, as the server sends them.

    Returns:
        Values by the key of the tooltip that names them.
    """
    found = {}
    for node_id, node in object_info.items():
        if not node["python_module"].endswith(f".{PACK_NAME}"):
            continue
        for name, (kind, options) in _inputs(node).items():
            choices = kind if isinstance(kind, list) else options.get("options") or []
            values = [*choices, options.get("label_on"), options.get("label_off")]
            named = [value for value in values if isinstance(value, str) and f"{value}:" in options["tooltip"]]
            if named:
                found[f"nodeDefs.{_key(node_id)}.inputs.{_key(name)}.tooltip"] = named
    return found


def read_texts(folder: Path) -> Texts:
    """Read a language.

    Args:
        folder: Folder of the language; missing files have no texts.
    """
    texts: Texts = {}
    for file, prefix in FILES.items():
        if (folder / file).is_file():
            texts.update(_flatten(json.loads((folder / file).read_text(encoding="utf-8")), prefix))
    return texts


def write_texts(folder: Path, texts: Texts) -> None:
    """Write a language.

    Args:
        folder: Folder of the language, which is made.
        texts: Its texts; their order stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nodes = {key: text for key, text in texts.items() if key.startswith("nodeDefs.")}
    rest = {key: text for key, text in texts.items() if key not in nodes}
    _write_json(folder / "main.json", _unflatten(rest, ""))
    _write_json(folder / "nodeDefs.json", _unflatten(nodes, "nodeDefs."))


def read_sources(folder: Path) -> dict[str, str]:
    """Read the hashes of the English texts that a language was translated from, by key."""
    file = folder / "translated_from.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def mark_translated(folder: Path, english: Texts) -> None:
    """Record that all texts of a language are translations of today's English.

    Args:
        folder: Folder of the language.
        english: English texts.
    """
    _write_json(
        folder / "translated_from.json", {key: _hash(english[key]) for key in read_texts(folder) if key in english}
    )


def read_glossary(folder: Path) -> list[Word]:
    """Read the glossary of a language; words without a translation are left out."""
    file = folder / "glossary.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as rows:
        return [
            Word(row["english"], row["kind"], tuple(row["word"].split("|")))
            for row in csv.DictReader(rows)
            if row["word"]
        ]


def find_problems(
    english: Texts,
    translated: Texts,
    sources: Mapping[str, str],
    glossary: list[Word],
    values: Mapping[str, list[str]],
) -> list[str]:
    """Compare a language with English.

    Args:
        english: English texts.
        translated: Texts of the language.
        sources: Hashes of the English texts that they were made from.
        glossary: Words of the language.
        values: Values that stay as they are, by the key of the tooltip that names them.

    Returns:
        A sentence for each fault; none if the language is whole.
    """
    return [
        *(f"missing: {key}" for key in english if not translated.get(key, "").strip()),
        *(f"stale: {key} is no longer in English" for key in translated if key not in english),
        *(
            f"changed: the English of {key} is now {text!r}"
            for key, text in english.items()
            if key in translated and sources.get(key) != _hash(text)
        ),
        *(
            f"{key}: {fault}"
            for key, text in translated.items()
            if key in english
            for fault in _faults(key, english, translated, text, glossary, values.get(key, []))
        ),
        *_double_labels(translated),
    ]


def _faults(
    key: str, english: Texts, translated: Texts, text: str, glossary: list[Word], values: list[str]
) -> Iterator[str]:
    """What is wrong with one translation."""
    source = english[key]
    if marks := MESSAGE_SYNTAX & set(text):
        yield f"{' '.join(sorted(marks))} is syntax of the frontend's messages: write it in words"
    for token in [*VERBATIM.findall(source), *NUMBER.findall(source), *values]:
        if token not in text:
            yield f"{token!r} stays as it is, and is not there"
    if key.endswith((".name", ".display_name")):
        return
    names = {name: (name, label) for name, label in _labels(english, translated) if "_" in name}
    names |= {word.english: (word.english, *word.forms) for word in glossary if "_" in word.english}
    for name in WIDGET_NAME.findall(source):
        if name in names and not any(form in text for form in names[name]):
            yield f"{name} is called {' or '.join(map(repr, names[name]))}"
    rest = VERBATIM.sub(" ", source)
    titles = {word.english: word.forms[:1] for word in glossary if word.kind == "name"}
    titles |= {title: (name,) for title, name in _titles(english, translated)}
    for title in sorted(titles, key=len, reverse=True):
        if re.search(rf"(?<!\w){re.escape(title)}(?!\w)", rest):
            rest = rest.replace(title, " ")
            if titles[title][0] not in text:
                yield f"{title} is called {titles[title][0]!r}"
    for word in (word for word in glossary if word.kind == "word"):
        found = re.search(rf"\b{re.escape(word.english)}(?:s|es)?\b", rest, flags=re.IGNORECASE)
        if found and not any(form.lower() in text.lower() for form in word.forms):
            yield f"{word.english!r} is {' or '.join(map(repr, word.forms))} in the glossary"


def _titles(english: Texts, translated: Texts) -> Iterator[tuple[str, str]]:
    """Titles of our nodes, in English and in the language."""
    for key, title in english.items():
        if key.endswith(".display_name") and key in translated:
            yield title, translated[key]


def _labels(english: Texts, translated: Texts) -> Iterator[tuple[str, str]]:
    """Labels of inputs and outputs, in English and in the language."""
    for key, name in english.items():
        if key.endswith(".name") and key in translated:
            yield name, translated[key]


def _double_labels(translated: Texts) -> Iterator[str]:
    """Inputs of one node that a user could not tell apart, and nodes with the same title."""
    seen: dict[tuple[str, str], str] = {}
    for key, text in translated.items():
        group = "titles" if key.endswith(".display_name") else key.rsplit(".", 2)[0] if ".inputs." in key else ""
        if group and key.endswith(("name",)):
            other = seen.setdefault((group, text), key)
            if other != key:
                yield f"{key}: {text!r} is also the name of {other}"


def _inputs(node: Mapping[str, Any]) -> dict[str, Any]:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def _key(name: str) -> str:
    """The frontend's form of a name in a key: ``normalizeI18nKey`` there."""
    return name.replace(".", "_")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flatten(tree: Mapping[str, Any], prefix: str) -> Texts:
    texts: Texts = {}
    for key, value in tree.items():
        texts.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)})
    return texts


def _unflatten(texts: Texts, prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, text in texts.items():
        *folders, last = key.removeprefix(prefix).split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = text
    return tree


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def present_languages() -> list[str]:
    """Return the languages that have a folder, without English."""
    return sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir() and folder.name != ENGLISH)


def problems_of(language: str) -> list[str]:
    """Compare a language of this repository with its English source.

    Args:
        language: Name of its folder.
    """
    folder = LOCALES / language
    english = read_texts(LOCALES / ENGLISH)
    return find_problems(english, read_texts(folder), read_sources(folder), read_glossary(folder), read_values())


def read_values() -> dict[str, list[str]]:
    """Read what :func:`fixed_values` found when English was written."""
    return json.loads((LOCALES / ENGLISH / "values.json").read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 if a language is not whole."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.locales", description="Texts of the nodes in other languages."
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("english", help="start ComfyUI, and write locales/en from the nodes' schemas")
    translated = commands.add_parser("translated", help="record that languages are translations of today's English")
    translated.add_argument("languages", nargs="+", choices=LANGUAGES)
    options = parser.parse_args(arguments)
    if options.command == "english":
        with tempfile.TemporaryDirectory() as base, ComfyServer(make_base_directory(Path(base))) as server:
            object_info = server.object_info()
        write_texts(LOCALES / ENGLISH, english_texts(object_info))
        _write_json(LOCALES / ENGLISH / "values.json", fixed_values(object_info))
    if options.command == "translated":
        for language in options.languages:
            mark_translated(LOCALES / language, read_texts(LOCALES / ENGLISH))
    status = 0
    for language in present_languages():
        problems = problems_of(language)
        print(f"{language}: {len(problems)} problems" if problems else f"{language}: whole")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main())
