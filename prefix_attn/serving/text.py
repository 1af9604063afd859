"""The text of an answer while its tokens arrive: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

from prefix_attn.errors import ShapeError

#: Tokens of the prompt that are decoded with the first of the answer, since a token's text may depend on its neighbours
#: (a space in front of it).
CONTEXT = 6

#: What a tokenizer gives for bytes that are no whole character yet.
PARTIAL = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of a few tokens, as it is within a longer one: special tokens are left out, and nothing is tidied up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.added_tokens_decoder
        entries: dict[int, Any] = {} if callable(decoder) else decoder  # a method in mistral-common's tokenizers
        added = {token: added.content for token, added in entries.items() if added.special}
        #: Their texts, by id.
        self.special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added

    def __call__(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def stop_tokens(self, stops: Sequence[str]) -> set[int]:
        """The special tokens among stop strings, which no text of an answer shows.

        Raises:
            ShapeError: a stop string has a special token and more, of which an answer's text shows one part only.
        """
        for stop in stops:
            parts = [text for text in self.special.values() if text in stop]
            if parts and stop not in parts:
                raise ShapeError(
                    f"stop: expected text without special tokens, or a special token alone, got {stop!r}, which holds "
                    f"{parts[0]!r}; give that alone"
                )
        return {token for token, text in self.special.items() if text in stops}


class AnswerText:
    """Text that continues a prompt, token by token.

    Args:
        decode: the tokenizer's.
        prompt: tokens of the prompt.
        stops: strings that end the answer and are no part of it; none is empty.
        stop_tokens: special tokens that do so, too.

    Attributes:
        stopped: a stop string was found; more tokens change nothing.
    """

    def __init__(
        self, decode: Detokenizer, prompt: Sequence[int], stops: Sequence[str] = (), stop_tokens: Collection[int] = ()
    ) -> None:
        self._decode = decode
        # Not from within a character: a decoder with a token a byte gives up on all that follow.
        lengths = range(CONTEXT, CONTEXT + 4)
        told = [*islice((token for token in reversed(prompt) if token not in decode.special), lengths[-1])][::-1]
        ends = (told[-n:] for n in lengths)
        self._tokens = next((end for end in ends if not decode(end).startswith(PARTIAL)), told[-CONTEXT:])
        self._start, self._done = 0, len(self._tokens)
        self._stops, self._stop_tokens = stops, stop_tokens
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        last = next((i for i, token in enumerate(tokens) if token in self._stop_tokens), None)
        if last is not None:
            text = self._added(tokens[:last]) + self.end()
            self.stopped = True
            return text
        return self._added(tokens)

    def _added(self, tokens: Sequence[int]) -> str:
        self._tokens += (token for token in tokens if token not in self._decode.special)
        if len(self._tokens) == self._done:
            return ""
        text = self._text(self._start, len(self._tokens))
        if text.endswith(PARTIAL):
            return ""
        return self._checked(self._new(text), last=False)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._checked(self._new(self._text(self._start, len(self._tokens))), last=True)

    def _text(self, start: int, end: int) -> str:
        return self._decode(self._tokens[start:end])

    def _new(self, text: str) -> str:
        """The end of ``text`` that was not returned yet; from now on, its tokens are the context of the next."""
        done = self._text(self._start, self._done)
        if not text.startswith(done):  # the prompt ends within a character, which the answer completes
            done = done.rstrip(PARTIAL)
        new = text[len(done) :]
        self._start, self._done = self._done, len(self._tokens)
        return new

    def _checked(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]  # that of the stop string which was whole first
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string may begin."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
