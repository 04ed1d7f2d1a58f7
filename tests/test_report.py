"""The pictures and the report that test.py makes, the latter opened in a browser where there is one."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.standin import standin_images
from forward_utils_cross_attention import PromptBank
from tests.conftest import Scripts, make_model, move_cross_attention
from utils.judging import Detector
from utils.report.curves import draw_training
from utils.report.pictures import attention_weights

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Clicks on heads of the table by class, and says in the title what order that gave.
CLICKS = """
<script>
const table = document.querySelector("table.sortable");
const names = () => [...table.tBodies[0].rows].map(r => r.cells[0].innerText);
const heads = table.tHead.rows[0].cells;
heads[0].querySelector("button").click(); const up = names().join();
heads[0].querySelector("button").click(); const down = names().join();
heads[1].querySelector("button").click();
const numbers = [...table.tBodies[0].rows].map(r => parseFloat(r.cells[1].dataset.value));
document.title = `${up}|${down}|${numbers[0] >= numbers[1]}|${heads[1].getAttribute("aria-sort")}`;
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory, run, data_root):
    """The report of a run with all its loops."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("report") / "x")
    with pytest.MonkeyPatch.context() as monkeypatch:
        command = ["--ckpt", folder, "--dataset", "small", "--device", "cpu", "--resamples", 50, "--report"]
        assert Scripts(monkeypatch, data_root)("test", *command) == 0
    return folder / "report_small.html"


def test_everything_is_in_one_file(report):
    text = report.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    # Loops, two sheets, one image and its two attentions, the training.
    assert text.count('src="data:image/webp') == 1 + 2 + 3 + 1
    assert "x/loop_2: does it change the base?" in text and "Not zero-shot" in text
    assert "nan" not in re.sub(r'"data:[^"]*"|data-value="nan"', "", text)
    pictures = {path.name for path in (report.parent / "pictures_small").iterdir()}
    assert {"loops.png", "candle.png", "metal_nut.png"} < pictures


def chromium(page, folder, *flags: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian's package chromium)")
def test_a_browser_shows_it_without_errors_and_sorts(report, tmp_path):
    page = tmp_path / "clicked.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", f"{CLICKS}</body>"), encoding="utf-8")
    done = chromium(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert title == "candle,metal_nut|metal_nut,candle|true|descending"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian's package chromium)")
@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_sticks_out_of_the_page(report, tmp_path, width):
    """Headless Chromium makes no window narrower than 500 px, so the page stands in a frame."""
    page = tmp_path / "framed.html"
    page.write_text(
        f'<iframe id="f" src="{report.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>f.onload = () => { const d = f.contentDocument.documentElement;"
        "document.title = `${d.scrollWidth} ${d.clientWidth}`; }</script>",
        encoding="utf-8",
    )
    flags = ["--allow-file-access-from-files", "--window-size=1500,1000", "--virtual-time-budget=5000", "--dump-dom"]
    done = chromium(page, tmp_path / "profile", *flags)
    needed, shown = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    assert shown == width and needed <= shown


def test_one_image_and_the_list_of_images(scripts, run, capsys):
    assert scripts("test", "--dataset", "small", "--list_images") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "candle      7  anomalous  candle/1_2.png" in lines and len(lines) == 21
    command = ["test", "--ckpt", run, "--dataset", "small", "--device", "cpu", "--image_idx"]
    assert scripts(*command, "7", "--class_name", "candle") == 0
    folder = run / "pictures_small" / "one_image"
    for ending in ("", "_prompts_on_image", "_image_on_prompts"):
        with Image.open(folder / f"candle_7{ending}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    for words, message in (
        (["7"], "say of which --class_name: metal_nut, candle"),
        (["70", "--class_name", "candle"], "has images 0 to 9"),
        (["7", "--class_name", "bolt"], "small has metal_nut, candle"),
    ):
        assert scripts(*command, *words) == 2
        assert message in capsys.readouterr().err


def test_attention_sums_to_one_and_leaves_out_padding(backbone):
    model = make_model(backbone, text_cross_attn=True, image_cross_attn=True)
    move_cross_attention(model)
    bank = PromptBank(backbone, {"nut": "nut"}, "industrial")
    weights = attention_weights(Detector.of(model, bank), standin_images(1, backbone.img_size), "nut")
    for rows in weights.values():
        assert np.allclose(rows.sum(dim=1), 1, atol=1e-5) and (rows >= 0).all()
    length = bank.lengths[0]
    assert weights["text_cross_attn"].shape == (16 * length, backbone.grid**2 + 1)
    on_prompts = weights["image_cross_attn"].unflatten(1, (16, length))
    ends = bank.prompts.eot[0]
    assert ends.min() < length - 1
    assert not on_prompts[:, ends.argmin(), ends.min() + 1 :].any()
    base = Detector.of(make_model(backbone), bank)
    assert not attention_weights(base, standin_images(1, backbone.img_size), "nut")


def test_attention_is_what_the_forward_attends_with(backbone):
    """With one head's worth of values read off the forward: weights x values, through out_proj, is what is added."""
    module = make_model(backbone, text_cross_attn=True).text_cross_attn
    torch.nn.init.normal_(module.out_proj.weight, std=0.1)
    x, context = torch.randn(1, 5, backbone.text_width), torch.randn(1, 7, backbone.embed_dim)
    with torch.no_grad():
        module.q_proj.weight.zero_()  # then every head attends alike, evenly, and the mean over heads is exact
        module.q_proj.bias.zero_()
        weights = module.attention(x, context)
        values = module.v_proj(torch.nn.functional.layer_norm(context, context.shape[-1:]))
        added = module.weight * module.out_proj(weights @ values)
        assert torch.allclose(module(x, context), x + added, atol=1e-5)
        assert torch.allclose(weights, torch.full_like(weights, 1 / 7), atol=1e-6)


def test_training_curves_need_an_epoch(run, tmp_path):
    assert draw_training(run / "log.csv", tmp_path / "training.png")
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.width > 1500
    (tmp_path / "log.csv").write_text("kind,loop,stage,epoch\nstep,1,1,1\n", encoding="utf-8")
    assert not draw_training(tmp_path / "log.csv", tmp_path / "none.png") and not (tmp_path / "none.png").exists()
