"""Tables on disk, hashes, and the names of files."""

import csv
import hashlib
import io
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from dataset.files import write_text

# Bytes of a name; systems allow 255, and endings are added.
LONGEST_NAME = 120
# What Windows takes for a device, whatever stands behind a full stop.
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
# What a spreadsheet takes for the beginning of a formula (https://owasp.org/www-community/attacks/CSV_Injection).
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None, as_read: bool = False
) -> Path:
    """Write rows with `columns`, else those of the first row; undefined values (NaN, None) stay empty.

    A text that a spreadsheet would take for a formula has an apostrophe before it, but for rows `as_read` from a table,
    whose numbers are texts.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0] if columns is None else columns))
    writer.writeheader()
    writer.writerows(rows if as_read else ({name: _cell(value) for name, value in row.items()} for row in rows))
    return write_text(path, text.getvalue())


def read_csv(path: Path, columns: Collection[str]) -> list[dict[str, str]]:
    """The rows of a table, but for those that were cut off. Raises ValueError where `columns` are not all there."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            if missing := set(columns) - set(rows.fieldnames or ()):
                raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
            return [row for row in rows if None not in row and None not in row.values()]
        except csv.Error as error:
            raise ValueError(f"{path}: no table ({error})") from error


def _cell(value: object) -> object:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def is_exported(path: Path) -> bool:
    """Whether a path is that of an exported model, by its name."""
    return path.suffix.lower() == ".onnx"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def safe_name(text: str) -> str:
    """A name as a file name on every system; a long one is cut, with a hash of the whole behind."""
    name = re.sub(r"[^\w.-]", "_", text.encode("utf-8", "backslashreplace").decode())
    if name.strip(".") == "" or DEVICES.fullmatch(name) or name[-1] == "." or name[0] == ".":
        name = f"_{name}_"
    if len(name.encode()) > LONGEST_NAME:
        ending = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
        name = f"{name.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}_{ending}"
    return name


def unused_name(text: str, taken: set[str]) -> str:
    """`safe_name` with a number behind where it is taken, also in other letters of case; it is added to `taken`."""
    stem = name = safe_name(text)
    number = 1
    while _key(name) in taken:
        number += 1
        name = f"{stem}__{number}"
    taken.add(_key(name))
    return name


def _key(name: str) -> str:
    """The same for names that are one file on some system: of other case, or of letters that are composed."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def unused_names(texts: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """{text: its file name}, no two of which are one file on any system, and none of those `taken`."""
    used = set(map(_key, taken))
    return {text: unused_name(text, used) for text in texts}
