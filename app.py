"""A page on this computer that judges photographs in a browser.

    python app.py --ckpt ckpt/<run>

Drop photographs, say what they show, and see the anomaly maps of the base and of a loop side by side, scores, and
decisions at a threshold that you move. The page is for this computer alone (127.0.0.1), and nothing is sent anywhere.
Uploads are deleted when it ends, at the latest. It needs requirements/page.txt.
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import logging
import os
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from dataset.commands import add_data_root, path_argument, show
from dataset.constants import BLUR
from dataset.sets import DataSet, open_dataset
from utils import arguments
from utils.cli import run_script
from utils.files import is_exported
from utils.machine import device_of
from utils.models import ModelLoader
from utils.options import at_least
from utils.page.html import STYLE
from utils.page.models import PageModels
from utils.signals import StopSignal

logger = logging.getLogger("app")

HOST = "127.0.0.1"
INSTALL = "pip install -r requirements/page.txt"
EXAMPLES = "demo_test"
# With it a browser asks no other host, whatever a later gradio wants.
OWN_ONLY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
)
# Seconds between two looks for a signal to end.
POLL = 0.2


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument(
        "--ckpt", type=path_argument, nargs="+", required=True, help="run folders, loop files or base models"
    )
    parser.add_argument("--domain", choices=tuple(BLUR), default=next(iter(BLUR)), help="of the images")
    parser.add_argument("--port", type=at_least(1, 65535), default=7860, help="of this computer, where the page is")
    parser.add_argument("--max_upload", type=at_least(1), default=20, help="MB of an uploaded file at most")
    arguments.add_model_arguments(parser, "the checkpoint's value, else AA-CLIP's, in brackets")
    add_data_root(arguments.add_machine_arguments(parser))
    args = parser.parse_args()
    if exported := [path for path in args.ckpt if is_exported(path)]:
        parser.error(f"--ckpt {exported[0]}: an exported model; the page needs the checkpoint that it was made of")
    return args


def check_installed() -> None:
    """Raise ValueError where gradio is missing."""
    if find_spec("gradio") is None:
        raise ValueError(f"app.py needs gradio. Install it: {INSTALL}")


def check_port(port: int) -> None:
    """Raise ValueError where the page cannot be at that port."""
    with socket.socket() as place:
        if os.name == "posix":  # where it means: one that was just left is free
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"--port {port}: not free ({error.strerror}). End the program that uses it, or give another --port."
            ) from error


def load_models(args: argparse.Namespace) -> PageModels:
    """The models of --ckpt, each beside its base."""
    arguments.take_machine(args)
    loader = ModelLoader(device_of(args.device), args.clip_weights, arguments.model_flags(args))
    return PageModels(args.ckpt, args.domain, loader, args.precision)


def find_examples(args: argparse.Namespace) -> DataSet | None:
    """The demo's test images, None where they were not rendered."""
    if not (Path(args.data_root) / EXAMPLES).is_dir():
        logger.info("No examples: %s has no %s; make demo renders it.", args.data_root, EXAMPLES)
        return None
    return open_dataset(EXAMPLES, args.data_root, follow_links=args.follow_links)


def serve(models: PageModels, data: DataSet | None, args: argparse.Namespace, folder: Path) -> None:
    """Show the page until a signal comes; examples and uploads lie in `folder`."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST  # gradio looks whether the page is there
    # Here, because this takes seconds, and a library that the rest of the program does not need.
    from utils.page.blocks import THEME, copy_examples, make_page

    page = make_page(models, copy_examples(data, folder) if data else [], args.max_upload)
    with StopSignal() as stop:
        page.launch(
            server_name=HOST,
            server_port=args.port,
            share=False,
            max_file_size=f"{args.max_upload}mb",
            theme=THEME,
            css_paths=STYLE,
            head=OWN_ONLY,
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        show(f"http://{HOST}:{args.port}")
        sys.stdout.flush()
        logger.info("Open this address in a browser of this computer; Ctrl-C ends the page.")
        while stop.received is None:
            time.sleep(POLL)
        page.close(verbose=False)


def main() -> None:
    args = parse_arguments()
    check_installed()
    check_port(args.port)
    models, data = load_models(args), find_examples(args)
    with TemporaryDirectory(prefix="aaclip_page_") as folder:
        serve(models, data, args, Path(folder).resolve())


if __name__ == "__main__":
    run_script(main, several=False)
