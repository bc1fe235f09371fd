"""Pairs as batches."""

from __future__ import annotations

import dataclasses

from transformers import BertTokenizer

from blip_qformer.data.collate import multimodal_batch
from blip_qformer.encoder.tokenizer import VOCABULARY
from tests import tiny

CAPTIONS = ("a dog", "a teddy bear and a red apple at night, under a sky full of stars", "a 🐕 in the snow")


def test_captions_are_cut_and_padded_as_bert_does(tmp_path):
    pairs = [dataclasses.replace(tiny.make_pair(number), caption=text) for number, text in enumerate(CAPTIONS)]
    (tmp_path / "vocab.txt").write_bytes(VOCABULARY.read_bytes())
    bert = BertTokenizer(str(tmp_path / "vocab.txt"))
    expected = bert(list(CAPTIONS), padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    assert expected.attention_mask[1].all()
    assert len(bert(CAPTIONS[1]).input_ids) > 12

    batch = multimodal_batch(pairs, size=28, tokens=12)
    assert batch["input_ids"].equal(expected.input_ids)
    assert batch["attention_mask"].equal(expected.attention_mask)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
