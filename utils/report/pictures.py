"""Pictures of a comparison: which images are shown, what is said of them, and where the files go."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dataset.constants import class_prompts
from dataset.loading import Batch
from dataset.records import Record
from dataset.transforms import to_picture
from forward_utils_cross_attention import Prediction, encode
from utils.files import unused_names
from utils.judging import Detector
from utils.report import plots
from utils.report.curves import draw_metrics_over_loops, loops_of_runs
from utils.report.plots import Example, Panel
from utils.testing.bench import Bench
from utils.testing.comparison import Comparison
from utils.testing.contenders import Contender
from utils.testing.results import Results
from utils.verdicts import calibrated_extremes, caption, scaled

# Names beside those of the classes: metrics over loops, and a folder for pictures of one image.
CURVES, ONE_IMAGE = "loops", "one_image"


def picture_folder(bench: Bench, subject: Contender) -> Path:
    """Where the pictures of a data set go: beside the checkpoint that they are about."""
    return subject.folder / f"pictures_{bench.data.name}"


def class_files(bench: Bench) -> dict[str, str]:
    """{class: what its picture is called}, other than the curves over loops."""
    return unused_names(bench.data.descriptions, taken=(CURVES,))


def draw_sheets(comparison: Comparison, count: int) -> list[Path]:
    """A contact sheet per class of up to `count` anomalous and `count` normal images: the subject beside its base.

    `Results.choose` says which.
    """
    bench, subject = comparison.bench, comparison.subject
    shown = [*([subject.references["base"]] if "base" in subject.references else []), subject]
    names, paths, files = [result.name for result in shown], [], class_files(bench)
    for class_name in comparison.classes:
        path = picture_folder(bench, subject.contender) / f"{files[class_name]}.png"
        title = f"{bench.data.name}, {class_name} (decided rightly: green, wrongly: red)"
        if len(shown) > 1:
            title += "\nof each kind the most improved first, then the most worsened"
        examples = list(_examples(bench, shown, class_name, subject.choose(class_name, count)))
        plots.draw_examples(examples, names, "a model's extremes in the class, as for the published score", title, path)
        paths.append(path)
    return paths


def _examples(bench: Bench, shown: list[Results], class_name: str, rows: list[int]) -> Iterator[Example]:
    """The images `rows` of a class, with the map of every model shown and what it says."""
    records = bench.data.of_class(class_name)
    samples = [result.samples[class_name] for result in shown]
    predicted = bench.predictions([result.contender for result in shown], [records[row] for row in rows], num_workers=0)
    for (batch, number, found), row in zip(_one_by_one(predicted), rows, strict=True):
        panels = []
        for sample, prediction in zip(samples, found, strict=True):
            probability = anomalous = right = None
            if sample.probabilities is not None and sample.decisions is not None:
                probability, anomalous = float(sample.probabilities[row]), bool(sample.decisions[row])
                right = anomalous == bool(sample.labels[row])
            words = caption("published", float(sample.published_scores[row]), probability, anomalous)
            values = scaled(prediction.maps[number].cpu().numpy(), (sample.low, sample.high))
            panels.append(Panel(values, words, right))
        # What the image is ranked by, from the base to the model.
        ranked_by, ranks = "AP", [sample.pixel_ap[row] for sample in samples]
        if np.isnan(ranks).any():
            ranked_by, ranks = "published score", [sample.published_scores[row] for sample in samples]
        movement = f"{ranked_by} " + " -> ".join(f"{rank:.3f}" for rank in ranks)
        yield _example(batch, number, f"{_short(records[row])}\n{movement}", panels)


def _one_by_one(batches: Iterator[tuple[Batch, list[Prediction]]]) -> Iterator[tuple[Batch, int, list[Prediction]]]:
    """(batch, number in it, every model's predictions on the batch) of each image."""
    for batch, found in batches:
        for number in range(len(batch["label"])):
            yield batch, number, found


def _example(batch: Batch, number: int, title: str, panels: list[Panel]) -> Example:
    mask = batch["mask"][number, 0].numpy() if batch["has_mask"][number] else None
    return Example(title, to_picture(batch["image"][number]), mask, panels)


def _short(record: Record) -> str:
    return "/".join(Path(record.image_path).with_suffix("").parts[-2:])


def draw_one(bench: Bench, contenders: Sequence[Contender], class_name: str, index: int) -> list[Path]:
    """One image across all loops of the last contender's run and their base, and where the last one looks."""
    subject, record = contenders[-1], bench.data.of_class(class_name)[index]
    run = [contender for contender in contenders if contender.checkpoint.folder == subject.checkpoint.folder]
    loops = [contender for contender in run if not contender.checkpoint.is_base]
    models = [subject.references.get("base", subject), *loops] if loops else [subject]
    ((batch, found),) = bench.predictions(models, [record], num_workers=0)
    detectors = [bench.detector(contender) for contender in models]
    maps = torch.stack([prediction.maps[0] for prediction in found])
    extremes, scaled_by = calibrated_extremes(detectors, (maps.min().item(), maps.max().item()), "these maps")
    panels = [
        _judged_alone(detector, prediction, ends)
        for detector, prediction, ends in zip(detectors, found, extremes, strict=True)
    ]
    title = f"{bench.data.name}, {class_name}, image {index}"
    path = picture_folder(bench, subject) / ONE_IMAGE / f"{class_files(bench)[class_name]}_{index}.png"
    example = _example(batch, 0, _short(record), panels)
    plots.draw_examples([example], [contender.name for contender in models], scaled_by, title, path)
    return [path, *_draw_attention(detectors[-1], batch, example, f"{title}: {subject.name}", path)]


def _judged_alone(detector: Detector, prediction: Prediction, extremes: tuple[float, float]) -> Panel:
    """A model's map of the only image of a prediction, and what it says of it."""
    scores = prediction.detection_scores.item(), prediction.single_scores.item()
    size = (detector.img_size, detector.img_size)
    verdict = detector.verdict(prediction.maps[0].cpu().numpy(), *scores, size)
    words = caption("single-image", verdict.single_score, verdict.probability, verdict.anomalous)
    return Panel(scaled(verdict.map, extremes), words)


def draw_loops(comparison: Comparison) -> Path | None:
    """Metrics over loops of every run with two tested loops or more beside its base; None where there is none."""
    runs = loops_of_runs(comparison)
    if not runs:
        return None
    path = picture_folder(comparison.bench, comparison.subject.contender) / f"{CURVES}.png"
    title = (
        f"{comparison.data.name}: averages in percent; bars: 95 % intervals of the difference from the base (dashed)"
    )
    draw_metrics_over_loops(runs, title, path)
    return path


def _draw_attention(detector: Detector, batch: Batch, example: Example, title: str, stem: Path) -> list[Path]:
    """Where the cross-attentions look, as far as the model has them."""
    model, bank, class_name = detector.model, detector.text.bank, batch["class_name"][0]
    weights = attention_weights(detector, batch["image"], class_name, batch.get("other"))
    if model.config.cross_attn == "joint":
        return _draw_joint_attention(weights, model.backbone.grid, example, title, stem)
    prompts = class_prompts(bank.descriptions[class_name])
    tokens = [model.backbone.token_texts(prompt) for prompt in prompts]
    grid, paths = model.backbone.grid, []
    if "text_cross_attn" in weights:
        maps, shares = prompts_on_patches(weights["text_cross_attn"], [len(line) for line in tokens], grid)
        paths.append(stem.with_name(f"{stem.stem}_prompts_on_image.png"))
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


def _draw_joint_attention(
    weights: dict[str, Tensor], grid: int, example: Example, title: str, stem: Path
) -> list[Path]:
    """Level by level: how much of its like each patch has, and what the detection feature takes from each patch."""
    about = {
        "text_cross_attn": ("prompts_on_image", "text -> image", "cosine with the patches most like it", False),
        "image_cross_attn": ("image_on_prompts", "image -> text", "what det takes (negative: gives)", True),
    }
    paths = []
    for name, values in weights.items():
        ending, direction, label, signed = about[name]
        paths.append(stem.with_name(f"{stem.stem}_{ending}.png"))
        maps = values.unflatten(1, (grid, grid)).numpy()
        plots.draw_levels(example, maps, label, signed, f"{title}, {direction}", paths[-1])
    return paths


def prompts_on_patches(weights: Tensor, lengths: list[int], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """What P prompts of these lengths look at, from text cross-attention [P*L, patches + 1]: means over their tokens.

    Patches [P, grid, grid] in units of even attention; the share of CLS [P].
    """
    per_prompt = weights.unflatten(0, (len(lengths), -1))  # P L patches+1
    means = torch.stack([rows[:length].mean(dim=0) for rows, length in zip(per_prompt, lengths, strict=True)])
    return (means[:, :-1] * means.shape[1]).unflatten(1, (grid, grid)).numpy(), means[:, -1].numpy()


@torch.no_grad()
def attention_weights(
    detector: Detector, image: Tensor, class_name: str, other: Tensor | None = None
) -> dict[str, Tensor]:
    """What the cross-attentions of a model look at in one image [1, 3, S, S], by the module's name; none that are off.

    `other` as in `encode`.

    In the joint space both are [levels, patches]. After block 0 `text_cross_attn` is [P*L, patches + 1], CLS last, and
    `image_cross_attn` [1 + patches, P*L], CLS first.
    """
    model, seen = detector.model, dict[str, tuple]()
    modules = model.cross_attentions()

    def note(name: str, module: torch.nn.Module, inputs: tuple) -> None:
        seen[name] = inputs

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        encode(model, image.to(model.backbone.device), [class_name], detector.text, other=other)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module.attention(*seen[name])[0].cpu() for name, module in modules.items()}
