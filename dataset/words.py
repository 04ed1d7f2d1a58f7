"""Names of files and classes as people see them: they may hold anything, and a terminal obeys some characters."""

import unicodedata
from collections.abc import Iterable


def is_harmless(character: str) -> bool:
    """Whether a character neither moves a terminal's cursor nor turns the order of what follows."""
    # Other spaces than " ", and joiners of letters, as in Persian or Hindi words, which Python does not call printable.
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def on_one_line(name: str) -> str:
    """A name with escapes for all that is not harmless, line breaks and tabs too."""
    return "".join(c if is_harmless(c) else c.encode("unicode_escape").decode() for c in name)


def printable(text: str) -> str:
    """The same of a text whose lines and columns stay; a name that is part of a table goes `on_one_line` first."""
    return "".join(c if c in "\n\t" else on_one_line(c) for c in text)


def named_few(names: Iterable[object], most: int = 5) -> str:
    """The first names of many, in one line."""
    known = [on_one_line(str(name)) for name in names]
    return ", ".join(known[:most]) + (", ..." if len(known) > most else "")
