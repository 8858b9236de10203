# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer of 8,192 tokens with DeepSeek V4's special tokens, made of syllables.

Any UTF-8 text encodes (through the 256 byte tokens) and decodes to itself. The merges build
syllables, so that an answer of random tokens reads as syllables instead of broken bytes.
"""

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vllm_sm12x.tiny_checkpoint.config import CONFIG

# Ids 0, 1, 2 in the release and here.
_CONTROL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
# The last ids. What DeepSeek V4's prompt encoding and tool-call parser look for.
_MARKERS = (
    *("<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>", "<think>", "</think>", "｜DSML｜"),
    *("<｜action｜>", "<｜query｜>", "<｜authority｜>"),
    *("<｜domain｜>", "<｜title｜>", "<｜read_url｜>"),
)
_SPACE = "Ġ"  # the byte-level alphabet's letter for a space

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "<｜User｜>{{ message['content'] }}"
    "{%- if loop.last and add_generation_prompt"
    " or not loop.last and loop.nextitem['role'] == 'assistant' -%}"
    "<｜Assistant｜></think>"
    "{%- endif -%}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}"
    "{%- else -%}{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def special_ids() -> frozenset[int]:
    """Ids that stand for no text: an answer should not contain them."""
    vocab = CONFIG["vocab_size"]
    return frozenset(range(len(_CONTROL))) | frozenset(range(vocab - len(_MARKERS), vocab))


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    _build().save(str(directory / "tokenizer.json"))
    bos, eos, pad = _CONTROL
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": bos,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _build() -> Tokenizer:
    tokens = [*_CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(islice(_merges(), CONFIG["vocab_size"] - len(tokens) - len(_MARKERS)))
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_CONTROL))
    # Not `special`, as in the release: text with <think> or a tool call must survive decoding with
    # skip_special_tokens.
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in _MARKERS])
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
