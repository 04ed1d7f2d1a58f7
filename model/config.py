"""What a model is, apart from its weights, and where files of weights lie. Known without PyTorch."""

from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Folders of the repository where weights of CLIP are looked for.
WEIGHT_FOLDERS = ("ckpt", "model", "ckpt/demo")
DEFAULT_MODEL = "ViT-L-14-336"
# Title, in --help, of what a base model leaves open.
EXTENSION = "cross-attention"
# {placement: {field of ModelConfig: value of a new run}}
PLACEMENTS = {
    "joint": {"text_cross_attn_weight": 0.3, "image_cross_attn_weight": 1.0},
    "block": {"text_cross_attn_weight": 0.1, "image_cross_attn_weight": 0.1},
}


def new_extension(placement: str | None = None) -> dict[str, Any]:
    """{field of ModelConfig: value} of what a new run adds to a base."""
    chosen = placement or next(iter(PLACEMENTS))
    return {"cross_attn": chosen, "text_cross_attn": True, "image_cross_attn": True, **PLACEMENTS[chosen]}


def _weights(side: str) -> str:
    return ", ".join(f"{values[f'{side}_cross_attn_weight']} with {name}" for name, values in PLACEMENTS.items())


def _flag(help: str, default: Any = MISSING, group: str = "model", **about: Any) -> Any:
    """A field that is a flag of the command line too; `about` as `utils.options` reads it."""
    return field(default=default, metadata={"help": help, "group": group, **about})


@dataclass(frozen=True)
class ModelConfig:
    """All that rebuilds a model, apart from its weights; stored in every checkpoint. Each field is a flag."""

    model_name: str = _flag("CLIP by open_clip's name, or demo", without=DEFAULT_MODEL)
    img_size: int = _flag(
        "side of the square input in pixels", least=1, without="518 for ViT-L-14-336, else the model's"
    )
    text_adapt_until: int = _flag(
        "number of text blocks with an adapter", least=1, without="a quarter of them, 3 of ViT-L's 12"
    )
    image_adapt_until: int = _flag(
        "number of ViT blocks with an adapter", least=1, without="a quarter of them, 6 of ViT-L's 24"
    )
    quick_gelu: bool = _flag("OpenAI's activation", False, without="plain GELU, as published bases have")
    relu: bool = _flag("LeakyReLU after the image projectors", False, without="none")
    adapter_hidden: int | None = _flag(
        "adapters with a bottleneck of this width", None, least=1, most=65_536, without="none"
    )
    text_adapt_weight: float = _flag("weight of a text adapter's output", 0.1)
    image_adapt_weight: float = _flag("weight of an image adapter's output", 0.1)
    text_cross_attn: bool = _flag("without text -> image", False, EXTENSION, flag="no_text_cross_attn", without=None)
    image_cross_attn: bool = _flag("without image -> text", False, EXTENSION, flag="no_image_cross_attn", without=None)
    cross_attn: str = _flag(
        "where they sit: in the joint space, or after block 0 of either tower",
        "block",
        EXTENSION,
        choices=tuple(PLACEMENTS),
        without="joint",
        added=True,
    )
    text_cross_attn_weight: float = _flag("weight of its added term", 0.1, EXTENSION, without=_weights("text"))
    image_cross_attn_weight: float = _flag("weight of its added term", 0.1, EXTENSION, without=_weights("image"))
    image_context: str = _flag(
        "the image that is seen: as the model sees it; with --cross_attn block also as the plain CLIP does; or, as a "
        "control, another image of its class",
        "adapted",
        EXTENSION,
        choices=("adapted", "frozen", "another"),
    )


def model_fields(extension: bool) -> list[Field]:
    """The fields that a base model leaves open (`extension`), or those that it has too."""
    return [entry for entry in fields(ModelConfig) if (entry.metadata["group"] == EXTENSION) == extension]
