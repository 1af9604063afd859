"""The six string tasks, and a split of their inputs that keeps held-out inputs out of every training batch.

An input is one or two words of 2 to 7 letters in all; an answer is a pure function of it. An input is held
out when its CRC-32 is a multiple of ten, whatever the task; neither the model nor any prefix trains on it.
"""

import codecs
import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass

VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in string.ascii_lowercase if letter not in VOWELS)
VOWEL_RATE = 0.4
TWO_WORDS_RATE = 0.5
MIN_LETTERS, MAX_LETTERS = 2, 7
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Task:
    """A task, and the size of the prefix that is trained for it.

    Attributes:
        name: the instruction, as the base model reads it, and the name of the adapter's folder.
        solve: the answer to an input.
        virtual_tokens: length of the prefix; it differs from task to task, as it does in practice.
        two_words: whether an input always has two words.
    """

    name: str
    solve: Callable[[str], str]
    virtual_tokens: int
    two_words: bool = False


def upper(text: str) -> str:
    """``ab cd`` to ``AB CD``."""
    return text.upper()


def reverse(text: str) -> str:
    """``ab cd`` to ``dc ba``."""
    return text[::-1]


def sort_letters(text: str) -> str:
    """``db ca`` to ``abcd``: the letters in order, without the space."""
    return "".join(sorted(text.replace(" ", "")))


def rot13(text: str) -> str:
    """``ab cd`` to ``no pq``: each letter 13 places on, the space as it is."""
    return codecs.encode(text, "rot13")


def count_vowels(text: str) -> str:
    """``ab cde`` to ``2``, as a decimal digit."""
    return str(sum(letter in VOWELS for letter in text))


def first_word(text: str) -> str:
    """``ab cd`` to ``ab``."""
    return text.split(maxsplit=1)[0]


TASKS = (
    Task("upper", upper, virtual_tokens=6),
    Task("reverse", reverse, virtual_tokens=8),
    Task("sort", sort_letters, virtual_tokens=8),
    Task("rot13", rot13, virtual_tokens=12),
    Task("vowels", count_vowels, virtual_tokens=8),
    Task("first", first_word, virtual_tokens=6, two_words=True),
)


def prompt_with_instruction(task: Task, text: str) -> str:
    """What the base model trains on: ``reverse|ab cd>``."""
    return f"{task.name}|{text}>"


def prompt_without_instruction(text: str) -> str:
    """What a prefixed model is fed: ``ab cd>``, which does not say what to do."""
    return f"{text}>"


def is_held_out(text: str) -> bool:
    """Whether an input belongs to the held-out tenth; the same on every machine and in every run."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def draw_input(task: Task, rng: random.Random, *, held_out: bool) -> str:
    """A random input for the task, from the held-out tenth or from the rest."""
    while True:
        text = _draw_text(rng, two_words=task.two_words or rng.random() < TWO_WORDS_RATE)
        if is_held_out(text) == held_out:
            return text


def held_out_inputs(task: Task, count: int, seed: int) -> list[str]:
    """``count`` different held-out inputs for the task, the same for the same seed."""
    rng = random.Random(f"{seed}/{task.name}")
    inputs: dict[str, None] = {}
    while len(inputs) < count:
        inputs[draw_input(task, rng, held_out=True)] = None
    return list(inputs)


def _draw_text(rng: random.Random, *, two_words: bool) -> str:
    """Random letters, 2 to 7 of them, with a space somewhere inside if there are to be two words."""
    letters = "".join(
        rng.choice(VOWELS if rng.random() < VOWEL_RATE else CONSONANTS)
        for _ in range(rng.randint(MIN_LETTERS, MAX_LETTERS))
    )
    if not two_words:
        return letters
    cut = rng.randint(1, len(letters) - 1)
    return f"{letters[:cut]} {letters[cut:]}"
