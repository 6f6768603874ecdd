"""A byte-level BPE tokenizer trained on the run's own captions, in CLIP's layout.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (ACL 2016), over bytes, with CLIP's
end-of-word suffix, normalisation and markers (Radford et al. 2021), so that diffusers' pipelines read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
SMALLEST_VOCABULARY = 514  # 256 bytes, the same ending a word, and two markers


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1024, length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from `captions`; any other text falls back to bytes, nothing is unknown.

    Args:
        captions: texts to learn from; streamed once.
        vocab_size: most tokens it may have; few captions give fewer.
        length: tokens per caption after padding and cutting, markers included.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes (twice) and the two markers.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}, needs at least {SMALLEST_VOCABULARY}")
    num_merges = vocab_size - SMALLEST_VOCABULARY
    # CLIPTokenizer's own normaliser and word splitter, so that training and use cut words alike.
    frame = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    tokenizer.normalizer, tokenizer.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + num_merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in learned][:num_merges]
    # CLIP's order: bytes, bytes that end a word, merges, markers. Every byte is there, seen in the captions or not.
    tokens = [*alphabet, *(c + SUFFIX for c in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in a fixed order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which diffusers and `load` read."""
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> CLIPTokenizer:
    """Read a tokenizer from a local folder: a CLIP's, or a T5's.

    Raises:
        ValueError: there is no tokenizer in the folder.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{folder} holds no tokenizer (no tokenizer.json there)")
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()).get("tokenizer_class", "") if settings.is_file() else ""
    source: Any = T5Tokenizer if named.startswith("T5") else CLIPTokenizer
    return source.from_pretrained(folder, local_files_only=True)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids of captions, padded and cut to the tokenizer's length: int64 (batch, length)."""
    length = tokenizer.model_max_length
    rows = tokenizer(captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), length)


def tokenizer_json(folder: Path) -> str:
    """The tokenizer as one JSON string for `tokenizers.Tokenizer.from_str`, padding and cutting included.

    A data task tokenises with it and needs neither torch nor transformers; the ids equal `encode`'s.
    """
    tokenizer = load(folder)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    length = tokenizer.model_max_length
    backend.enable_truncation(max_length=length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=str(tokenizer.pad_token))
    return str(backend.to_str())
