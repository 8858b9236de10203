# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer with a model's special tokens, made of syllables.

Any UTF-8 text encodes (through the 256 byte tokens) and decodes to itself. The merges build
syllables, so that an answer of random tokens reads as syllables instead of broken bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_SPACE = "Ġ"  # the byte-level alphabet's letter for a space


@dataclass(frozen=True)
class SpecialTokens:
    """A model's tokens that stand for no text.

    Attributes:
        control: the first ids; decoding with skip_special_tokens leaves them out.
        markers: the last ids. Not `special`, as in the releases: text with <think> or a tool call
            must survive decoding with skip_special_tokens.
        bos: None where the model's prompts begin without one.
    """

    control: tuple[str, ...]
    markers: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    chat_template: str

    def special_ids(self, vocab_size: int) -> frozenset[int]:
        """Ids that an answer should not contain."""
        markers = range(vocab_size - len(self.markers), vocab_size)
        return frozenset(range(len(self.control))) | frozenset(markers)


def write_tokenizer(
    directory: Path, tokens: SpecialTokens, *, vocab_size: int, max_length: int
) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    _build(tokens, vocab_size).save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": tokens.bos,
        "chat_template": tokens.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens.eos,
        "model_max_length": max_length,
        "pad_token": tokens.pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _build(tokens: SpecialTokens, vocab_size: int) -> Tokenizer:
    texts = [*tokens.control, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(islice(_merges(), vocab_size - len(texts) - len(tokens.markers)))
    texts += [left + right for left, right in merges]
    vocab = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tokens.control))
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in tokens.markers])
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    """Merges, most wanted first: syllables, then with a capital, then after a space, then more."""
    vowels, consonants = "eaoiu", "tnsrhldcmfpgwybvkxjqz"
    for onsets in (consonants, consonants.upper()):
        yield from product(onsets, vowels)
        yield from product(map("".join, product(onsets, vowels)), consonants)
    yield from product(_SPACE, consonants)
    for size in (2, 3):
        letters = (consonants, vowels, consonants)[:size]
        yield from product(_SPACE, map("".join, product(*letters)))
    yield from product(vowels, consonants)
    yield from product(_SPACE, map("".join, product(vowels, consonants)))
    yield from product("0123456789", repeat=2)
    yield from product(consonants, repeat=2)
    yield from product(map("".join, product(consonants, repeat=2)), vowels)
