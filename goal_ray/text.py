"""Captions as tokens, and exactly which tokens of a caption each of its sentences became.

A tokenizer cleans a caption before it cuts it into tokens (mended Unicode, HTML entities, white space, case), so its
offsets shift. Both sides therefore meet in one coordinate that survives the cleaning: a byte's position in the *dense*
text, the cleaned caption as UTF-8 with all white space left out.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from tokenizers.models import BPE

from goal_ray.errors import ModelError

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer


class EncodedCaption(NamedTuple):
    """A caption as a model reads it.

    ids           (l,) int32, start token … end token, unpadded, l ≤ context_length
    spans_tokens  (S, 2) int32, half-open positions within `ids` for each sentence; (-1, -1) where there are none
    """

    ids: np.ndarray
    spans_tokens: np.ndarray


class CaptionEncoder:
    """Turns captions into an open_clip tokenizer's ids and finds each sentence among them.

    tokenizer  open_clip's SimpleTokenizer, or its HFTokenizer around a fast tokenizer. Raises ModelError for others.
    """

    def __init__(self, tokenizer: Any):
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer  # not where an encoder is unpickled, in readers

        self._tokens: _Tokens
        if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
            self._tokens = _SimpleTokens(tokenizer)
        elif isinstance(tokenizer, HFTokenizer) and tokenizer.tokenizer.is_fast and not tokenizer.tokenizer_mode:
            self._tokens = _FastTokens(tokenizer)
        else:
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__} cannot tell which characters its tokens come from; supported "
                "are open_clip's SimpleTokenizer without text masking, and its HFTokenizer around a fast tokenizer "
                "in standard mode: choose a model that uses one of these"
            )

    def encode(self, caption: str, spans_chars: Sequence[tuple[int, int]], context_length: int) -> EncodedCaption:
        """The ids of a caption, equal to `tokenizer([caption], context_length)` without its padding, and the spans.

        spans_chars     (start, end) character offsets into the caption, one per sentence
        context_length  longer captions are cut as the tokenizer cuts them

        A sentence gets every token that holds a part of it. Two sentences that meet inside a token (`。」`, no space)
        both get it. A sentence gets (-1, -1) when the context cuts a part of it away, when nothing of it is left after
        the cleaning, or when its place is not certain: an HTML entity or a combining mark across its edge, or signs
        that the cleaning takes for mis-decoded text together, but not alone.
        """
        if not spans_chars:  # half the work
            return EncodedCaption(self._tokens.encode(caption, context_length), np.empty((0, 2), np.int32))
        text = self._tokens.locate(caption, context_length)
        start_S, end_S = _locate_sentences(self._tokens, caption, spans_chars, text.dense).T
        first_S = np.searchsorted(text.ends_l, start_S, side="right")
        behind_S = np.searchsorted(text.starts_l, end_S, side="left")
        found_S = (start_S < end_S) & (end_S <= text.kept_bytes) & (first_S < behind_S)
        spans_tokens = np.where(found_S[:, None], np.stack([first_S, behind_S], axis=1), -1)
        return EncodedCaption(text.ids_l, spans_tokens.astype(np.int32))


def pad_batch(ids: Sequence[np.ndarray], length: int = 0) -> np.ndarray:
    """Stacks B rows of ids into (B, L) int64, L the length of the longest, or `length` where that is more."""
    batch_BL = np.zeros((len(ids), max([length, *map(len, ids)])), np.int64)
    for row, ids_l in zip(batch_BL, ids, strict=True):
        row[: len(ids_l)] = ids_l
    return batch_BL


class _LocatedText(NamedTuple):
    """ids_l int32, and for each the bytes of `dense` it holds, half-open and ascending; start and end tokens hold none.

    kept_bytes  how many bytes of `dense` the context keeps whole; -1 where tokens and text do not agree
    """

    ids_l: np.ndarray
    dense: bytes
    starts_l: np.ndarray
    ends_l: np.ndarray
    kept_bytes: int


class _Tokens(Protocol):
    """What CaptionEncoder asks of a tokenizer."""

    def encode(self, caption: str, context_length: int) -> np.ndarray: ...
    def locate(self, caption: str, context_length: int) -> _LocatedText: ...
    def clean(self, text: str) -> str: ...


def _dense(cleaned: str) -> bytes:
    return "".join(cleaned.split()).encode()


def _locate_sentences(
    tokens: _Tokens, caption: str, spans_chars: Sequence[tuple[int, int]], dense: bytes
) -> np.ndarray:
    """Where each sentence lies in `dense`, half-open (S, 2); (-1, -1) where cutting there changes the cleaning."""

    def clean(start: int, end: int) -> bytes:
        text = caption[start:end]
        return _dense(tokens.clean(text)) if text.strip(" ") else b""

    length = len(caption)
    cuts = sorted({0, length, *(offset for span in spans_chars for offset in span)})
    pieces = [clean(start, end) for start, end in pairwise(cuts)]
    if b"".join(pieces) == dense:
        place = dict(zip(cuts, accumulate(map(len, pieces), initial=0), strict=True))
        return np.array([(place[start], place[end]) for start, end in spans_chars])
    # Some cut is not neutral: trust only those that are when made alone, and sentences that clean to what stands there.
    place = {cut: len(clean(0, cut)) for cut in cuts if clean(0, cut) + clean(cut, length) == dense}
    places = [(place.get(start, -1), place.get(end, -1)) for start, end in spans_chars]
    certain = [
        min(found) >= 0 and dense[slice(*found)] == clean(*span)
        for found, span in zip(places, spans_chars, strict=True)
    ]
    return np.where(np.array(certain)[:, None], places, -1)


class _SimpleTokens:
    """OpenAI's byte-level BPE: the bytes of its tokens, one after the other, are the dense text.

    Holds what the tokenizer is made of instead of the tokenizer, whose class takes seconds to import where this is
    unpickled. Each word is cut into tokens once and remembered: captions repeat their words.
    """

    WORDS = 2**16

    def __init__(self, tokenizer: "SimpleTokenizer"):
        self.clean = tokenizer.clean_fn
        self.pattern = tokenizer.pat
        self.sign_of_byte = tokenizer.byte_encoder
        self.start_id, self.end_id = tokenizer.sot_token_id, tokenizer.eot_token_id
        self.bpe = BPE(tokenizer.encoder, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>")
        self.bytes_of_id = {
            number: bytes(tokenizer.byte_decoder[sign] for sign in token.removesuffix("</w>"))
            for number, token in tokenizer.decoder.items()
        }
        self.known = {tokenizer.decoder[number]: [number] for number in tokenizer.all_special_ids}

    def encode(self, caption: str, context_length: int) -> np.ndarray:
        return self._frame(self._body(self.clean(caption)), context_length)

    def _body(self, cleaned: str) -> list[int]:
        """What the tokenizer gives for the text that it has cleaned."""
        body: list[int] = []
        for word in self.pattern.findall(cleaned):
            ids = self.known.get(word)
            if ids is None:
                signs = "".join(self.sign_of_byte[byte] for byte in word.encode())
                ids = [token.id for token in self.bpe.tokenize(signs)]
                if len(self.known) < self.WORDS:
                    self.known[word] = ids
            body += ids
        return body

    def _frame(self, body: list[int], context_length: int) -> np.ndarray:
        ids = [self.start_id, *body, self.end_id][:context_length]
        ids[-1] = self.end_id
        return np.array(ids, np.int32)

    def locate(self, caption: str, context_length: int) -> _LocatedText:
        cleaned = self.clean(caption)
        body = self._body(cleaned)
        ids_l = self._frame(body, context_length)
        dense = _dense(cleaned)
        held = [self.bytes_of_id[number] for number in body]
        agrees = b"".join(held) == dense
        sizes_l = np.array([0, *map(len, held), 0][: len(ids_l)])
        sizes_l[-1] = 0
        ends_l = np.cumsum(sizes_l)
        return _LocatedText(ids_l, dense, ends_l - sizes_l, ends_l, int(ends_l[-1]) if agrees else -1)


class _FastTokens:
    """A Hugging Face fast tokenizer, which knows the characters of the cleaned text that each token comes from.

    Its own copy of the Rust tokenizer never changes: transformers sets padding and truncation on the shared one at
    every call, which fails now and then when threads meet there.
    """

    def __init__(self, tokenizer: "HFTokenizer"):
        self.clean = tokenizer.clean_fn
        self.stripped_id = tokenizer.tokenizer.sep_token_id if tokenizer.strip_sep_token else None
        self.rust = copy.deepcopy(tokenizer.tokenizer.backend_tokenizer)
        self.rust.no_padding()
        self.rust.no_truncation()

    def encode(self, caption: str, context_length: int) -> np.ndarray:
        return self.locate(caption, context_length).ids_l

    def locate(self, caption: str, context_length: int) -> _LocatedText:
        cleaned = self.clean(caption)
        encoding = self.rust.encode(cleaned, add_special_tokens=False)
        room = context_length - self.rust.num_special_tokens_to_add(is_pair=False)
        lost_chars = min((start for start, end in encoding.offsets[room:] if start < end), default=len(cleaned))
        encoding.truncate(room)
        encoding = self.rust.post_process(encoding)
        ids_l = np.array(encoding.ids, np.int32)
        if self.stripped_id is not None:
            ids_l[ids_l == self.stripped_id] = 0
        sizes = (0 if sign.isspace() else len(sign.encode()) for sign in cleaned)
        dense_at = np.fromiter(accumulate(sizes, initial=0), np.int64, len(cleaned) + 1)
        starts_l, ends_l = dense_at[np.array(encoding.offsets, np.int64).reshape(-1, 2)].T
        holds_l = ends_l > starts_l
        ends_l = np.maximum.accumulate(ends_l)
        starts_l = np.where(holds_l, starts_l, ends_l)
        agrees = bool((np.diff(starts_l) >= 0).all())
        return _LocatedText(ids_l, _dense(cleaned), starts_l, ends_l, int(dense_at[lost_chars]) if agrees else -1)
