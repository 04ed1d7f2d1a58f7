"""app.py: the page in headless Chromium, with real clicks, and how it fails before there is one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from dataset.demo.build import VERSION, VERSION_FILE
from forward_utils_cross_attention import PromptBank
from model.backbone import Backbone
from model.config import REPOSITORY
from tests.conftest import make_model, move_cross_attention, write_small_dataset
from utils.calibration import Calibration
from utils.checkpoints import load_checkpoint
from utils.judging import Detector
from utils.page import html
from utils.page.judge import MOST_FILES, judge
from utils.page.looks import look

CHROMIUM = shutil.which("chromium")
NEEDED = {"gradio": find_spec("gradio"), "playwright": find_spec("playwright"), "chromium": CHROMIUM}
in_browser = pytest.mark.skipif(
    not all(NEEDED.values()), reason=f"needs {', '.join(name for name, found in NEEDED.items() if not found)}"
)
# Of the browser: nothing but what a test asks for.
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Runs app.py, and writes down each host that it looks up or connects to.
WATCHED = """
import os, runpy, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, given):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = given[1] if event == "socket.connect" else given
        os.write(file, f"{address[0] if isinstance(address, tuple) else address}\\n".encode())
sys.addaudithook(note)
sys.argv[:2] = ["app.py"]
sys.path.insert(0, "")
runpy.run_path("app.py", run_name="__main__")
"""
MOST_PIXELS, MOST_MB = 10_000, 1


class Server(NamedTuple):
    """A running app.py: its address, its process, the folder that holds its temporary ones, and whom it asked."""

    address: str
    process: subprocess.Popen
    temporary: Path
    asked: Path

    def uploads(self) -> list[Path]:
        """Uploaded files on disk, each in a folder of its own."""
        return [path for path in self.temporary.glob("aaclip_page_*/*/*") if path.is_file()]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@contextmanager
def serving(folder: Path, *words: object) -> Iterator[Server]:
    """app.py with these arguments, until the end."""
    temporary, asked = folder / "temporary", folder / "asked"
    temporary.mkdir(parents=True)
    command = [sys.executable, "-c", WATCHED, str(asked), "--port", str(free_port()), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(temporary), "http_proxy": "http://127.0.0.1:9"}  # where nothing is
    with subprocess.Popen(
        [*command, *map(str, words)], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            yield Server(address, process, temporary, asked)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory, run) -> Iterator[Server]:
    """The page of a run of two loops, with two examples."""
    folder = tmp_path_factory.mktemp("page")
    demo = write_small_dataset(folder / "demo_test", per_kind=1, classes=("nut", "key"))
    (demo / VERSION_FILE).write_text(VERSION, encoding="utf-8")
    limits = ["--max_upload", MOST_MB, "--max_pixels", MOST_PIXELS]
    with serving(folder, "--ckpt", run, "--data_root", folder, *limits) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


class Page:
    """The page in a window of its own, as a person uses it."""

    def __init__(self, browser, address: str, width: int = 1400):
        from playwright.sync_api import expect

        self.expect, self.context = expect, browser.new_context(viewport={"width": width, "height": 900})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.hosts: set[str | None] = set()
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.goto(address)
        self.rows, self.messages = self.page.locator("#results article"), self.page.locator("#messages")

    def upload(self, *files: Path) -> None:
        self.page.set_input_files("#files input[type=file]", list(files))

    def type_class(self, words: str) -> None:
        self.page.fill("#class_name input", words)
        self.page.press("#class_name input", "Enter")

    def choose_model(self, name: str) -> None:
        self.page.click("#model input")
        self.page.get_by_role("option", name=name).click()

    def clear(self) -> None:
        self.page.get_by_label("Clear").click()

    def names(self) -> list[str]:
        return self.rows.locator("h3").all_inner_texts()

    def is_as_wide_as_its_window(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    found = Page(browser, server.address)
    yield found
    assert found.hosts <= {"127.0.0.1", None}  # pictures that are part of the page have no host
    found.context.close()


@pytest.fixture
def photographs(data_root) -> list[Path]:
    return sorted((data_root / "small" / "candle").glob("?_0.png"))


@pytest.fixture
def faulty(tmp_path) -> dict[str, Path]:
    """Files that cannot be judged."""
    files = {name: tmp_path / f"{name}.png" for name in ("broken", "pixels", "huge")}
    files["broken"].write_bytes(b"no image")
    Image.new("RGB", (MOST_PIXELS // 50, 60)).save(files["pixels"])
    files["huge"].write_bytes(bytes(MOST_MB * 2**20 + 1))
    return files


# what people do


@in_browser
def test_photographs_are_judged_and_named_where_they_cannot_be(page, server, photographs, faulty):
    page.upload(photographs[0])
    page.expect(page.rows).to_have_count(1)
    page.expect(page.rows.locator("img")).to_have_count(3)
    words = page.rows.inner_text()
    assert "base x/loop_0 (base)" in words and "extended x/loop_2" in words
    for said in ("single-image score", "probability", "calibrated threshold"):
        assert len(re.findall(rf"{said} \d\.\d{{3}}", words)) == 2
    assert "on images of training" in page.page.locator("#results").inner_text()
    page.upload(faulty["broken"], *photographs, faulty["pixels"])  # in addition
    page.expect(page.rows).to_have_count(3)
    assert page.names() == [photographs[0].name, *(path.name for path in photographs)]
    first, second = page.messages.locator("p").all_inner_texts()
    assert first.startswith("broken.png: not readable as an image (none of the formats that are read")
    assert second.startswith("pixels.png: not readable as an image (200 x 60 px, expected at most 10,000 pixels")
    page.upload(faulty["huge"])
    page.expect(page.page.get_by_text("exceed the maximum allowed size")).to_contain_text("huge.png")
    page.expect(page.rows).to_have_count(3)
    assert not [path for path in server.uploads() if path.name == "huge.png"]


@in_browser
def test_a_class_is_typed_or_chosen_and_a_wrong_one_loses_nothing(page, photographs):
    page.upload(photographs[0])
    page.expect(page.rows).to_have_count(1)
    said = page.rows.locator("figcaption").last
    before = said.inner_text()
    page.type_class("candle")
    page.expect(said).not_to_have_text(before, use_inner_text=True)
    page.type_class("qwertz candle")
    page.expect(page.messages).to_have_text("This CLIP knows nothing of these words: qwertz.")
    page.type_class("very " * 80)
    page.expect(page.messages).to_contain_text("Shorten the class name")
    page.expect(page.rows).to_have_count(1)
    page.page.click("#class_name input")
    page.page.get_by_role("option", name="capsule", exact=True).click()
    page.expect(page.messages).to_have_text("")
    page.expect(page.rows).to_have_count(1)


@in_browser
def test_the_threshold_decides_and_starts_as_it_was_calibrated(page, run, photographs):
    number = page.page.locator("#threshold input[type=number]")
    for loop in (2, 1):
        calibration = load_checkpoint(run / f"loop_{loop}.pth").calibration
        assert calibration is not None
        page.expect(number).to_have_value(f"{round(calibration.threshold, 3):g}")
        if loop == 2:
            page.upload(photographs[0])
            page.expect(page.rows).to_contain_text("extended x/loop_2")
            page.choose_model("x/loop_1")
    page.expect(page.rows).to_contain_text("extended x/loop_1")
    slider, decisions = page.page.get_by_role("slider"), page.rows.locator(".decision")
    slider.press("Home")
    page.expect(decisions).to_have_text(["anomalous", "anomalous"])
    slider.press("End")
    page.expect(decisions).to_have_text(["normal", "normal"])
    page.choose_model("x/loop_0 (base)")
    page.expect(page.rows.locator("figure")).to_have_count(2)


@in_browser
def test_what_prompts_looked_at_is_shown_when_it_is_asked_for(page, photographs):
    looked = page.page.locator("#looked")
    page.page.get_by_text("What each prompt looked at").click()
    page.page.click("#show")
    page.expect(looked).to_contain_text("No photograph")
    page.upload(photographs[0])
    page.expect(page.rows).to_have_count(1)
    page.expect(looked).to_have_text("")
    page.page.click("#show")
    page.expect(looked.locator("img")).to_have_count(1 + 16 + 4 + 4)
    page.expect(looked.locator("h3")).to_have_text(["Each prompt", "Text cross-attention", "Image cross-attention"])


@in_browser
def test_an_example_brings_its_class(page):
    page.page.locator("#examples button").last.click()
    page.expect(page.rows).to_contain_text("key_anomalous.png")
    page.expect(page.page.locator("#class_name input")).to_have_value("key")
    page.clear()
    page.expect(page.rows).to_have_count(0)


@in_browser
def test_photographs_beyond_the_limit_are_left_out_and_that_is_said(page, photographs, tmp_path):
    many = [shutil.copy(photographs[0], tmp_path / f"{number}.png") for number in range(MOST_FILES + 1)]
    page.upload(*many)
    page.expect(page.rows).to_have_count(MOST_FILES)
    page.expect(page.messages).to_contain_text(f"{MOST_FILES + 1} photographs: expected at most {MOST_FILES}")


@in_browser
def test_two_people_at_once_see_their_own_alone(browser, server, photographs):
    people = [Page(browser, server.address) for _ in photographs]
    for person, photograph in zip(people, photographs, strict=True):
        person.upload(photograph)
    for person, photograph in zip(people, photographs, strict=True):
        person.expect(person.rows).to_have_count(1)
        assert person.names() == [photograph.name]
    people[0].type_class("qwertz")
    people[0].expect(people[0].messages).to_contain_text("qwertz")
    assert people[1].messages.inner_text() == "" and people[1].names() == [photographs[1].name]
    for person in people:
        person.context.close()


@in_browser
def test_the_page_fits_on_a_telephone(browser, server, photographs):
    person = Page(browser, server.address, width=400)
    person.upload(*photographs)
    person.expect(person.rows).to_have_count(2)
    person.page.get_by_text("What each prompt looked at").click()
    person.page.click("#show")
    person.expect(person.page.locator("#looked img").last).to_be_visible()
    assert person.is_as_wide_as_its_window()
    widths = [picture.bounding_box()["width"] for picture in person.rows.locator("img").all()]
    assert min(widths) > 140
    person.context.close()


# what is left, and who was asked


@in_browser
def test_nothing_is_sent_anywhere_and_uploads_are_gone_after_the_end(browser, run, photographs, tmp_path):
    with serving(tmp_path, "--ckpt", run, "--data_root", tmp_path) as server:
        person = Page(browser, server.address)
        person.upload(photographs[0])
        person.expect(person.rows).to_have_count(1)
        person.expect(person.page.get_by_text("Examples: none")).to_be_visible()
        person.context.close()
        assert [path.name for path in server.uploads()] == [photographs[0].name]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert not list(server.temporary.glob("aaclip_page_*"))
        assert set(server.asked.read_text(encoding="utf-8").split()) == {"127.0.0.1"}


# without a browser


def make_detector(backbone: Backbone, **config: object) -> Detector:
    model = make_model(backbone, **config)
    move_cross_attention(model)
    return Detector.of(model, PromptBank(backbone, {"nut": "nut"}, "industrial"), name="a<b")


def test_maps_of_both_models_have_one_scale_and_say_where_its_ends_come_from(backbone, photographs):
    plain = make_detector(backbone)
    fitted = [replace(plain, calibration=Calibration(1, 1, 0, 0.5, ends, 4, True)) for ends in ((-3, 5), (-2, 9))]
    found = judge(dict(zip(("base", "extended"), fitted, strict=True)), photographs)
    assert found.scale.ends == (-3, 9) and "on images of training" in found.scale.unit
    shifted = [
        replace(detector, calibration=replace(detector.calibration, map_threshold=zero))
        for detector, zero in zip(fitted, (1.0, 7.0), strict=True)
    ]
    found = judge(dict(zip(("base", "extended"), shifted, strict=True)), photographs)
    assert found.scale.ends == (-9, 4) and found.scale.zeros == [1, 7]
    found = judge({"base": fitted[0], "extended": plain}, photographs)
    maps = [plain(path).map for path in photographs]
    assert found.scale.ends == (min(map(np.min, maps)), max(map(np.max, maps))) and "these maps" in found.scale.unit


def test_a_model_without_calibration_decides_nothing_and_names_are_text(backbone, photographs):
    words = html.results(judge({"base": make_detector(backbone)}, photographs), 0.5)
    assert words.count(">n/a<") == len(photographs) and "this file has no calibration" in words
    assert "a&lt;b" in words and "a<b" not in words
    assert "&lt;script" in html.messages(["<script>"])


@pytest.mark.parametrize(
    ("config", "titles"),
    [
        ({}, ["Each prompt"]),
        ({"text_cross_attn": True, "cross_attn": "joint"}, ["Each prompt", "Text cross-attention"]),
        ({"image_cross_attn": True, "cross_attn": "block"}, ["Each prompt"]),
        ({"text_cross_attn": True, "cross_attn": "block"}, ["Each prompt"]),
    ],
)
def test_each_kind_of_model_shows_what_its_prompts_looked_at(backbone, photographs, config, titles):
    off = {"text_cross_attn": False, "image_cross_attn": False}
    detector = make_detector(backbone, **off | config)
    _, looks = look(detector, photographs[0])
    assert [found.title for found in looks] == titles
    assert looks[0].maps.shape == (16, backbone.grid, backbone.grid)
    assert ("attention" in looks[0].unit) == detector.model.prompts_see_image


def test_a_closed_cross_attention_is_not_shown(backbone, photographs):
    model = make_model(backbone, text_cross_attn=True, image_cross_attn=True, cross_attn="joint")
    detector = Detector.of(model, PromptBank(backbone, {"nut": "nut"}, "industrial"))
    assert [found.title for found in look(detector, photographs[0])[1]] == ["Each prompt"]


# before there is a page


def test_an_occupied_port_is_named(scripts, run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert scripts("app", "--ckpt", run, "--port", port) == 2
    assert f"error: --port {port}: not free" in capsys.readouterr().err


def test_missing_gradio_is_said(scripts, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert scripts("app", "--ckpt", run) == 2
    assert "error: app.py needs gradio. Install it: pip install -r requirements/page.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such checkpoint"), ("state.pth", "the state of a run"), ("x.onnx", "an exported model")],
)
def test_what_is_no_checkpoint_is_refused(scripts, run, name, message, monkeypatch, capsys):
    monkeypatch.setattr("app.check_installed", lambda: None)
    assert scripts("app", "--ckpt", run / name, "--port", free_port()) == 2
    assert message in capsys.readouterr().err


def test_a_loop_needs_its_base_beside_it(scripts, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("app.check_installed", lambda: None)
    shutil.copy(run / "loop_2.pth", tmp_path)
    assert scripts("app", "--ckpt", tmp_path / "loop_2.pth", "--port", free_port()) == 2
    assert f"{tmp_path / 'loop_0.pth'}: no such checkpoint" in capsys.readouterr().err
