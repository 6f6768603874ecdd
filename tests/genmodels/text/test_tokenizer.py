from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from genmodels.text import tokenizer as text
from genmodels.text.config import TrainedTextEncoder
from genmodels.text.encoder import build_text_encoder
from tests.genmodels.tiny import CAPTIONS, TEXT

UNSEEN = ["", "Zürich – l'été 🙂", "a RED   seven\non white", "x" * 200, "<|endoftext|> injected", "12 345"]


@pytest.fixture(scope="module")
def trained():
    return text.train_tokenizer(iter(CAPTIONS * 4), vocab_size=560, length=12)


def test_words_of_the_captions_become_one_token(trained):
    ids = text.encode(trained, ["red seven"])[0].tolist()
    assert ids[0] == trained.bos_token_id and ids[3] == trained.eos_token_id
    assert len(trained) <= 560 and max(trained.get_vocab().values()) == len(trained) - 1


def test_any_text_comes_back_from_its_bytes():
    trained = text.train_tokenizer(CAPTIONS, vocab_size=514, length=40)  # no merges: bytes alone
    for caption in ("l'été 🙂 red", "ß", "ink?"):
        ids = trained(caption)["input_ids"]
        assert trained.unk_token_id not in ids[1:-1]
        assert trained.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")


def test_a_saved_tokenizer_gives_the_same_ids(trained, tmp_path):
    text.save(trained, tmp_path)
    again = text.load(tmp_path)
    assert again.model_max_length == 12
    assert text.encode(again, CAPTIONS + UNSEEN).equal(text.encode(trained, CAPTIONS + UNSEEN))


def test_the_json_alone_gives_the_same_ids(trained, tmp_path):
    text.save(trained, tmp_path)
    plain = Tokenizer.from_str(text.tokenizer_json(tmp_path))
    ids = torch.tensor([e.ids for e in plain.encode_batch(CAPTIONS + UNSEEN)])
    assert ids.equal(text.encode(trained, CAPTIONS + UNSEEN)) and ids.shape[1] == 12


def test_the_order_of_equal_captions_does_not_change_the_vocabulary(trained):
    again = text.train_tokenizer(list(reversed(CAPTIONS)) * 4, vocab_size=560, length=12)
    assert again.get_vocab() == trained.get_vocab()


def test_too_small_a_vocabulary_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 514"):
        text.train_tokenizer(CAPTIONS, vocab_size=300)
    with pytest.raises(ValueError, match="no tokenizer"):
        text.load(tmp_path)


def test_an_encoder_too_small_for_the_tokenizer_is_refused(trained):
    with pytest.raises(ValueError, match="vocab_size"):
        build_text_encoder(TrainedTextEncoder.model_validate({**TEXT, "vocab_size": 520}), trained)
    with pytest.raises(ValueError, match="length"):
        build_text_encoder(TrainedTextEncoder.model_validate({**TEXT, "length": 20}), trained)
