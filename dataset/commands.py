"""What the commands of this package, python -m dataset.NAME, have in common; they need no model."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dataset.words import printable

DATA_ROOT_VARIABLE = "AACLIP_DATA_ROOT"


def path_argument(text: str) -> Path:
    """A path of the command line; ~ is the home folder."""
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """A name or a path of the command line, which cannot be empty; where it begins with ~, the home folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name or a path, found {text!r}")
    return os.path.expanduser(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --data_root that shows `description` as it is."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_data_root(parser)
    return parser


def add_data_root(parser: argparse._ActionsContainer, links: bool = True) -> None:
    """Where the data sets lie; `links`: and whether they are followed out of there."""
    parser.add_argument(
        "--data_root",
        type=path_argument,
        default=os.environ.get(DATA_ROOT_VARIABLE, "data"),
        help=f"folder that holds the data sets' folders (or the environment variable {DATA_ROOT_VARIABLE})",
    )
    if links:
        parser.add_argument(
            "--follow_links",
            action="store_true",
            help="read images that lie outside a data set's folder, where links in it lead",
        )


def show(*texts: str) -> None:
    """Print each text, as lines, `printable`."""
    for text in texts:
        print(printable(text))


class PlainFormatter(logging.Formatter):
    """Messages `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def reader_left() -> int:
    """Exit code where who reads the output has read enough, as `| head` does; nothing more is said."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run_command(main: Callable[[], int]) -> None:
    """Run `main` and exit with the code it returns, or with 2 and one clear message where the input is at fault.

    Like the scripts' own, it sets up the whole process (logging and stdout), so it is for commands alone.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # A list that is redirected to a file on Windows may hold names that its encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = reader_left()
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).error("error: %s", error)
        code = 2
    except KeyboardInterrupt:
        code = 1
    sys.exit(code)
