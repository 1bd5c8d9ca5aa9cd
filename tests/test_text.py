"""Sentences of real and odd captions, and the exact tokens that each sentence became."""

import json
import os
import pickle
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import open_clip
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from goal_ray.errors import ConfigError, ModelError
from goal_ray.sentences import split_sentences
from goal_ray.text import CaptionEncoder, pad_batch

TOKENIZER = open_clip.get_tokenizer("ViT-B-32")
ENCODER = CaptionEncoder(TOKENIZER)
CANONICAL = SimpleTokenizer(clean="canonicalize")
CANONICAL_ENCODER = CaptionEncoder(CANONICAL)
WHOLE = 100_000

PLAIN = (
    *("A dog. ", "A dog. ", "The 2nd one's 3.5 m tall, e.g. here!", 'He said "Go!" ', "Wait... what?", "Mr. Smith. "),
    *(
        "一只狗。",
        "「它在跑！」",
        "नमस्ते।",
        "🐶",
        "👨‍👩‍👧 ",
        "İ",
        "ß",
        "ﬁ",
        "Ａ",
        "½",
        "“curly”",
        "_a_",
        ".",
        '."(',
        "--",
    ),
    *(" ", "  ", "\n", "\r\n\r\n", "\t", "\u00a0", "\u3000", "\ufeff", "\u200b", "\x1c", "\x00"),
)
FRAGMENTS = (
    *PLAIN,
    *("&amp;", "&amp", ";", "&lt;b&gt;", "&#x1F600;", "&amp;quot;", "<b>", "â€œmojibakeâ€\x9d", "e\u0301", "\u0301"),
    *("ΑΣ", "<start_of_text>", "<END_OF_TEXT>", "</w>", "#1", "\x85"),
)
CAPTIONS = st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(codec="utf-8"), max_size=4), max_size=25)


@st.composite
def captions_with_spans(draw) -> tuple[str, list[tuple[int, int]]]:
    """A caption with its sentences, or with spans cut anywhere: through words, entities and combined characters."""
    caption = "".join(draw(CAPTIONS))
    if draw(st.booleans()):
        return caption, split_sentences(caption)
    cuts = sorted(draw(st.sets(st.integers(0, len(caption)), max_size=8)))
    return caption, list(pairwise(cuts))


def dense(text: str, clean=TOKENIZER.clean_fn) -> bytes:
    """Cleaned text without white space."""
    return "".join(clean(text).split()).encode()


def bytes_of(ids: np.ndarray) -> bytes:
    """The text of ids without white space."""
    text = "".join(TOKENIZER.decoder[number].removesuffix("</w>") for number in ids.tolist())
    return bytes(TOKENIZER.byte_decoder[sign] for sign in text)


def check_spans(caption: str, spans_chars: list[tuple[int, int]]) -> None:
    """Every invariant of sentence spans."""
    previous_end = 0
    for start, end in spans_chars:
        sentence = caption[start:end]
        assert previous_end <= start < end <= len(caption)
        assert sentence == sentence.strip().strip("\ufeff")
        previous_end = end


def real_captions() -> list[str]:
    folder = os.environ.get("GOAL_RAY_SHARED")
    if folder is None:
        pytest.skip("GOAL_RAY_SHARED names no folder with data/docci_captions_1000.json")
    path = Path(folder, "data", "docci_captions_1000.json")
    return [entry["caption"] for entry in json.loads(path.read_text(encoding="utf-8"))]


SPLITS = {
    "decimals": ("It is 3.5 m tall. It cost $19.95.", ["It is 3.5 m tall.", "It cost $19.95."]),
    "abbreviations": ("Mr. Smith, e.g. here. He sits.", ["Mr. Smith, e.g. here.", "He sits."]),
    "quotes": ('He said "Stop it." Then he left.', ['He said "Stop it."', "Then he left."]),
    "ellipsis": ("Wait... what is it? Yes.", ["Wait... what is it?", "Yes."]),
    "emoji": ("Nice dog 🐶. A cat 👨‍👩‍👧!", ["Nice dog 🐶.", "A cat 👨‍👩‍👧!"]),
    "cjk": ("这是一只狗。它在跑！", ["这是一只狗。", "它在跑！"]),
    "a lone line break": ("A dog\nruns here. A cat.", ["A dog\nruns here.", "A cat."]),
    "an empty line": ("A title\r\n\r\nA dog.", ["A title", "A dog."]),
    "white space and marks": ("\ufeff A dog. \u3000\ufeff\n A cat. \ufeff", ["A dog.", "A cat."]),
    "white space of several bytes": (
        "Exhibit A\u00a0. A cat\u2003. Row B\x85.",
        ["Exhibit A\u00a0. A cat\u2003.", "Row B\x85."],
    ),
    "punctuation alone": ("A dog. ??? !!! A cat.\n\n...", ["A dog.", "A cat."]),
    "no full stop": ("a dog on a mat", ["a dog on a mat"]),
    "nothing": (" \ufeff\n... ", []),
}


@pytest.mark.parametrize("name", SPLITS)
def test_captions_split_where_their_sentences_end(name):
    caption, expected = SPLITS[name]
    assert [caption[start:end] for start, end in split_sentences(caption)] == expected


def test_abbreviations_follow_the_language():
    caption = "Ein Baum, z.B. hier. Am 3. Mai."
    assert [caption[a:b] for a, b in split_sentences(caption, "de")] == ["Ein Baum, z.B. hier.", "Am 3. Mai."]


@given(CAPTIONS.map("".join), st.sampled_from(["en", "de", "zh", "ja", "hi", "ar", "xx"]))
@settings(max_examples=200)
def test_sentences_are_ordered_trimmed_and_lose_no_letter(caption, language):
    spans = split_sentences(caption, language)
    check_spans(caption, spans)
    kept = "".join(caption[start:end] for start, end in spans)
    assert [sign for sign in kept if sign.isalnum()] == [sign for sign in caption if sign.isalnum()]


def test_captions_of_thousands_of_words_split():
    caption = "It costs 3.5 dollars, e.g. here, said Mr. Smith to them. " * 200
    assert len(split_sentences(caption)) == 200


@pytest.mark.parametrize("language", ["", "EN", "english", "en-US", "zh_CN", "e", "en\n"])
def test_a_language_that_is_no_bare_code_is_refused(language):
    with pytest.raises(ConfigError, match="ISO 639"):
        split_sentences("A dog.", language)


def test_real_captions_split_and_map_completely():
    for caption in real_captions():
        spans = split_sentences(caption)
        check_spans(caption, spans)
        encoded = ENCODER.encode(caption, spans, WHOLE)
        for (first, behind), (start, end) in zip(encoded.spans_tokens, spans, strict=True):
            assert first >= 1
            assert dense(caption[start:end]) in bytes_of(encoded.ids[first:behind])


@given(CAPTIONS.map("".join), st.integers(1, 60))
@settings(max_examples=200)
def test_ids_are_those_of_open_clips_tokenizer(caption, context_length):
    theirs = TOKENIZER([caption], context_length)[0].numpy()
    for spans in ([], split_sentences(caption)):
        ids = ENCODER.encode(caption, spans, context_length).ids
        assert ids.dtype == np.int32
        assert np.array_equal(pad_batch([ids, np.zeros(context_length)])[0], theirs)


def test_ids_are_the_same_whether_or_not_a_word_is_remembered():
    encoder = CaptionEncoder(TOKENIZER)
    encoder._tokens.WORDS = 2
    first, again = (encoder.encode("two words are remembered, all others are not", [], 77).ids for _ in range(2))
    assert len(encoder._tokens.known) == 2
    assert np.array_equal(first, again)
    assert np.array_equal(first, ENCODER.encode("two words are remembered, all others are not", [], 77).ids)


@given(captions_with_spans())
@settings(max_examples=400)
@example(("===", [(0, 1), (1, 3)]))
def test_the_tokens_of_a_mapped_sentence_hold_it_and_start_and_end_with_it(drawn):
    caption, spans = drawn
    encoded = ENCODER.encode(caption, spans, WHOLE)
    assert encoded.spans_tokens.dtype == np.int32
    assert encoded.spans_tokens.shape == (len(spans), 2)
    for (first, behind), (start, end) in zip(encoded.spans_tokens, spans, strict=True):
        if first < 0:
            assert behind == -1
            continue
        assert 1 <= first < behind <= len(encoded.ids) - 1
        sentence = dense(caption[start:end])
        held = bytes_of(encoded.ids[first:behind])
        in_first, in_last = (len(bytes_of(encoded.ids[at : at + 1])) for at in (first, behind - 1))
        assert sentence
        # A sentence such as `==` may be found at several places of the tokens that hold it.
        places = [before for before in range(in_first) if held.startswith(sentence, before)]
        assert any(len(held) - before - len(sentence) < in_last for before in places)


@given(st.lists(st.sampled_from(PLAIN), max_size=25).map("".join))
@settings(max_examples=200)
def test_every_sentence_of_a_caption_without_entities_combining_marks_or_mojibake_is_mapped(caption):
    assume(ftfy.fix_encoding(caption) == caption)
    spans = split_sentences(caption)
    assert (ENCODER.encode(caption, spans, WHOLE).spans_tokens > 0).all()


def test_a_sentence_that_its_surroundings_make_look_mis_decoded_is_dropped_not_mislabelled():
    # To ftfy the first two signs are an Arabic letter, decoded as Windows-1254; with the last, so are the second two.
    caption = "İ½İ\xa0"
    assert ftfy.fix_encoding(caption) != caption
    assert split_sentences(caption) == [(0, 3)]
    assert ENCODER.encode(caption, [(0, 3)], WHOLE).spans_tokens.tolist() == [[-1, -1]]


@given(st.lists(st.sampled_from(["a red dog runs.", "two cats, asleep!", "is it 3.5 m tall?"]), min_size=1, max_size=6))
def test_plain_sentences_encode_alone_as_within_their_caption(sentences):
    caption = " ".join(sentences)
    ids, spans = ENCODER.encode(caption, split_sentences(caption), WHOLE)
    assert len(spans) == len(sentences)
    for (first, behind), sentence in zip(spans, sentences, strict=True):
        assert ids[first:behind].tolist() == TOKENIZER.encode(sentence)
    assert spans[0, 0] == 1
    assert spans[-1, 1] == len(ids) - 1
    assert (spans[1:, 0] == spans[:-1, 1]).all()


def test_repeated_sentences_map_to_different_places_in_order():
    caption = "A dog. A dog.  A dog."
    spans = ENCODER.encode(caption, split_sentences(caption), WHOLE).spans_tokens
    assert spans.tolist() == [[1, 4], [4, 7], [7, 10]]


@pytest.mark.parametrize(("context_length", "kept"), [(11, 3), (10, 2), (8, 2), (7, 1), (5, 1), (4, 0), (2, 0)])
def test_a_sentence_that_the_context_cuts_is_dropped(context_length, kept):
    caption = "A dog. A dog. A dog."
    spans = ENCODER.encode(caption, split_sentences(caption), context_length).spans_tokens
    assert (spans[:, 0] >= 0).tolist() == [place < kept for place in range(3)]


def test_sentences_that_meet_inside_a_token_both_get_it():
    caption = 'It says hi."GO" is printed.'
    meeting = caption.index('"')
    ids, spans = ENCODER.encode(caption, [(0, meeting), (meeting, len(caption))], WHOLE)
    assert spans[0, 1] == spans[1, 0] + 1
    assert bytes_of(ids[spans[1, 0] : spans[0, 1]]) == b'."'


def test_an_entity_across_an_edge_leaves_only_its_neighbours_unmapped():
    caption = "A dog. Salt &amp; pepper. A cat."
    cut = caption.index("mp;")
    spans = ENCODER.encode(caption, [(0, 6), (7, cut), (cut, 25), (26, 32)], WHOLE).spans_tokens
    assert (spans[:, 0] >= 0).tolist() == [True, False, False, True]


def test_special_tokens_spelled_in_a_caption_belong_to_their_sentence():
    caption = "A dog. <start_of_text> is a mark. A cat."
    ids, spans = ENCODER.encode(caption, split_sentences(caption), WHOLE)
    assert bytes_of(ids[slice(*spans[1])]) == b"<start_of_text>isamark."
    assert ids[spans[1, 0]] == TOKENIZER.sot_token_id


def test_a_control_sign_that_the_cleaning_turns_into_text_moves_no_sentence():
    caption = "A dog. \x85 A cat."  # cleaned: "a dog. … a cat.", though Python takes the sign for white space
    spans = [(0, 6), (9, 15)]
    ids, spans_tokens = ENCODER.encode(caption, spans, WHOLE)
    assert [bytes_of(ids[slice(*span)]) for span in spans_tokens] == [b"adog.", b"acat."]


def test_a_span_without_text_has_no_tokens():
    assert ENCODER.encode("A \u200b\ufeff dog", [(2, 4), (3, 4)], WHOLE).spans_tokens.tolist()[1] == [-1, -1]


@given(CAPTIONS.map("".join))
@settings(max_examples=100)
def test_canonicalising_tokenizers_are_mapped_too(caption):
    spans = split_sentences(caption)
    ids, spans_tokens = CANONICAL_ENCODER.encode(caption, spans, WHOLE)
    assert ids.tolist()[1:-1] == CANONICAL.encode(caption)
    for (first, behind), (start, end) in zip(spans_tokens, spans, strict=True):
        if first >= 0:
            assert dense(caption[start:end], CANONICAL.clean_fn) in bytes_of(ids[first:behind])


def test_an_encoder_travels_between_processes():
    caption = "A dog. A cat."
    again = pickle.loads(pickle.dumps(ENCODER)).encode(caption, split_sentences(caption), 77)
    assert again.spans_tokens.tolist() == [[1, 4], [4, 7]]


def test_a_tokenizer_that_hides_where_tokens_come_from_is_refused():
    for tokenizer in (SimpleTokenizer(reduction_mask="random"), object()):
        with pytest.raises(ModelError, match="supported are"):
            CaptionEncoder(tokenizer)


def test_a_batch_is_cut_to_its_longest_row():
    batch = pad_batch([np.array([5, 6, 7], np.int32), np.array([8], np.int32)])
    assert batch.dtype == np.int64
    assert batch.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert pad_batch([]).shape == (0, 0)


def train_byte_bpe(tokenizers, special):
    """RoBERTa's kind: bytes, a space belongs to the word behind it."""
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return rust, tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)


def train_unigram(tokenizers, special):
    """XLM-R's kind: sentence pieces over NFKC, a mark for the space."""
    rust = tokenizers.Tokenizer(tokenizers.models.Unigram())
    rust.normalizer = tokenizers.normalizers.NFKC()
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return rust, tokenizers.trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")


def train_word_piece(tokenizers, special):
    """BERT's kind: lower case without accents, `##` before the later pieces of a word."""
    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    rust.normalizer = tokenizers.normalizers.BertNormalizer()
    rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return rust, tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)


@pytest.fixture(scope="module", params=[train_byte_bpe, train_unigram, train_word_piece])
def hf_tokenizer(request, tmp_path_factory):
    import tokenizers
    import transformers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    rust, trainer = request.param(tokenizers, special)
    rust.train_from_iterator(
        [text for text, _ in SPLITS.values()] + ["a red dog runs over the green grass"] * 3, trainer
    )
    rust.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, rust.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token="<pad>", bos_token="<s>", eos_token="</s>", sep_token="</s>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return HFTokenizer(str(folder), strip_sep_token=request.param is train_word_piece)


@given(CAPTIONS.map("".join), st.integers(3, 60))
@settings(max_examples=100)
def test_ids_are_those_of_hugging_face_tokenizers(hf_tokenizer, caption, context_length):
    encoder = CaptionEncoder(hf_tokenizer)
    theirs = hf_tokenizer([caption], context_length)[0].numpy()
    ids = encoder.encode(caption, split_sentences(caption), context_length).ids
    assert np.array_equal(pad_batch([ids, np.zeros(context_length)])[0], theirs)


@given(
    st.lists(
        st.sampled_from(["a red dog runs.", "It is 3.5 m tall?", "这是一只狗。", "Café 🐶!"]), min_size=1, max_size=6
    )
)
@settings(deadline=None)
def test_hugging_face_tokenizers_map_sentences_to_their_own_tokens(hf_tokenizer, sentences):
    caption = " ".join(sentences)
    encoder = CaptionEncoder(hf_tokenizer)
    assume(len(split_sentences(caption)) == len(sentences))
    ids, spans = encoder.encode(caption, split_sentences(caption), WHOLE)
    assert spans[0, 0] == 1
    assert spans[-1, 1] == len(ids) - 1
    for (first, behind), sentence in zip(spans, sentences, strict=True):
        # A space before a word may be part of its first token.
        alone = [encoder.encode(text, [], WHOLE).ids[1:-1].tolist() for text in (sentence, f"x {sentence}")]
        assert ids[first:behind].tolist() in (alone[0], alone[1][-(behind - first) :])


def test_hugging_face_tokenizers_drop_what_the_context_cuts(hf_tokenizer):
    caption = "A red dog. A dog runs over the grass."
    encoder = CaptionEncoder(hf_tokenizer)
    spans = split_sentences(caption)
    whole = encoder.encode(caption, spans, WHOLE)
    behind_first = whole.spans_tokens[0, 1]
    for context_length in range(3, len(whole.ids) + 1):
        mapped = encoder.encode(caption, spans, context_length).spans_tokens[:, 0] >= 0
        assert mapped.tolist() == [context_length > behind_first, context_length == len(whole.ids)]
