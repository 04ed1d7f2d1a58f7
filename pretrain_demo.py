"""Pre-train the demo model: a small CLIP that learns rendered products from captions of images and of regions.

    python pretrain_demo.py --save_path ckpt/my_demo

The 12 categories of demo_train are seen intact and damaged, those of demo_dev and demo_test only intact, so that
finding their defects stays zero-shot. Writes demo.safetensors (half precision), pretraining.log and, until it is done,
a state: the same command run again goes on where it stopped. Finished weights, such as those in ckpt/demo, are only
measured, on fresh renders.
"""

import utils.threads  # noqa: F401, which decides before PyTorch is imported how its threads wait

import argparse
import json
import logging
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import safe_open
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

from dataset.commands import path_argument
from dataset.constants import class_prompts
from dataset.demo.captions import (
    CATEGORIES,
    COLOURS,
    DAMAGED,
    DEV,
    INTACT,
    KINDS,
    SAYS_DAMAGED,
    SILENT,
    TEST,
    TRAIN,
    UNKNOWN,
    Caption,
    draw_captions,
    truth,
)
from dataset.demo.render import render
from dataset.files import replacing
from dataset.loading import outlive_signals
from forward_utils_cross_attention import make_anchors
from model.backbone import Backbone, clip_config, load_backbone, run_blocks
from utils import arguments, checkpoints
from utils.cli import run_script
from utils.errors import TrainingError, TrainingStoppedError
from utils.logs import log_to_file, progress
from utils.options import MOST_SEED, at_least, finite, positive
from utils.signals import StopSignal
from utils.training.optimizer import learning_rate_factor

logger = logging.getLogger("pretrain_demo")

RENDER_SIZE = 96
# Share of the patches left out (https://arxiv.org/abs/2212.00794), and from which share of the steps on.
PATCH_DROPOUT = ((0.0, 0.75), (0.55, 0.5), (0.9, 0.0))
# A patch with this share of defect is a damaged region.
REGION_SHARE = 0.15
WARMUP_STEPS = 199  # the 200th step has the full rate
SAVE_EVERY = 250
# The categories that are seen intact only.
OTHERS = DEV + TEST
GROUPS = {"train": TRAIN, "dev": DEV, "test": TEST}
# The pool is drawn from seeds (seed, number), what measures from (MEASURE_SEED, category, number), and the data sets
# from larger ones; --seed stays below.
MEASURE_SEED = 1_000_000


def parse_arguments() -> argparse.Namespace:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--save_path", type=path_argument, default="ckpt/demo", help="folder of the weights")
    parser.add_argument(
        "--images",
        type=at_least(48),
        default=48000,
        help="rendered images, made anew each start; 37 kB of memory each",
    )
    parser.add_argument(
        "--steps", type=at_least(0), default=6400, help="optimiser steps; 0 for random weights, as a control"
    )
    parser.add_argument("--batch_size", type=at_least(2), default=128, help="images per step")
    parser.add_argument("--lr", type=positive, default=1.5e-3, help="peak learning rate of AdamW, cosine to zero")
    parser.add_argument("--region_weight", type=finite, default=1.0, help="weight of the region captions' loss")
    parser.add_argument("--seed", type=at_least(0, MOST_SEED), default=0, help="of weights, images and order")
    args = parser.parse_args()
    if args.seed >= MEASURE_SEED:
        parser.error(f"--seed {args.seed}: expected less than {MEASURE_SEED}; others draw what measures and tests.")
    return args


# images


@dataclass
class Pool:
    """Rendered images [n, 3, S, S] and masks [n, 1, S, S], uint8; per image its category, colour and condition."""

    images: Tensor
    masks: Tensor
    category: Tensor
    colour: Tensor
    condition: Tensor

    def __len__(self) -> int:
        return len(self.images)


def render_numbered(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Image `number` of the pool of `seed`, its mask, and its category, colour and condition.

    Every other image is of demo_train, whose categories come in turn, intact and then damaged; so do the others.
    """
    number, seed = job
    group = OTHERS if number % 2 else TRAIN
    round_number, place = divmod(number // 2, len(group))
    category = group[place]
    damaged = group is TRAIN and round_number % 2 == 1
    found = render(CATEGORIES[category], damaged, (seed, number), RENDER_SIZE)
    condition = UNKNOWN
    if category in TRAIN:
        condition = DAMAGED + KINDS.index(found.defect) if found.defect else INTACT
    return found.image, found.mask, (category, COLOURS.index(found.colour), condition)


def render_pool(count: int, seed: int) -> Pool:
    """`count` images, rendered by several processes. Raises TrainingStoppedError at a signal to stop."""
    images = torch.empty(count, 3, RENDER_SIZE, RENDER_SIZE, dtype=torch.uint8)
    masks = torch.empty(count, 1, RENDER_SIZE, RENDER_SIZE, dtype=torch.uint8)
    labels = torch.empty(count, 3, dtype=torch.long)
    jobs = ((number, seed) for number in range(count))
    # Where processes are spawned, each imports PyTorch: with many cores, memory is the limit.
    workers = ProcessPoolExecutor(min(8, os.cpu_count() or 1), initializer=outlive_signals)
    with StopSignal() as stop:
        try:
            rendered = workers.map(render_numbered, jobs, chunksize=200)
            bar = progress(rendered, total=count, desc="rendering", unit="image")
            for number, (image, mask, label) in enumerate(bar):
                if stop.received:
                    raise TrainingStoppedError("Stopped while rendering; the same command begins with that again.")
                images[number] = torch.from_numpy(image).permute(2, 0, 1)
                masks[number, 0] = torch.from_numpy(mask)
                labels[number] = torch.tensor(label)
        finally:
            workers.shutdown(cancel_futures=True)
    return Pool(images, masks, *labels.unbind(dim=1))


def normalise(images: Tensor) -> Tensor:
    """uint8 or float pixels in 0..255 [B, 3, S, S] -> CLIP's normalised pixels."""
    return normalize(images.float() / 255, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def crop(pool: Pool, rows: Tensor, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random turned, flipped and jittered crops: pixels [B, 3, size, size] and masks [B, 1, size, size].

    Crops are half to all of an image wide, so that products are seen at the scale of larger inputs too.
    """
    count = len(rows)
    zoom = torch.empty(count).uniform_(0.5, 1, generator=rng)
    angle = torch.empty(count).uniform_(-0.4, 0.4, generator=rng)
    flip = torch.randint(0, 2, (count,), generator=rng) * 2.0 - 1
    shift = torch.empty(count, 2).uniform_(-1, 1, generator=rng) * (1 - zoom)[:, None]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([cos * flip, -sin, sin * flip, cos], dim=1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], dim=2), [count, 1, size, size], align_corners=False)
    layers = torch.cat([pool.images[rows], pool.masks[rows]], dim=1).float()
    layers = F.grid_sample(layers, grid, padding_mode="reflection", align_corners=False)
    gain = torch.empty(count, 1, 1, 1).uniform_(0.75, 1.25, generator=rng)
    tint = torch.empty(count, 3, 1, 1).uniform_(0.95, 1.05, generator=rng)
    return normalise((layers[:, :3] * gain * tint).clamp(0, 255)), (layers[:, 3:] > 127).float()


# model


def new_backbone(seed: int) -> Backbone:
    """The demo model with fresh weights that train."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = Backbone(open_clip.CLIP(**clip_config("demo")), "demo")
    backbone.clip.requires_grad_(True)
    return backbone


def encode_text(backbone: Backbone, texts: list[str]) -> Tensor:
    """Normalised text features [N, E], with gradient."""
    ids = backbone.tokenize(texts)
    x = backbone.clip.token_embedding(ids) + backbone.clip.positional_embedding[: ids.shape[1]]
    x = backbone.end_of_text(backbone.run_text_blocks(x), ids.argmax(dim=-1, keepdim=True)).squeeze(1)
    return F.normalize(x @ backbone.clip.text_projection, dim=-1)


def drop_patches(tokens: Tensor, share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leave out a share of the patch tokens of [B, 1 + N, W]: the rest with CLS, and their numbers [B, kept]."""
    count, patches = len(tokens), tokens.shape[1] - 1
    kept = torch.rand(count, patches, generator=rng).argsort(dim=1)[:, : round(patches * (1 - share))]
    chosen = tokens[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], chosen], dim=1), kept


def damaged_patches(masks: Tensor, grid: int) -> Tensor:
    """Masks [B, 1, S, S] of 0 and 1 -> which patches show a defect, [B, grid * grid]."""
    return F.adaptive_avg_pool2d(masks, grid).flatten(1) >= REGION_SHARE


def caption_loss(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy with several positives, images to captions and captions to images; unknown pairs do not count.

    CLIP's loss (https://arxiv.org/abs/2103.00020), the target shared by all captions that are true.
    """
    logits = (scale * images @ texts.T).masked_fill(~known, -math.inf)
    losses = []
    for scores, holds in ((logits, true), (logits.T, true.T)):
        rows = holds.any(dim=1)
        target = holds[rows].float()
        log_p = scores[rows].log_softmax(dim=1).masked_fill(~holds[rows], 0)
        losses.append(-((log_p * target).sum(dim=1) / target.sum(dim=1)).mean())
    return sum(losses, scale.new_zeros(())) / 2


def region_loss(patches: list[Tensor], damaged: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of patches, each level [B, N, E], against a normal and a damaged caption [B, 2, E].

    `damaged` [B, N] is 0 or 1. Damaged regions are rare and weigh threefold. Zero where B is.
    """
    if not len(damaged):
        return scale.new_zeros(())
    weight = torch.tensor([1.0, 3.0])
    losses = []
    for level in patches:
        logits = scale * F.normalize(level, dim=-1) @ texts.transpose(1, 2)
        losses.append(F.cross_entropy(logits.flatten(0, 1), damaged.flatten(), weight))
    return sum(losses, scale.new_zeros(())) / len(losses)


def losses(backbone: Backbone, pool: Pool, args: argparse.Namespace, step: int) -> dict[str, Tensor]:
    """Both losses of one step; all that is random in it follows from seed and step."""
    rng, words = torch.Generator().manual_seed(args.seed * 1_000_003 + step), np.random.default_rng((args.seed, step))
    rows = torch.from_numpy(words.integers(len(pool), size=args.batch_size))
    pixels, masks = crop(pool, rows, backbone.img_size, rng)
    share = next(share for start, share in reversed(PATCH_DROPOUT) if step >= start * args.steps)
    tokens, kept = drop_patches(backbone.embed_images(pixels), share, rng)
    damaged = damaged_patches(masks, backbone.grid).gather(1, kept)
    category, colour, condition = pool.category[rows], pool.colour[rows], pool.condition[rows]
    # Cropping and patch dropout hide some defects: then no caption may speak of the condition.
    condition = torch.where((condition >= DAMAGED) & ~damaged.any(dim=1), UNKNOWN, condition)

    half = args.batch_size // 2  # captions of half the batch keep the text tower cheap; all images meet all captions
    captions = draw_captions(category[:half], colour[:half], condition[:half], words)
    about = [None, *TRAIN]  # region captions: of any product, and of each training category
    pairs = [Caption(name, None, says) for name in about for says in (SILENT, SAYS_DAMAGED)]
    texts = encode_text(backbone, [caption.words(words) for caption in captions + pairs])
    texts, region_texts = texts[: len(captions)], texts[len(captions) :].unflatten(0, (-1, 2))

    last, levels = run_blocks(backbone.image_blocks, tokens, keep=backbone.levels[1:])
    image_features = F.normalize(backbone.project_image(last[:, 0]), dim=-1)
    true, known = truth(captions, category, colour, condition)

    shown = torch.tensor([number in TRAIN for number in category.tolist()])
    named = torch.tensor([about.index(number) for number in category[shown].tolist()], dtype=torch.long)
    named[torch.rand(len(named), generator=rng) < 0.4] = 0
    patches = [backbone.project_image(level[shown, 1:]) for level in levels.values()]
    return {
        "captions": caption_loss(image_features, texts, backbone.scale, true, known),
        "regions": region_loss(patches, damaged[shown].long(), region_texts[named], backbone.scale),
    }


def make_optimizer(backbone: Backbone, lr: float) -> torch.optim.AdamW:
    """AdamW; as in CLIP, gains, biases and the temperature do not decay."""
    named = list(backbone.clip.named_parameters())
    decays = [parameter for name, parameter in named if parameter.ndim >= 2 and "embedding" not in name]
    others = [parameter for name, parameter in named if parameter.ndim < 2 or "embedding" in name]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def settings_of(args: argparse.Namespace) -> dict:
    """What the weights depend on."""
    return {key: value for key, value in vars(args).items() if key != "save_path"}


def check_settings(found: dict | None, args: argparse.Namespace, path: Path) -> None:
    """Raise ValueError where the file at `path` is of a run with other settings."""
    if found != settings_of(args):
        raise ValueError(
            f"{path} is of a run with {found}, and this one has {settings_of(args)}. Repeat those, or choose another "
            "--save_path."
        )


def train(args: argparse.Namespace, backbone: Backbone, state_file: Path) -> None:
    """Run or go on to `args.steps`; the state is saved every few minutes and when a signal stops it."""
    optimizer = make_optimizer(backbone, args.lr)
    start = 0
    if state_file.is_file():
        state = checkpoints.read(state_file)
        backbone.clip.load_state_dict(state["clip"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        logger.info("Going on at step %d.", start)
    if start == args.steps:
        return
    pool = render_pool(args.images, args.seed)
    bar = progress(total=args.steps, initial=start, desc="pre-training", unit="step")
    with StopSignal() as stop, bar:
        for step in range(start, args.steps):
            rate = args.lr * learning_rate_factor("cosine", step, args.steps, WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = losses(backbone, pool, args, step)
            loss = terms["captions"] + args.region_weight * terms["regions"]
            if not loss.isfinite():
                raise TrainingError(f"The loss is {loss.item()} at step {step}. Try a smaller --lr.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(backbone.clip.parameters(), 1.0)
            optimizer.step()
            bar.update()
            done = step + 1
            if done % 100 == 0:
                shown = ", ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
                logger.info("step %d: %s, scale %.1f", done, shown, backbone.scale.item())
            if done % SAVE_EVERY == 0 or stop.received:
                content = {"clip": backbone.clip.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoints.save({**content, "step": done, "settings": settings_of(args)}, state_file)
            if stop.received:
                raise TrainingStoppedError(f"Stopped after step {done}; the same command goes on from here.")


def save_weights(backbone: Backbone, args: argparse.Namespace, path: Path) -> None:
    """Write the weights in half precision; words that no caption used say nothing, rather than something random."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in backbone.clip.state_dict().items()}
    if args.steps:
        words = state["token_embedding.weight"]
        unused = (words == new_backbone(args.seed).clip.token_embedding.weight.half()).all(dim=1)
        words[unused] = 0
    with replacing(path) as file:
        file.write(save(state, metadata={"settings": json.dumps(settings_of(args))}))


# measures


@torch.no_grad()
def measure(backbone: Backbone, per_category: int = 100) -> dict[str, float]:
    """Zero-shot quality on fresh renders, `per_category` images each, half of them damaged; means over categories.

    `accuracy`: all categories by "a photo of a {}.", intact images. `image_auroc_*`: intact or damaged, by the CLS
    token against AA-CLIP's anchors. `patch_auroc_*`: the same of the last level's patches. `_train` are the categories
    that pre-training saw damaged (demo_train), `_dev` and `_test` those it did not.
    """
    found: dict[str, list[float]] = {"accuracy": []}
    names = [name.replace("_", " ") for name in CATEGORIES]
    bare = encode_text(backbone, [f"a photo of a {name}." for name in names])
    for number, category in enumerate(progress(CATEGORIES, desc="measuring", unit="category")):
        rendered = [
            render(category, index % 2 == 1, (MEASURE_SEED, number, index), RENDER_SIZE)
            for index in range(per_category)
        ]
        images = torch.from_numpy(np.stack([one.image for one in rendered])).permute(0, 3, 1, 2)
        size = (backbone.img_size, backbone.img_size)
        pixels = normalise(F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255))
        labels = np.arange(per_category) % 2
        tokens = run_blocks(backbone.image_blocks, backbone.embed_images(pixels))[0]
        features = F.normalize(backbone.project_image(tokens), dim=-1)
        guess = (features[:, 0] @ bare.T).argmax(dim=1).numpy()
        found["accuracy"].append(float((guess[labels == 0] == number).mean()))
        anchors = make_anchors(encode_text(backbone, class_prompts(names[number])).unsqueeze(0))[0]
        abnormal = (features @ (anchors[:, 1] - anchors[:, 0])).numpy()
        masks = torch.from_numpy(np.stack([one.mask for one in rendered])).unsqueeze(1).float() / 255
        damaged = damaged_patches(masks, backbone.grid).flatten().numpy()
        which = next(name for name, group in GROUPS.items() if number in group)
        found.setdefault(f"image_auroc_{which}", []).append(roc_auc_score(labels, abnormal[:, 0]))
        found.setdefault(f"patch_auroc_{which}", []).append(roc_auc_score(damaged, abnormal[:, 1:].ravel()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    args = parse_arguments()
    weights, state_file = args.save_path / "demo.safetensors", args.save_path / "pretraining_state.pth"
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            check_settings(json.loads((file.metadata() or {}).get("settings", "null")), args, weights)
        logger.info("%s is finished and only measured; to train anew, choose another --save_path.", weights)
    else:
        if state_file.is_file():
            check_settings(checkpoints.read(state_file).get("settings"), args, state_file)
        args.save_path.mkdir(parents=True, exist_ok=True)
        log_to_file(args.save_path / "pretraining.log")
        backbone = new_backbone(args.seed)
        try:
            if args.steps:
                train(args, backbone, state_file)
            save_weights(backbone, args, weights)
        except OSError as error:  # a full disk, for instance
            raise TrainingError(f"{error}. The last state is in {args.save_path}.") from error
        state_file.unlink(missing_ok=True)
    quality = measure(load_backbone("demo", clip_weights=weights))
    logger.info("%s: %s", weights, ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))


if __name__ == "__main__":
    run_script(main, several=False)
