"""What the documentation tells a reader to type works, and what it points to exists."""

import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed import run as torchrun

from model.config import REPOSITORY
from tests.conftest import Scripts, write_mvtec_tree, write_small_dataset

README = REPOSITORY / "README.md"
PAGES = [
    README,
    *(
        REPOSITORY / name
        for name in ("CONTRIBUTING.md", "CHANGELOG.md", "dataset/README.md", "ckpt/README.md", "ckpt/demo/README.md")
    ),
    *sorted(page for pattern in ("docs/*.md", "results/*.md") for page in REPOSITORY.glob(pattern)),
]
SCRIPTS = ("train", "train_cross_attention", "test", "predict")
# Commands that are not this program's.
OTHERS = {"venv", "pytest"}
# Folders of which every file that a page names is in git.
TRACKED = ("utils", "model", "dataset", "tests", "benchmarks", "docs", "results")
PICTURE_BYTES = 150_000


# what pages hold


class Block(NamedTuple):
    """A piece of code on a page; `language` is empty for an indented block and for code within a line."""

    language: str
    text: str


def code_of(page: Path) -> list[Block]:
    """All code of a page: fenced and indented blocks, and code within lines."""
    text = page.read_text(encoding="utf-8")
    fences = r"^```(\w*)\n(.*?)^```$"
    blocks = [Block(*found) for found in re.findall(fences, text, re.MULTILINE | re.DOTALL)]
    text = re.sub(fences, "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += [Block("", found) for found in re.findall(r"(?:^ {4,}\S.*\n)+", text, re.MULTILINE)]
    return blocks + [Block("", " ".join(found.split())) for found in re.findall(r"`([^`]+)`", text)]


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page, in words: lines that begin as one, without prompts and comments."""
    lines = [
        line.strip().removeprefix("$ ")
        for block in code_of(page)
        if block.language not in ("python", "text")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    lines = [line.partition(" > ")[0] for line in lines if re.match(r"(python3?|make|pip|torchrun) ", line)]
    found = [shlex.split(line, comments=True) for line in lines]
    return [without_torchrun(words) for words in found]


def without_torchrun(words: list[str]) -> list[str]:
    """What torchrun would start in each process."""
    if words[0] != "torchrun":
        return words
    return ["python", *words[next(place for place, word in enumerate(words) if word.endswith(".py")) :]]


def has_python(page: Path) -> bool:
    """Whether there is code on a page that is to be run."""
    return any(block.language == "python" for block in code_of(page))


def page_name(page: Path) -> str:
    """A page as messages call it."""
    return page.relative_to(REPOSITORY).as_posix()


COMMANDS = {" ".join(words): words for page in PAGES for words in commands_of(page)}
OF_SCRIPTS = {name: words for name, words in COMMANDS.items() if words[1] in [f"{script}.py" for script in SCRIPTS]}
OF_TOOLS = {
    name: words
    for name, words in COMMANDS.items()
    if words[0].startswith("python") and name not in OF_SCRIPTS and not OTHERS & set(words)
}


# commands, on a small run


class Small(NamedTuple):
    """Where documented commands run: what their placeholders stand for."""

    run: Path
    control: Path
    base: Path
    images: Path
    good: Path
    own: Path
    results: Path

    def word(self, flag: str, word: str) -> str:
        """What stands for a word of a command that follows `flag`."""
        name = Path(word).name
        if flag in ("--ckpt", "--resume", "--control"):
            if name.endswith(".onnx"):  # of which tests/test_export.py runs one
                name = "loop_2.pth"
            folder = self.control if flag == "--control" else self.run
            if found := re.fullmatch(r"loop_(\d)\.pth", name):
                return str(folder / f"loop_{min(int(found[1]), 2)}.pth")
            return str(self.base if flag == "--resume" or ("base" in name and flag == "--ckpt") else folder)
        if flag in ("--dataset", "--eval_dataset"):
            return str(self.own) if "/" in word else "small"
        if flag == "--watch":
            return str(self.images)
        if flag == "--images":
            return str(self.images / "*.png" if "*" in word else self.images)
        if flag == "--normal_images":
            return str(self.good)
        if flag == "--clip_weights":
            return str(REPOSITORY / "ckpt/demo/demo.safetensors")
        return str(self.results / name) if flag == "--save_path" else word

    def words(self, words: list[str]) -> list[str]:
        """A command with its placeholders filled in."""
        found, flag = [], ""
        for word in words:
            flag = word if word.startswith("--") else flag
            filled = word if word == flag or word.startswith("@") else self.word(flag, word)
            if not (filled == "small" and filled in found):  # several data sets are one here
                found.append(filled)
        if "--image_idx" in found:  # of a class that the data set has
            found[found.index("--class_name") + 1] = "candle"
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory, run, base, data_root) -> Small:
    """A run, a second one as its control, their base, two images and a data set of one product."""
    folder = tmp_path_factory.mktemp("docs")
    for source, name in ((run, "run"), (run, "control"), (base, "base")):
        shutil.copytree(source, folder / name)
    images = folder / "images"
    images.mkdir()
    for name in ("0_0.png", "1_0.png"):
        shutil.copy(data_root / "small" / "candle" / name, images / name)
    good = folder / "good"
    for place in (good, good / "candle", good / "metal_nut"):
        place.mkdir()
        shutil.copy(images / "0_0.png", place / "0.png")
    own = write_small_dataset(folder / "bolt", per_kind=2, classes=("bolt",))
    return Small(folder / "run", folder / "control", folder / "base", images, good, own, folder / "results")


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that were run, their loops aside: several are the same on a small run."""
    return set()


@pytest.mark.parametrize("name", OF_SCRIPTS)
@pytest.mark.usefixtures("no_estimates")
def test_commands_of_scripts_run(name, small, done, scripts: Scripts, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where files of arguments lie
    monkeypatch.setattr("predict.watch", lambda *how: None)  # else it would go on
    _, script, *words = OF_SCRIPTS[name]
    script, words = script.removesuffix(".py"), small.words(words)
    if script.startswith("train"):
        words.append("--dry_run")
    else:
        words += ["--device", "cpu"]
        if script == "predict" and "--watch" not in words:
            words += ["--save_path", str(small.results)]
    if script == "test":
        words += ["--resamples", "20"]
    command = re.sub(r"/loop_\d\.pth", "", shlex.join([script, *words]))
    if command not in done:
        assert scripts(script, *words) == 0
        done.add(command)


def help_of(words: list[str], monkeypatch, capsys) -> str:
    """What `python ... --help` prints."""
    monkeypatch.setattr(sys, "argv", [words[1], "--help"])
    if words[1] == "-m":  # or runpy warns that another command has imported it
        monkeypatch.delitem(sys.modules, words[2], raising=False)
    with pytest.raises(SystemExit) as exit_info:
        if words[1] == "-m":
            runpy.run_module(words[2], run_name="__main__")
        else:
            runpy.run_path(str(REPOSITORY / words[1]), run_name="__main__")
    assert exit_info.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", OF_TOOLS)
def test_commands_of_tools_have_the_flags_that_they_are_given(name, monkeypatch, capsys):
    words = OF_TOOLS[name]
    known = re.findall(r"--\w+", help_of(words, monkeypatch, capsys))
    assert {word for word in words if word.startswith("--")} <= set(known)
    if words[1] == "-m" and words[2].startswith("dataset.") and words[3:]:  # named data sets
        monkeypatch.setattr(sys, "argv", words[2:])
        assert importlib.import_module(words[2]).parse_arguments().names


def test_all_flags_exist(monkeypatch, capsys):
    tools = {tuple(words[1:3] if words[1] == "-m" else words[1:2]) for words in OF_TOOLS.values()}
    commands = [["python", f"{script}.py"] for script in SCRIPTS] + [["python", *words] for words in tools]
    known = {flag for words in commands for flag in re.findall(r"--\w+", help_of(words, monkeypatch, capsys))}
    known |= set(re.findall(r"--\w+", torchrun.get_args_parser().format_help()))
    for page in PAGES:
        named = {flag for block in code_of(page) for flag in re.findall(r"(?<![\w-])--\w+", block.text)}
        # Of ruff; the rest is this program's.
        assert named - known <= {"--check"}, page


def test_targets_and_files_of_commands_exist():
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in COMMANDS.values():
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        for word in words:
            file = word.removeprefix("@")
            if re.match(r"(requirements|tests/|@ckpt/demo/)", word):
                assert (REPOSITORY / file).is_file(), words


def test_every_kind_of_command_is_found():
    """The pages are read as they are meant."""
    scripts = {words[1].removesuffix(".py") for words in OF_SCRIPTS.values()}
    assert scripts == set(SCRIPTS) and len(OF_SCRIPTS) > 10 and len(OF_TOOLS) > 10
    assert {"make demo", "make test", "python -m benchmarks.speed", "python train.py --dataset VisA"} <= set(COMMANDS)


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if has_python(page)], ids=page_name)
def test_python_runs(page, small, data_root, tmp_path):
    """All code of a page in order, as a reader would type it."""
    if page.stem == "anomalib":
        pytest.importorskip("anomalib", reason="needs requirements/anomalib.txt")
    placeholders = {
        '"ckpt/RUN/loop_3.pth"': repr(str(small.run / "loop_2.pth")),
        '"bolt.png"': repr(str(small.images / "1_0.png")),
        '"demo_test", "data"': f'"small", {str(data_root)!r}',
        '"datasets/MVTecAD"': repr(str(write_mvtec_tree(tmp_path / "MVTecAD", "bottle"))),
        '"predictions/anomalib"': repr(str(small.results)),
    }
    names: dict[str, object] = {}
    for block in code_of(page):
        if block.language == "python":
            code = block.text
            for placeholder, value in placeholders.items():
                code = code.replace(placeholder, value)
            exec(compile(code, str(page), "exec"), names)


# what pages point to


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub makes links of them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_files_that_are_named_exist():
    files = {path.name for folder in TRACKED for path in (REPOSITORY / folder).rglob("*.*")}
    files |= {path.name for path in REPOSITORY.glob("*.*")}
    for page in PAGES:
        for block in code_of(page):
            for word in re.findall(r"(?<![\w/<.])[\w/]+\.(?:py|html|toml|md)(?![\w/])", block.text):
                if word.split("/")[0] in TRACKED:
                    assert (REPOSITORY / word).is_file(), f"{page}: {word}"
                elif "/" not in word:
                    assert word in files, f"{page}: {word}"


def test_first_page_is_short_and_pictures_are_small():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1200
    pictures = list((REPOSITORY / "docs" / "pictures").iterdir())
    assert pictures and not [path for path in pictures if path.stat().st_size > PICTURE_BYTES]
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path for path in pictures if f"pictures/{path.name}" not in pages]
