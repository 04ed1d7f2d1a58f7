"""Run docs/quickstart.ipynb from top to bottom, and write its outputs into it.

    python -m docs.run_notebook

The run of an earlier time, ckpt/quickstart, is removed first, so that the notebook trains. What tells of the machine or
the time, and logs, are left out of the outputs.
"""

import argparse
import shutil
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": NATIVE_KERNEL_NAME}
# Of a cell, seconds; the longest takes half a minute.
LIMIT = 600


def execute(path: Path) -> NotebookNode:
    """A notebook after its cells were run in its folder, by this Python. Raises CellExecutionError where one fails."""
    notebook = nbformat.read(path, as_version=4)
    # Without folders to look in, the kernel is this interpreter's, whatever others are installed.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name=NATIVE_KERNEL_NAME, kernel_spec_manager=specs)
    NotebookClient(
        notebook,
        km=kernel,
        timeout=LIMIT,
        extra_arguments=["--log-level=ERROR"],  # or it warns of its connection, which stays on this machine
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    return tidied(notebook)


def tidied(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what is of no use to a reader: metadata, logs, and words that stand for a picture."""
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL))
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data = NotebookNode({"image/png": output.data["image/png"]})
                    output.metadata = NotebookNode()
    return notebook


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shutil.rmtree(NOTEBOOK.parents[1] / "ckpt/quickstart", ignore_errors=True)
    nbformat.write(execute(NOTEBOOK), NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
