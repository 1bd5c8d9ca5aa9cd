"""Sentences of long captions, as character spans."""

import re
import unicodedata

import sentencex

from goal_ray.errors import ConfigError

# sentencex panics on "A\u00a0.": it takes white space there for one byte. One sign for one keeps the offsets.
_PLAIN_SPACES = {ord(sign): " " for sign in re.findall(r"\s", "".join(map(chr, range(128, 0x3001))))}
_TRIMMED = re.compile(r"[^\s\ufeff](?:.*[^\s\ufeff])?", re.DOTALL)


def split_sentences(caption: str, language: str = "en") -> list[tuple[int, int]]:
    """The sentences of a caption as (start, end) character offsets into it as stored: in order, never overlapping.

    caption   any text; a lone line break does not end a sentence, an empty line does
    language  ISO 639 code, lower case and bare (`pt`, not `pt-BR`); a language that sentencex has no rules for is cut
              by those of a related language or of English

    White space and U+FEFF at the ends of a sentence are left out, and so is a piece without a letter, a digit or an
    emoji ("...", a stray quote): it has nothing to match with a picture. Raises ConfigError for a malformed code.
    """
    if not re.fullmatch("[a-z]{2,3}", language):
        # sentencex itself would take any string, and cut by English rules without a word.
        raise ConfigError(f"language {language!r} is not a bare lower-case ISO 639 code such as en, de, zh or hi")
    spans = []
    for piece in sentencex.get_sentence_boundaries(language, caption.translate(_PLAIN_SPACES)):
        trimmed = _TRIMMED.search(caption, piece["start_index"], piece["end_index"])
        if trimmed and any(sign.isalnum() or unicodedata.category(sign) == "So" for sign in trimmed[0]):
            spans.append(trimmed.span())
    return spans
