"""Text that arrives token by token: the tokenizer's own text of all tokens, up to a stop string."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_attn.errors import ShapeError
from prefix_attn.serving.text import CONTEXT, AnswerText, Detokenizer


def byte_level() -> Any:
    """A token a byte, so that most characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def words() -> Any:
    """A token a word with the space in front of it, which the decoder drops where the text begins."""
    vocabulary = {"▁one": 0, "▁two": 1, "▁three": 2, "!": 3, "<eos>": 4, "<x>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": ["<x>"]})
    return made


def test_a_tokenizer_of_mistral_common() -> None:
    """There what others have as a property is a method."""
    plain, tokenizer = words(), words()
    added = tokenizer.added_tokens_decoder
    tokenizer.__class__ = type("Common", (type(tokenizer),), {"added_tokens_decoder": lambda self: added})
    assert Detokenizer(tokenizer).special == Detokenizer(plain).special


def byte_fallback() -> Any:
    """A token a letter, and a byte of other characters; its decoder gives up on bytes that are no characters."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abc"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[no-untyped-call]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


BYTES, WORDS, FALLBACK = byte_level(), words(), byte_fallback()
READ, READ_WORDS = Detokenizer(BYTES), Detokenizer(WORDS)


def in_pieces(text: AnswerText, tokens: list[int], cuts: list[int]) -> list[str]:
    """What comes out when tokens go in between cuts; then what is left."""
    places = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    pieces = [text.add(tokens[a:b]) for a, b in itertools.pairwise(places)]
    return [*pieces, text.end()]


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(), answer=st.text(), cuts=st.lists(st.integers(0, 99)))
def test_pieces_join_to_the_text(prompt: str, answer: str, cuts: list[int]) -> None:
    asked, made = (BYTES(x)["input_ids"] for x in (prompt, answer))
    pieces = in_pieces(AnswerText(READ, asked), [*made, 0], cuts)
    assert "".join(pieces) == answer
    assert all("\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in answer for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(
    answer=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 99)),
)  # fmt: skip
def test_nothing_from_a_stop_string_on(answer: str, stops: list[str], cuts: list[int]) -> None:
    """However the text is cut into tokens: the stop string that is whole first decides, of several the longest."""
    text = AnswerText(READ, [], stops)
    got = "".join(in_pieces(text, BYTES(answer)["input_ids"], cuts))
    wholes = (answer[:n] for n in range(len(answer) + 1) if answer[:n].endswith(tuple(stops)))
    whole = next(wholes, None) if stops else None
    assert text.stopped == (whole is not None)
    longest = max((len(stop) for stop in stops if whole is not None and whole.endswith(stop)), default=0)
    assert got == (answer if whole is None else whole[: len(whole) - longest])


def test_a_stop_string_over_several_pieces() -> None:
    text = AnswerText(READ, [], ["STOP", "END"])
    tokens = BYTES("go STO STOP more")["input_ids"]
    pieces = [text.add([token]) for token in tokens]
    assert pieces[:3] == ["g", "o", " "]
    assert pieces[3:6] == ["", "", ""], "may be a stop string"
    assert "".join(pieces) == "go STO "
    assert text.end() == ""


def test_a_special_token_as_a_stop_string() -> None:
    """Its own text is in no answer; what was held back in front of it comes out."""
    assert READ_WORDS.stop_tokens(["<x>", " two"]) == {5}
    text = AnswerText(READ_WORDS, [0], [" two!", "<x>"], {5})
    assert [text.add([token]) for token in (2, 1)] == [" three", ""]
    assert text.add([5, 3]) == " two"
    assert text.stopped
    assert (text.add([2]), text.end()) == ("", "")
    earlier = AnswerText(READ_WORDS, [0], [" two", "<x>"], {5})
    assert (earlier.add([2, 1, 5]), earlier.stopped) == (" three", True)
    with pytest.raises(ShapeError, match=r"stop: expected .* got '<x>!', which holds '<x>'; give that alone"):
        READ_WORDS.stop_tokens(["<x>!"])


@pytest.mark.parametrize("length", [0, 1, CONTEXT, CONTEXT + 5])
def test_a_space_between_prompt_and_answer_stays(length: int) -> None:
    asked = [0] * length
    text = AnswerText(READ_WORDS, asked)
    pieces = [text.add([token]) for token in (1, 2, 3, 0, 4)]
    assert "".join([*pieces, text.end()]) == WORDS.decode([*asked, 1, 2, 3, 0])[len(WORDS.decode(asked)) :]
    assert pieces == ["two" if length == 0 else " two", " three", "!", " one", ""]


@settings(max_examples=200, deadline=None)
@given(prompt=st.text("ab é日🎉"), answer=st.text("ab é日🎉"))
def test_a_prompt_is_not_cut_within_a_character(prompt: str, answer: str) -> None:
    text = AnswerText(Detokenizer(FALLBACK), FALLBACK(prompt)["input_ids"])
    assert "".join(text.add([token]) for token in FALLBACK(answer)["input_ids"]) + text.end() == answer


def test_a_prompt_that_ends_within_a_character() -> None:
    """The answer that completes it has the character."""
    euro = BYTES("€")["input_ids"]
    text = AnswerText(READ, [*BYTES("a ")["input_ids"], *euro[:2]])
    assert [text.add([euro[2]]), text.add(BYTES("b")["input_ids"]), text.end()] == ["€", "b", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    text = AnswerText(READ, [])
    euro = BYTES("€")["input_ids"]
    assert [text.add([token]) for token in euro[:2]] == ["", ""]
    assert text.end() == "\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 99)))
def test_special_tokens_leave_no_trace(asked: list[int], made: list[int], cuts: list[int]) -> None:
    pieces = in_pieces(AnswerText(READ_WORDS, asked), made, cuts)
    before = WORDS.decode(asked, skip_special_tokens=True)
    assert before + "".join(pieces) == WORDS.decode(asked + made, skip_special_tokens=True)


def test_nothing_is_tidied_up() -> None:
    """A tokenizer may want to write `n't` without the space in front of it, which would change text that was sent."""
    tidy = byte_level()
    tidy.clean_up_tokenization_spaces = True
    text = AnswerText(Detokenizer(tidy), [])
    assert "".join([*(text.add([token]) for token in tidy(" 'n do n't .")["input_ids"]), text.end()]) == " 'n do n't ."
