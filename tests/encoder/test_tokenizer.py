"""Subject words become the tokens the reference's tokenizer makes."""

from __future__ import annotations

import hashlib
import logging
import shutil
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import BertTokenizer

from blip_qformer.encoder import tokenize_subjects
from blip_qformer.encoder.tokenizer import VOCABULARY, bert_tokenizer


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> BertTokenizer:
    folder = tmp_path_factory.mktemp("bert")
    shutil.copy(VOCABULARY, folder / "vocab.txt")
    tokenizer = BertTokenizer.from_pretrained(folder, truncation_side="right")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def test_vocabulary_is_bert_base_uncased():
    content = VOCABULARY.read_bytes()
    assert len(content.splitlines()) == 30522
    assert hashlib.sha256(content).hexdigest().startswith("07eced375cec")
    assert bert_tokenizer().token_to_id("[DEC]") == 30522


# The tokenizers library does not part these rare Chinese characters, the reference does; neither knows them.
UNPARTED = "".join(map(chr, range(0x2B820, 0x2B920)))


def is_new_mark(character: str) -> bool:
    """Whether a combining mark is younger than Unicode 3.2: the reference strips all, the library those it knows."""
    return unicodedata.category(character) == "Mn" and unicodedata.ucd_3_2_0.category(character) != "Mn"


@example(text="Teddy-Bear  café, naïve 狗 dog")
@given(
    text=st.text(
        st.characters(exclude_categories=["Cs", "Co", "Cn"], exclude_characters=UNPARTED).filter(
            lambda character: not is_new_mark(character)
        ),
        min_size=1,
        max_size=40,
    )
)
def test_ids_are_the_references(reference, text):
    encoding = bert_tokenizer().encode(text)
    assert encoding.ids == reference(text).input_ids


def test_batch_is_padded_and_masked(reference):
    words = ["dog", "big teddy bear"]
    ids, mask = tokenize_subjects(words)
    expected = reference(words, return_tensors="pt", padding=True)
    assert ids.tolist() == expected.input_ids.tolist()
    assert mask.tolist() == expected.attention_mask.tolist()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("", "The subject word is empty"),
        ("  \n", "The subject word is empty"),
        ("dog " * 600, "600 tokens long.*at most 510"),
        ("🐕", 'knows no part of the subject word "🐕".*in English'),
    ],
)
def test_words_that_cannot_be_read(word, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokenize_subjects([word])


def test_partly_unknown_word_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="blip_diffusion"):
        tokenize_subjects(["dog 🐕"])
    assert "does not know every part" in caplog.text


def test_chinese_word_is_read_character_by_character(reference):
    ids, _ = tokenize_subjects(["小狗"])
    assert ids.tolist() == [reference("小狗").input_ids]
