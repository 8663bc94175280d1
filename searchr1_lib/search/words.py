"""Text from outside, made fit to be written and compared, and cut into words."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

import regex

from ..records import Passage

#: A letter, with its marks, of a script that puts no blanks between words (in Korean they part phrases rather).
_LETTER = r"(?!\p{M})[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]\p{M}*"
_WORD = regex.compile(
    rf"((?:(?!{_LETTER})[\w\p{{M}}]){{2,}})|(?=({_LETTER}{_LETTER})?)(?:(\p{{Han}}\p{{M}}*)|{_LETTER})"
)


def clean(text: Any, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """Text from outside as text that can be written everywhere: no halves of surrogate pairs, accents composed.

    Args:
        form: "NFC"; or "NFKC", which also makes wide letters, ligatures and the like plain, for what is compared only.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected text, found {type(text).__name__}")
    text = text.encode("utf-8", "replace").decode("utf-8")
    # no language puts 30 marks on a letter (UAX 15, stream-safe text), and to sort n of them takes n² steps
    text = regex.sub(r"(\p{M}{30})\p{M}+", r"\1", text)
    # the same name can be written with composed and with combining accents; unmatched, the passage is never found
    return unicodedata.normalize(form, text)


def indexed(passage: Passage) -> str:
    """What of a passage is searched: title and text, in the form in which queries are compared.

    Raises:
        TypeError: one of them is no text; names the passage.
    """
    if not (isinstance(passage.title, str) and isinstance(passage.text, str)):
        raise TypeError(f"passage {passage.id!r:.80}: title and text must be text")
    return clean(f"{passage.title}\n{passage.text}", "NFKC")


def words(text: str) -> str:
    """The words of a text as lexical engines index them and ask for them: lower case, of two letters or more.

    Where a script puts no blanks between words, they are all pairs of neighbouring letters, and Chinese characters.

    >>> words("The Nava, 東京")
    'the nava 東京 東 京'
    """
    return " ".join(word for found in _WORD.findall(clean(text, "NFKC").lower()) for word in found if word)
