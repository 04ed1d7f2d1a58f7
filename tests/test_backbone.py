"""Weight files of every kind, sizes read from the model, and the walk against open_clip's own forward."""

import contextlib
from pathlib import Path
from urllib.error import URLError

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from benchmarks.standin import Scripted, standin_images
from model import weights as module
from model.backbone import Backbone, clip_config, default_adapters, load_backbone, vv_attention
from model.weights import find_weights, read_weights

PROMPTS = ["a photo of a damaged metal nut.", "candle."]


@pytest.fixture(scope="module")
def state(backbone) -> dict[str, torch.Tensor]:
    """The demo's weights in half precision, as OpenAI's are."""
    return {name: value.half() for name, value in backbone.clip.state_dict().items()}


@pytest.fixture(scope="module")
def files(state, tmp_path_factory):
    """The same weights as OpenAI's TorchScript archive, as plain state dicts and as safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    extra = {name: torch.tensor(64) for name in module.NOT_WEIGHTS}
    torch.jit.script(Scripted(state | extra)).save(folder / "archive.pt")
    torch.save(state | extra, folder / "with_extra.pt")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "open_clip.pth")
    save_file(state, folder / "weights.safetensors")
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_weights(files, state):
    loaded = [load_backbone("demo", clip_weights=path) for path in files]
    assert len(loaded) == 4
    assert len({backbone.sha256 for backbone in loaded}) == 1
    for backbone in loaded:
        for name, value in backbone.clip.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, state[name].float())


def test_positions_are_resized_bicubic_with_antialiasing(files, state):
    resized = load_backbone("demo", img_size=96, clip_weights=files[0])
    positions = state["visual.positional_embedding"].float()
    grid = positions[1:].T.reshape(1, -1, 8, 8)
    expected = F.interpolate(grid, size=(12, 12), mode="bicubic", antialias=True, align_corners=False)
    found = resized.clip.visual.positional_embedding
    assert torch.equal(found[1:], expected.flatten(2)[0].T)
    assert torch.equal(found[0], positions[0])
    assert resized.sha256 == load_backbone("demo", clip_weights=files[0]).sha256


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder that holds no weights, as the repository and the working folder; there is no network."""

    def no_network(source):
        raise OSError("no route to host")

    def no_answer(request, timeout):
        raise URLError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    monkeypatch.setattr(module, "urlopen", no_answer)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    return tmp_path


def test_missing_weights_say_what_was_tried(nowhere):
    with pytest.raises(FileNotFoundError) as error:
        load_backbone("ViT-L-14-336")
    for part in (
        "ViT-L-14-336px.pt",
        str(nowhere / "ckpt"),
        "no route to host",
        "https://huggingface.co/timm/vit_large_patch14_clip_336.openai/",
        "--clip_weights",
    ):
        assert part in str(error.value)


def test_without_a_network_what_was_downloaded_before_is_found(nowhere, monkeypatch):
    def cached(repository, name, local_files_only):
        assert local_files_only
        return f"/cache/{repository}/{name}"

    monkeypatch.setattr(module, "hf_hub_download", cached)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"hf_hub": "owner/name/"})
    assert find_weights("demo") == Path("/cache/owner/name/open_clip_model.safetensors")


@pytest.mark.parametrize(
    ("source", "reason", "what"),
    [
        ({}, "lists no OpenAI weights", "a checkpoint of this model (as one of these names)"),
        ({"url": "", "hf_hub": ""}, "lists no OpenAI weights", "a checkpoint of this model (as one of these names)"),
        ({"url": "https://a.b/c/d.pt", "hf_hub": ""}, "no route to host", "https://a.b/c/d.pt (as demo.pt)"),
        (
            {"hf_hub": "owner/name/"},
            "no route to host",
            "https://huggingface.co/owner/name/resolve/main/open_clip_model.safetensors (as demo.safetensors)",
        ),
        (
            {"url": "https://a.b/c/d.pt", "hf_hub": "owner/name/e.bin"},
            "no route to host",
            "https://a.b/c/d.pt (as demo.pt) or https://huggingface.co/owner/name/resolve/main/e.bin (as demo.bin)",
        ),
    ],
)
def test_missing_weights_say_where_to_get_them(nowhere, monkeypatch, source, reason, what):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model_name, tag: source)
    with pytest.raises(FileNotFoundError) as error:
        module.find_weights("demo")
    assert reason in str(error.value)
    assert f"Download {what} into {nowhere / 'ckpt'}, or give" in str(error.value)


def test_a_known_name_is_found(nowhere, state):
    (nowhere / "ckpt").mkdir()
    with pytest.raises(FileNotFoundError, match="No weights for demo"):
        module.find_weights("demo")
    torch.save(state, nowhere / "ckpt" / "demo.pt")
    assert module.find_weights("demo") == nowhere / "ckpt" / "demo.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln_final.bias"), "it lacks 'ln_final.bias'"),
        (lambda s: s.update(extra=torch.zeros(1)), "it holds 'extra', which"),
        (
            lambda s: s.update({"ln_final.bias": torch.zeros(3)}),
            r"'ln_final.bias' of another size: shape \[3\], expected \[48\]",
        ),
    ],
)
def test_wrong_weights_are_named(state, tmp_path, change, message):
    wrong = dict(state)
    change(wrong)
    torch.save(wrong, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=message):
        load_backbone("demo", clip_weights=tmp_path / "wrong.pt")


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_unreadable_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="not readable as CLIP weights"):
        read_weights(tmp_path / name)


def test_activation_is_plain_gelu_unless_asked_otherwise():
    assert not clip_config("ViT-L-14-336")["quick_gelu"]
    assert type(load_backbone("demo").image_blocks[0].mlp.gelu) is torch.nn.GELU
    quick = load_backbone("demo", quick_gelu=True)
    assert type(quick.image_blocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    with pytest.raises(ValueError, match="GELU"):
        Backbone(quick.clip, "demo", quick_gelu=False)


def test_sizes_come_from_the_model(backbone):
    assert clip_config("ViT-L-14-336")["vision_cfg"]["image_size"] == 518
    assert default_adapters(clip_config("ViT-L-14-336")) == {"text_adapt_until": 3, "image_adapt_until": 6}
    assert backbone.levels == (3, 6, 9, 12)
    assert (backbone.image_width, backbone.text_width, backbone.embed_dim) == (128, 48, 96)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("demo", 65, "64 or 72"),
        ("no-such", None, "no such model"),
        ("RN50", None, "only OpenAI's architecture"),
        ("coca_ViT-B-32", None, "only OpenAI's architecture"),
    ],
)
def test_bad_configuration(name, size, message):
    with pytest.raises(ValueError, match=message):
        clip_config(name, size)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(audio_cfg=config.pop("vision_cfg")),
        lambda config: config.update(another_cfg={}),
        lambda config: config["text_cfg"].update(text_arch="modern"),
        lambda config: config["vision_cfg"].update(patch_size=None),
    ],
)
def test_other_kinds_of_model_are_refused(monkeypatch, change):
    config = open_clip.get_model_config("demo")
    change(config)
    monkeypatch.setattr(open_clip, "get_model_config", lambda model_name: config)
    with pytest.raises(ValueError, match="only OpenAI's architecture"):
        clip_config("demo")


def test_every_model_of_open_clip_is_known_or_refused():
    known = set()
    for name in open_clip.list_models():
        with contextlib.suppress(ValueError):  # any other error fails the test
            clip_config(name)
            known.add(name)
    assert {"demo", "ViT-B-16", "ViT-L-14-336", "ViT-H-14"} <= known


def test_all_frozen_and_always_in_eval_mode(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.train().training
    assert not any(part.training for part in backbone.modules())


def test_walk_equals_open_clip(backbone):
    images = standin_images(2, 64)
    plain = backbone.plain_tokens(images)
    with torch.no_grad():
        assert torch.allclose(backbone.project_image(plain[12][:, 0]), backbone.clip.encode_image(images), atol=1e-5)
        full = open_clip.tokenize(PROMPTS)
        expected = backbone.clip.encode_text(full)
        ids = backbone.tokenize(PROMPTS)
        assert ids.shape[1] < full.shape[1]
        x = backbone.run_text_blocks(backbone.first_text_block(ids), start=1)
        ends = ids.argmax(dim=-1, keepdim=True)
        found = backbone.end_of_text(x, ends).squeeze(1) @ backbone.clip.text_projection
    assert torch.allclose(found, expected, atol=1e-5)


def test_long_prompt_is_an_error(backbone):
    with pytest.raises(ValueError, match="tokens, and CLIP reads at most 77"):
        backbone.tokenize(["candle " * 80])


def naive_vv(attention, x: torch.Tensor) -> torch.Tensor:
    """V-V attention of one sequence [T, W], head by head."""
    width = x.shape[-1]
    v = x @ attention.in_proj_weight[2 * width :].T + attention.in_proj_bias[2 * width :]
    heads = [(h @ h.T / h.shape[-1] ** 0.5).softmax(-1) @ h for h in v.chunk(attention.num_heads, dim=-1)]
    return attention.out_proj(torch.cat(heads, dim=-1))


def test_vv_attention_within_the_image_and_across_the_batch(backbone):
    attention = backbone.image_blocks[4].attn
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    within = torch.stack([naive_vv(attention, image) for image in x])
    across = torch.stack([naive_vv(attention, position) for position in x.transpose(0, 1)]).transpose(0, 1)
    assert torch.allclose(vv_attention(attention, x, across_batch=False), within, atol=1e-5)
    assert torch.allclose(vv_attention(attention, x, across_batch=True), across, atol=1e-5)
    assert not torch.allclose(within, across, atol=1e-3)


def test_vv_within_the_image_does_not_depend_on_the_batch(backbone):
    images = standin_images(3, 64)
    together, plain = backbone.vv_tokens(images, backbone.default_vv_start, across_batch=False)
    alone, _ = backbone.vv_tokens(images[:1], backbone.default_vv_start, across_batch=False)
    assert torch.allclose(together[12][:1], alone[12], atol=1e-4)
    assert torch.allclose(plain[12], backbone.plain_tokens(images)[12][:, :1], atol=1e-5)
