"""Pictures of a comparison: which images are shown, what is said of them, and where the files go."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dataset.constants import class_prompts
from dataset.records import Record
from dataset.sets import DataSet
from forward_utils_cross_attention import ClassText, Prediction, PromptBank, encode
from model.adapter_cross_attention import CrossAttentionCLIP
from utils import plots
from utils.comparison import difference, improvement, result
from utils.evaluation import AVERAGE, Batching, Tested, predictions
from utils.plots import Example, Panel


def picture_folder(subject: Tested, data: DataSet) -> Path:
    """Where the pictures of a data set go: beside the checkpoint that they are about."""
    return subject.folder / f"pictures_{data.name}"


def file_name(text: str) -> str:
    """A name as a file name on every system."""
    return re.sub(r"[^\w.-]", "_", text)


def with_base(subject: Tested) -> list[Tested]:
    """The base of a model and itself; a base alone."""
    return [*([subject.references["base"]] if "base" in subject.references else []), subject]


def draw_sheets(subject: Tested, data: DataSet, bank: PromptBank, batching: Batching, count: int) -> list[Path]:
    """A contact sheet per class of up to `count` anomalous and `count` normal images: `subject` beside its base.

    Of each kind those that improved most come first, then those that worsened most; without a base the first ones.
    """
    models, paths = with_base(subject), []
    for class_name in subject.classes:
        records = data.of_class(class_name)
        rows = choose(subject, class_name, count)
        examples = []
        shown = predictions(models, data, bank, [records[row] for row in rows], batching._replace(num_workers=0))
        for (batch, number, found), row in zip(_one_by_one(shown), rows, strict=True):
            panels = [
                Panel(_scaled(prediction.maps[number], *_extremes(each, class_name)), *_judged(each, class_name, row))
                for each, prediction in zip(models, found, strict=True)
            ]
            title = f"{_short(records[row])}\n{_movement(models, class_name, row)}"
            examples.append(_example(batch, number, title, panels))
        path = picture_folder(subject, data) / f"{file_name(class_name)}.png"
        title = f"{data.name}, {class_name} (decided rightly: green, wrongly: red)"
        if len(models) > 1:
            title += "\nof each kind the most improved first, then the most worsened"
        names = [each.name for each in models]
        plots.draw_examples(examples, names, "a model's extremes in the class, as for the score", title, path)
        paths.append(path)
    return paths


def choose(subject: Tested, class_name: str, count: int) -> list[int]:
    """Numbers of the images of a class to show, anomalous ones first."""
    labels = subject.samples[class_name].labels
    moved = improvement(subject, class_name) if "base" in subject.references else -np.arange(len(labels))
    chosen: list[int] = []
    for label in (1, 0):
        kind = np.flatnonzero(labels == label)
        order = kind[np.argsort(-moved[kind], kind="stable")].tolist()
        if "base" in subject.references:
            better = order[: (count + 1) // 2]
            worse = order[::-1][: count // 2]
            chosen += dict.fromkeys([*better, *worse])
        else:
            chosen += order[:count]
    return chosen


def draw_one(
    tested: list[Tested], data: DataSet, bank: PromptBank, batching: Batching, class_name: str, index: int
) -> list[Path]:
    """One image across all tested loops of the last model's run and their base, and where the last one looks."""
    subject, record = tested[-1], data.of_class(class_name)[index]
    loops = [each for each in tested if each.folder == subject.folder and not each.is_base]
    models = [*with_base(subject)[:1], *loops] if loops else [subject]
    ((batch, found),) = predictions(models, data, bank, [record], batching._replace(num_workers=0))
    fitted = [each.checkpoint.calibration for each in models]
    ranges = [each.map_range for each in fitted if each]
    scaled_by = "a model's extremes on images of training"
    if len(ranges) < len(models):  # then all by the same
        maps = torch.stack([each.maps[0] for each in found])
        ranges, scaled_by = [(maps.min().item(), maps.max().item())] * len(models), "the extremes of these maps"
    panels = [
        Panel(_scaled(prediction.maps[0], *map_range), *_alone(each, prediction))
        for each, prediction, map_range in zip(models, found, ranges, strict=True)
    ]
    title = f"{data.name}, {class_name}, image {index}"
    stem = picture_folder(subject, data) / f"{file_name(class_name)}_{index}.png"
    example = _example(batch, 0, _short(record), panels)
    plots.draw_examples([example], [each.name for each in models], scaled_by, title, stem)
    return [stem, *_draw_attention(subject, bank, batch, example, f"{title}: {subject.name}", stem)]


def _one_by_one(
    batches: Iterable[tuple[dict, list[Prediction]]],
) -> Iterator[tuple[dict, int, list[Prediction]]]:
    """(batch, number in it, every model's predictions on the batch) of each image."""
    for batch, found in batches:
        for number in range(len(batch["label"])):
            yield batch, number, found


def _example(batch: dict, number: int, title: str, panels: list[Panel]) -> Example:
    mask = batch["mask"][number, 0].numpy() if batch["has_mask"][number] else None
    return Example(title, plots.to_picture(batch["image"][number]), mask, panels)


def _extremes(each: Tested, class_name: str) -> tuple[float, float]:
    sample = each.samples[class_name]
    return sample.low, sample.high


def _scaled(values: Tensor, low: float, high: float) -> np.ndarray:
    return ((values - low) / max(high - low, 1e-12)).cpu().numpy()


def _short(record: Record) -> str:
    return "/".join(Path(record.image_path).with_suffix("").parts[-2:])


def _judged(each: Tested, class_name: str, row: int) -> tuple[str, bool | None]:
    """Score, probability and decision of a tested image, and whether the decision is right."""
    sample = each.samples[class_name]
    caption = f"score {sample.scores[row]:.3f}"
    if sample.decisions is None:
        return caption, None
    called = "anomalous" if sample.decisions[row] else "normal"
    return f"{caption}, p {sample.probabilities[row]:.2f}: {called}", bool(sample.decisions[row] == sample.labels[row])


def _alone(each: Tested, prediction: Prediction) -> tuple[str, None]:
    """The score of the only image of a prediction, and its probability where the model has a calibration."""
    caption, fitted = f"score alone {prediction.single.item():.3f}", each.checkpoint.calibration
    if fitted is None:
        return caption, None
    p = fitted.probabilities(prediction.scores.cpu().numpy(), prediction.maps.amax(dim=(1, 2)).cpu().numpy()).item()
    return f"{caption}, p {p:.2f}: {'anomalous' if fitted.decisions(p) else 'normal'}", None


def _movement(models: list[Tested], class_name: str, row: int) -> str:
    """What an image is ranked by, from the base to the model."""
    values = [each.samples[class_name].pixel_ap[row] for each in models]
    name = "AP"
    if np.isnan(values).any():
        name, values = "score", [each.samples[class_name].scores[row] for each in models]
    return f"{name} " + " -> ".join(f"{value:.3f}" for value in values)


def draw_loops(tested: list[Tested], data: DataSet) -> Path | None:
    """Metrics over loops of every run with two tested loops or more beside its base; None where there is none."""
    runs: dict[Path, dict] = {}
    for each in tested:
        if "base" in each.references:
            base = each.references["base"]
            loops = runs.setdefault(each.folder, {0: (result(base, AVERAGE), None)})
            loops[each.checkpoint.loop] = (result(each, AVERAGE), difference(each, "base", AVERAGE))
    runs = {str(folder): dict(sorted(loops.items())) for folder, loops in runs.items() if len(loops) > 2}
    if not runs:
        return None
    path = picture_folder(tested[-1], data) / "loops.png"
    title = f"{data.name}: averages in percent; bars: 95 % intervals of the difference from the base (dashed)"
    plots.draw_metrics_over_loops(runs, title, path)
    return path


def _draw_attention(
    subject: Tested, bank: PromptBank, batch: dict, example: Example, title: str, stem: Path
) -> list[Path]:
    """Which patches each prompt looks at, and which prompt tokens image tokens look at; as far as the model does."""
    model, class_name = subject.model, batch["class_name"][0]
    weights = attention_weights(model, batch["image"], class_name, bank)
    prompts = class_prompts(bank.descriptions[class_name])
    tokens = [model.backbone.token_texts(prompt) for prompt in prompts]
    grid, paths = model.backbone.grid, []
    if "text_cross_attn" in weights:
        per_prompt = weights["text_cross_attn"].unflatten(0, (len(prompts), -1))  # P L patches+1
        means = torch.stack([rows[: len(line)].mean(dim=0) for rows, line in zip(per_prompt, tokens, strict=True)])
        maps = (means[:, :-1] * means.shape[1]).unflatten(1, (grid, grid)).numpy()
        paths.append(stem.with_name(f"{stem.stem}_prompts_on_image.png"))
        shares = means[:, -1].numpy()
        plots.draw_prompts_on_image(example, maps, shares, prompts, f"{title}, text -> image", paths[-1])
    if "image_cross_attn" in weights:
        rows = weights["image_cross_attn"]  # 1+patches P*L
        patches = adaptive_avg_pool2d(torch.from_numpy(example.panels[-1].values)[None], grid).flatten()
        places = {
            "patch with the highest map value": 1 + int(patches.argmax()),
            "patch with the lowest map value": 1 + int(patches.argmin()),
            "CLS": 0,
        }
        even = sum(map(len, tokens))
        found = {place: (rows[row] * even).unflatten(0, (len(prompts), -1)).numpy() for place, row in places.items()}
        paths.append(stem.with_name(f"{stem.stem}_image_on_prompts.png"))
        plots.draw_tokens_of_patches(found, tokens, f"{title}, image -> text", paths[-1])
    return paths


@torch.no_grad()
def attention_weights(model: CrossAttentionCLIP, image: Tensor, class_name: str, bank: PromptBank) -> dict[str, Tensor]:
    """What the cross-attentions of a model look at in one image [1, 3, S, S], by the module's name; none that are off.

    `text_cross_attn` [P*L, patches + 1], CLS last; `image_cross_attn` [1 + patches, P*L], CLS first.
    """
    seen: dict[str, tuple] = {}
    modules = {name: module for name, module in model.trainable().items() if name.endswith("cross_attn")}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs))
        for name, module in modules.items()
    ]
    try:
        encode(model, image.to(model.backbone.device), [class_name], ClassText(model, bank, fixed=True))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module.attention(*seen[name])[0].cpu() for name, module in modules.items()}
