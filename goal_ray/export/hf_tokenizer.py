"""open_clip's SimpleTokenizer as the files of a Hugging Face fast tokenizer.

transformers' own CLIPTokenizer leaves out most of the cleaning that CLIP's text goes through (ftfy, HTML): a curly
quote would become other tokens than in training. The normaliser here makes up for all that works sign by sign, and for
the common HTML entities; it cannot do what looks at a whole text, such as mending text that was decoded wrongly.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# `&amp;` comes twice, for open_clip decodes twice: `&amp;quot;` is a quote.
ENTITIES = (
    ("&amp;", "&"),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&#39;", "'"),
    ("&nbsp;", " "),
)
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizer_files(tokenizer: SimpleTokenizer, context_length: int) -> dict[str, Any]:
    """The contents of tokenizer.json and tokenizer_config.json, by name."""
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): number for token, number in tokenizer.encoder.items()}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers' CLIPTokenizer would bring its own normaliser
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    word_end = {"type": "Replace", "pattern": {"String": "</w>"}, "content": "Ġ"}  # byte-level BPE's space
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    backend = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **special} for token in (START, END)],
        "normalizer": {"type": "Sequence", "normalizers": list(normalizers(tokenizer))},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocabulary[END]],
            "cls": [START, vocabulary[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "Sequence", "decoders": [word_end, byte_level]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [" ".join(pair) for pair in tokenizer.bpe_ranks],
        },
    }
    return {"tokenizer.json": backend, "tokenizer_config.json": settings}


def normalizers(tokenizer: SimpleTokenizer) -> Iterator[dict[str, Any]]:
    """The steps of the cleaning, in order."""
    for result, signs in replaced_signs(tokenizer.clean_fn).items():
        signs_pattern = "[" + "".join(f"\\x{{{ord(sign):x}}}" for sign in signs) + "]"
        yield {"type": "Replace", "pattern": {"Regex": signs_pattern}, "content": result}
    for entity, sign in ENTITIES:
        yield {"type": "Replace", "pattern": {"String": entity}, "content": sign}
    yield {"type": "NFC"}
    yield {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    yield {"type": "Lowercase"}


@cache
def replaced_signs(clean: Callable[[str], str]) -> dict[str, list[str]]:
    """What a cleaning makes of single signs beyond composing, lower case and white space: result -> signs.

    All of them lie in Unicode's first plane.
    """
    replaced: dict[str, list[str]] = {}
    for sign in map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000)]):
        cleaned = clean(f"a{sign}b")
        plain = " ".join(unicodedata.normalize("NFC", f"a{sign}b").lower().split())
        if cleaned != plain:
            replaced.setdefault(re.sub("^a|b$", "", cleaned), []).append(sign)
    return replaced
