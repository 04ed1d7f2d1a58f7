"""From model outputs to results: prompts -> anchors, with the image's features -> maps, scores, losses.

    prompts of a class -> text blocks, adapters -> anchors [B, E, 2] --+
    image -> ViT blocks, adapters -> V1..V4, det, CLS -----------------+
          -> cosines (text cross-attention) and det (image cross-attention) -> maps and score -> losses, or metrics

With `--cross_attn block` each tower has its cross-attention after block 0, and looks at the other's context:

    prompts of a class ---- text block 0, adapter 0 ----> text context --+
    image -> ViT blocks <------------------------------------------------+  -> V1..V4, det, CLS -> image context --+
    prompts -> text blocks <---------------------------------------------------------------------------------------+

Shapes: B images, N patches, E the embedding width, S the image size, P prompts of a class. Formulas are those of
AA-CLIP (arXiv 2503.06661) as its published code computes them.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2.functional import gaussian_blur

from dataset.constants import BLUR, NORMAL_PROMPTS, class_prompts
from model.adapter import Prompts, TextContext, VisualFeatures
from model.adapter_cross_attention import CrossAttentionCLIP
from model.backbone import Backbone, as_is

logger = logging.getLogger(__name__)

FEEDBACK = ("adapted", "projectors", "off")
# What Stage 1 may look at; "off" above means frozen in every loop.
STAGE1_FEATURES = ("frozen", "adapted", "projectors")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 for the towers where `precision` is "bf16"; with "fp32", nothing changes.

    Without autocast's cache: it would hand a weight that was first read without gradient, for a context, to the pass
    that needs its gradient (https://github.com/pytorch/pytorch/issues/112583).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def index_on(device: torch.device, numbers: list[int] | Tensor) -> Tensor:
    """Numbers as an index there; a GPU's is sent without waiting for what the GPU does."""
    index = torch.as_tensor(numbers)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


class PromptBank:
    """The prompts of each class of a domain, tokenised and through the frozen text block 0: once per data set and run.

    `descriptions`: {class: its name in the prompts}. Raises ValueError for a prompt that CLIP cannot read whole, and
    where the backbone's patch grid is too small for the domain's maps.
    """

    def __init__(self, backbone: Backbone, descriptions: dict[str, str], domain: str):
        check_grid(backbone.grid, domain)
        self.descriptions, self.domain = descriptions, domain
        self.index = {name: number for number, name in enumerate(descriptions)}
        self.check_words(backbone)
        texts = [prompt for description in descriptions.values() for prompt in class_prompts(description)]
        ids = backbone.tokenize(texts)
        per_class = (len(descriptions), -1)
        tokens = backbone.first_text_block(ids).unflatten(0, per_class)
        eot = ids.argmax(dim=-1).unflatten(0, per_class)
        self.lengths, self.totals = (eot.amax(dim=1) + 1).tolist(), (eot + 1).sum(dim=1).tolist()
        self.prompts = Prompts(tokens, eot, max(self.totals))

    def check_words(self, backbone: Backbone) -> None:
        """Warn of words that the backbone was never trained on."""
        unknown = {word for description in self.descriptions.values() for word in backbone.unknown_words(description)}
        if unknown:
            logger.warning("This CLIP knows nothing of these words in the prompts: %s.", ", ".join(sorted(unknown)))

    def numbers(self, class_names: list[str]) -> list[int]:
        """The place of each class in the bank. Raises KeyError for a class that is not in it."""
        return [self.index[name] for name in class_names]

    def select(self, prompts: Prompts, numbers: list[int]) -> Prompts:
        """Of `prompts` of all classes those of `numbers`, cropped to the longest among them."""
        length = max(self.lengths[number] for number in numbers)
        most = max(self.totals[number] for number in numbers)
        index = index_on(prompts.eot.device, numbers)
        return Prompts(prompts.tokens[index, :, :length], prompts.eot[index], most)


class ClassText:
    """Text contexts and anchors of one model for the classes of a bank.

    `fixed` says that no text module trains: what depends on the class alone is then computed once and kept.
    """

    def __init__(self, model: CrossAttentionCLIP, bank: PromptBank, fixed: bool):
        self.model, self.bank, self.fixed = model, bank, fixed
        self._context_prompts: Prompts | None = None
        self._anchors: Tensor | None = None

    def contexts(self, class_names: list[str]) -> TextContext | None:
        """The text context of each image's class, without gradient; None where the visual forward needs none."""
        if not self.model.image_sees_prompts:
            return None
        numbers = self.bank.numbers(class_names)
        if not self.fixed:
            prompts = self.bank.select(self.bank.prompts, numbers)
            return TextContext.join(self.model.context_prompts(prompts))
        if self._context_prompts is None:
            self._context_prompts = self.model.context_prompts(self.bank.prompts)
        return TextContext.join(self.bank.select(self._context_prompts, numbers))

    def anchors(self, class_names: list[str], image_context: Tensor | None) -> Tensor:
        """Normal and abnormal anchor of each image, [B, E, 2]; per class where the text forward sees no image."""
        numbers = self.bank.numbers(class_names)
        if self.model.prompts_see_image:
            return make_anchors(self.model.text(self.bank.select(self.bank.prompts, numbers), image_context))
        if not self.fixed:
            present = sorted(set(numbers))
            anchors = make_anchors(self.model.text(self.bank.select(self.bank.prompts, present)))
            return anchors[index_on(anchors.device, [present.index(number) for number in numbers])]
        if self._anchors is None:
            with torch.no_grad():
                alone = (self.bank.select(self.bank.prompts, [number]) for number in self.bank.index.values())
                self._anchors = torch.cat([make_anchors(self.model.text(prompts)) for prompts in alone])
        return self._anchors[index_on(self._anchors.device, numbers)]


def make_anchors(embeddings: Tensor) -> Tensor:
    """Prompt embeddings [B, P, E], normal prompts first -> normal and abnormal anchor, [B, E, 2].

    Each embedding is normalised, the normal and the abnormal ones are averaged, the averages normalised.
    """
    embeddings = F.normalize(embeddings.float(), dim=-1)
    groups = (embeddings[:, :NORMAL_PROMPTS], embeddings[:, NORMAL_PROMPTS:])
    return torch.stack([F.normalize(group.mean(dim=1), dim=-1) for group in groups], dim=-1)


def image_context(features: VisualFeatures) -> Tensor:
    """What text cross-attention looks at: V1 and CLS, normalised, without gradient, [B, N + 1, E]."""
    return torch.cat([features.patches[0], features.cls.unsqueeze(1)], dim=1).detach()


def frozen_image_context(backbone: Backbone, plain: dict[int, Tensor]) -> Tensor:
    """The same of the plain CLIP: its first level's patches and last CLS, through its own head, [B, N + 1, E]."""
    first, last = backbone.levels[0], backbone.levels[-1]
    tokens = torch.cat([plain[first][:, 1:], plain[last][:, :1]], dim=1)
    return F.normalize(backbone.project_image(tokens), dim=-1)


def frozen_patches(backbone: Backbone, surgery: dict[int, Tensor], plain: dict[int, Tensor]) -> list[Tensor]:
    """Stage 1's features of the frozen CLIP: normalised V-V patches plus normalised plain CLS, four of [B, N, E]."""
    cls = F.normalize(backbone.project_image(plain[backbone.levels[-1]][:, :1]), dim=-1)
    return [F.normalize(backbone.project_image(surgery[level][:, 1:]), dim=-1) + cls for level in backbone.levels]


class Encoding(NamedTuple):
    """What losses, maps and scores are made of.

    `patches`: what is compared with the anchors, each level [B, N, E]; `anchors` [B, E, 2], normal and abnormal;
    `cosines` [B, levels, N, 2] of both, in float32; `det` [B, E], None in Stage 1, which does not use it.
    """

    patches: list[Tensor]
    anchors: Tensor
    cosines: Tensor
    det: Tensor | None


def seen_features(
    model: CrossAttentionCLIP, features: VisualFeatures, other: Tensor | None, context: TextContext | None
) -> VisualFeatures:
    """What cross-attention looks at: `features` of the images themselves, or those of `other` images [B, 3, S, S].

    Raises ValueError where the model looks at other images and there are none.
    """
    if not model.sees_another_image:
        return features
    if other is None:
        raise ValueError("--image_context another: the model looks at another image, and none was given.")
    return model.visual(other.to(model.backbone.device, non_blocking=True), context)


@torch.no_grad()
def known_patches(
    model: CrossAttentionCLIP, images: Tensor, class_name: str, text: ClassText, precision: str = "fp32"
) -> list[Tensor]:
    """V1..V4 of images [K, 3, S, S] of a class that are known to be good, each [K * N, E]."""
    with autocast(images.device, precision):
        features = model.visual(images, text.contexts([class_name] * len(images)))
    return [level.flatten(0, 1) for level in features.patches]


def known_of(class_names: list[str], known: dict[str, list[Tensor]] | None) -> list[Tensor] | None:
    """What is known of each image's class, each level [B, K * N, E]; None where nothing is."""
    if known is None:
        return None
    return [torch.stack(levels) for levels in zip(*(known[name] for name in class_names), strict=True)]


def encode(
    model: CrossAttentionCLIP,
    images: Tensor,
    class_names: list[str],
    text: ClassText,
    precision: str = "fp32",
    known: dict[str, list[Tensor]] | None = None,
    other: Tensor | None = None,
) -> Encoding:
    """Images [B, 3, S, S] and their classes -> what Stage 2 and the test look at.

    Contexts carry no gradient: the image modules learn through the patches alone, the text modules through the prompts.
    `known`: {class: `known_patches`}, which text cross-attention in the joint space sees beside the image. `other`
    [B, 3, S, S]: what a model of `image_context` "another" looks at instead of the images.
    """
    with autocast(images.device, precision):
        text_context, backbone = text.contexts(class_names), model.backbone
        needs_frozen = model.prompts_see_image and model.config.image_context == "frozen"
        first = backbone.first_image_block(images) if needs_frozen else None
        features = model.visual(images, text_context, first)
        seen = seen_features(model, features, other, text_context)
        context = None
        if needs_frozen:
            context = frozen_image_context(backbone, backbone.plain_tokens(images, first))
        elif model.prompts_see_image:
            context = image_context(seen)
        anchors = text.anchors(class_names, context)
    patches = features.patches
    cosines = model.cosines(patches, anchors, model.neighbours(patches, seen.patches, known_of(class_names, known)))
    of_seen = cosines
    if seen is not features:
        of_seen = model.cosines(seen.patches, anchors, model.neighbours(seen.patches, seen.patches))
    return Encoding(patches, anchors, cosines, model.detection(features.det, seen.patches, of_seen))


class Sight(NamedTuple):
    """What Stage 1 sees of images; nothing of it trains there.

    `patches`: each level [B, N, E]; `context` [B, N + 1, E], None where the prompts see no image; `neighbours`
    [B, levels, N], None without text cross-attention in the joint space.
    """

    patches: list[Tensor]
    context: Tensor | None
    neighbours: Tensor | None


@torch.no_grad()
def see_stage1(
    model: CrossAttentionCLIP,
    images: Tensor,
    class_names: list[str],
    text: ClassText,
    features: str,
    vv_start: int,
    vv_across_batch: bool,
    precision: str = "fp32",
    other: Tensor | None = None,
    of_batch: Callable[[Tensor], Tensor] = as_is,
) -> Sight:
    """Images [B, 3, S, S] and their classes -> what Stage 1 sees of them; `other` as in `encode`.

    `features`: "frozen" gives the plain CLIP's features with V-V attention, as the base model trains; "adapted" V1..V4
    of the trained image side; "projectors" the plain CLIP's tokens through the trained projectors. Passes that neither
    the features nor the image context need are left out. `of_batch` as in `vv_attention`, where only a part of a batch
    is here. Raises ValueError for other `features`.
    """
    if features not in STAGE1_FEATURES:
        raise ValueError(f"Stage 1's features '{features}': expected {', '.join(STAGE1_FEATURES)}.")
    backbone, sees_image = model.backbone, model.text_cross_attn is not None
    needs_frozen = sees_image and model.config.image_context == "frozen"
    needs_visual = features == "adapted" or (sees_image and not needs_frozen)
    needs_plain = features != "adapted" or needs_frozen
    with autocast(images.device, precision):
        first = backbone.first_image_block(images) if needs_plain else None
        visual = seen = None
        if needs_visual:
            text_context = text.contexts(class_names)
            visual = model.visual(images, text_context, first)
            seen = seen_features(model, visual, other, text_context)
        plain: dict[int, Tensor] = {}
        if features == "frozen":
            surgery, plain = backbone.vv_tokens(images, vv_start, vv_across_batch, of_batch, first)
            patches = frozen_patches(backbone, surgery, plain)
        elif needs_plain:
            plain = backbone.plain_tokens(images, first)
        if features == "projectors":
            patches = model.project_levels(plain)
        elif features == "adapted" and visual is not None:
            patches = visual.patches
        context = None
        if needs_frozen:
            context = frozen_image_context(backbone, plain)
        elif model.prompts_see_image and seen is not None:
            context = image_context(seen)
    neighbours = None
    if visual is not None and seen is not None:
        neighbours = model.neighbours(visual.patches, seen.patches)
    return Sight(patches, context, neighbours)


def encode_sight(
    model: CrossAttentionCLIP, sight: Sight, class_names: list[str], text: ClassText, precision: str = "fp32"
) -> Encoding:
    """What Stage 1 sees of images, and their classes -> what its losses are made of."""
    with autocast(sight.patches[0].device, precision):
        anchors = text.anchors(class_names, sight.context)
    return Encoding(sight.patches, anchors, model.cosines(sight.patches, anchors, sight.neighbours), None)


def on_grid(cosines: Tensor) -> Tensor:
    """Of one level, [B, N, 2] -> on the square patch grid, [B, 2, h, w]."""
    return cosines.transpose(1, 2).unflatten(2, (int(cosines.shape[1] ** 0.5), -1))


def resize_map(maps: Tensor, size: int) -> Tensor:
    """[B, C, h, w] -> [B, C, size, size], bilinear with aligned corners."""
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=True)


def focal_loss(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Mean of -(1 - p)^2 log p, p the probability of the true class; [B, 2, S, S] and [B, 1, S, S] of 0 and 1.

    As published: the one-hot target is clamped to [1e-5, 1 - 1e-5], and 1e-5 is added to p.
    """
    target = torch.cat([1 - mask, mask], dim=1).clamp(1e-5, 1 - 1e-5)
    p = (target * probabilities).sum(dim=1) + 1e-5
    return (-((1 - p) ** 2) * p.log()).mean()


def dice_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """Mean over images of 1 - (2 sum(p m) + 1) / (sum p + sum m + 1); both [B, S, S]."""
    p, m = probability.flatten(1), mask.flatten(1)
    return (1 - (2 * (p * m).sum(dim=1) + 1) / (p.sum(dim=1) + m.sum(dim=1) + 1)).mean()


class Part(NamedTuple):
    """A part of a batch whose other parts are elsewhere, or come later; the losses of all parts add up to the batch's.

    `images`: its share of the images; `masks`: of those with a mask, 1 where there are none; `total`: the sum of
    a number over all parts, without gradient.
    """

    images: float = 1.0
    masks: float = 1.0
    total: Callable[[Tensor], Tensor] = as_is


WHOLE = Part()
# The segmentation losses of a level.
LEVEL_LOSSES = ("focal", "dice_normal", "dice_abnormal")


def segmentation_terms(cosines: Tensor, scale: Tensor, batch: dict, part: Part = WHOLE) -> dict[str, Tensor]:
    """Focal and both dice losses of each level, {"focal_1": ..., "dice_normal_1": ..., "dice_abnormal_1": ..., ...}.

    `cosines` [B, levels, N, 2]. Anomalous images without a mask (`has_mask`, on the CPU) are left out; empty where no
    image of the batch has one, zeros where those that have one are in other parts.
    """
    rows = batch["has_mask"].nonzero().flatten()
    mask = batch["mask"]
    if len(rows) < len(mask):
        index = index_on(mask.device, rows)
        cosines, mask = cosines[index], mask[index]
    terms: dict[str, Tensor] = {}
    if not len(rows) and part.masks:
        return terms
    for number, level in enumerate(cosines.unbind(dim=1), start=1):
        if len(rows):
            # Maps of the images' size are computed anew in the backward pass: of all levels they would fill memory.
            losses = checkpoint(level_losses, level, scale, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            losses = dict.fromkeys(LEVEL_LOSSES, level.new_zeros(()))
        terms |= {f"{name}_{number}": part.masks * loss for name, loss in losses.items()}
    return terms


def level_losses(cosines: Tensor, scale: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Focal and both dice losses of one level: `cosines` [B, N, 2], `mask` [B, 1, S, S] of 0 and 1."""
    probabilities = resize_map(scale * on_grid(cosines), mask.shape[-1]).softmax(dim=1)
    found = [focal_loss(probabilities, mask), dice_loss(probabilities[:, 0], 1 - mask[:, 0])]
    found.append(dice_loss(probabilities[:, 1], mask[:, 0]))
    return dict(zip(LEVEL_LOSSES, found, strict=True))


def stage1_loss(
    encoding: Encoding, scale: Tensor, batch: dict, levels: str, norm_weight: float, part: Part = WHOLE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 1's loss and its terms: segmentation, and `norm_weight` x (mean over the batch of normal . abnormal)^2.

    `levels`: "last" trains on the last level alone, as the published code does; "all" on the sum, as the paper says.
    The terms of every level are returned in either case.
    """
    anchors, last = encoding.anchors, f"_{encoding.cosines.shape[1]}"
    terms = segmentation_terms(encoding.cosines, scale, batch, part)
    mean = part.images * (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean()
    # The square of the batch's mean: over all parts, value and gradient of these add up to its own.
    share = mean * part.total(mean.detach())
    terms["orthogonal"] = 2 * share - share.detach()
    trained = [
        term for name, term in terms.items() if name != "orthogonal" and (levels == "all" or name.endswith(last))
    ]
    return sum(trained, anchors.new_zeros(())) + norm_weight * terms["orthogonal"], terms


def stage2_loss(
    encoding: Encoding, scale: Tensor, batch: dict, det_temperature: float, part: Part = WHOLE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2's loss and its terms: segmentation at all levels, and cross-entropy of det_temperature x det . anchors.

    Published is the cross-entropy of the raw cosines, a `det_temperature` of 1.
    """
    terms = segmentation_terms(encoding.cosines, scale, batch, part)
    terms["classification"] = part.images * F.cross_entropy(
        det_temperature * detection_cosines(encoding), batch["label"]
    )
    return sum(terms.values(), encoding.anchors.new_zeros(())), terms


def detection_cosines(encoding: Encoding) -> Tensor:
    """det . anchors, [B, 2]. Raises ValueError for an encoding of Stage 1, which has no detection feature."""
    if encoding.det is None:
        raise ValueError("Stage 1 has no detection feature.")
    return (encoding.det.unsqueeze(1) @ encoding.anchors.float()).squeeze(1)


class Prediction(NamedTuple):
    """`maps` [B, S, S], higher where more anomalous, unbounded; `detection_scores` [B]; `single_scores` [B], image
    scores that need no other image. Both are in [0, 1]; open gates may bring them a little beyond.
    """

    maps: Tensor
    detection_scores: Tensor
    single_scores: Tensor


def check_grid(grid: int, domain: str) -> None:
    """Raise ValueError where the patch grid is too small for the domain's blur with reflected borders."""
    kernel = BLUR[domain][0]
    if grid <= kernel // 2:
        raise ValueError(
            f"A grid of {grid} x {grid} patches is too small for the {domain} blur of {kernel} patches: "
            f"it takes at least {kernel // 2 + 1} x {kernel // 2 + 1}. Choose a larger --img_size."
        )


def anomaly_map(cosines: Tensor, scale: Tensor, size: int, domain: str) -> Tensor:
    """Test map [B, size, size]: sum over levels of (scale * (abnormal - normal cosine) + 1) / 2, blurred and resized.

    `cosines` [B, levels, N, 2]. The published code blurs and resizes each level before the sum; both are linear, so
    once after it is the same.
    """
    over_levels = on_grid(cosines.sum(dim=1))
    summed = (scale * (over_levels[:, 1:] - over_levels[:, :1]) + cosines.shape[1]) / 2
    kernel, sigma = BLUR[domain]
    return resize_map(gaussian_blur(summed, [kernel, kernel], [sigma, sigma]), size).squeeze(1)


def single_image_scores(maps: Tensor, detection_scores: Tensor, scale: Tensor, levels: int, domain: str) -> Tensor:
    """Single-image scores [B], from maps [B, S, S] and detection scores [B].

    The published image score needs the extremes of a whole class. Here the highest map value is taken back to what it
    is made of, the mean over levels of abnormal - normal cosine, and brought from [-2, 2] to [0, 1]; the score is half
    that, half the detection score (medical: that alone), as in the published mixture.
    """
    difference = (2 * maps.amax(dim=(1, 2)) - levels) / (levels * scale)
    highest = (difference + 2) / 4
    return highest if domain == "medical" else (detection_scores + highest) / 2


@torch.no_grad()
def predict(
    model: CrossAttentionCLIP,
    images: Tensor,
    class_names: list[str],
    text: ClassText,
    precision: str = "fp32",
    known: dict[str, list[Tensor]] | None = None,
    other: Tensor | None = None,
) -> Prediction:
    """Anomaly maps and scores of images [B, 3, S, S]; all that evaluates a model calls this.

    `known` and `other` as in `encode`.
    """
    encoding = encode(model, images, class_names, text, precision, known, other)
    scale, domain, levels = model.backbone.scale, text.bank.domain, encoding.cosines.shape[1]
    maps = anomaly_map(encoding.cosines, scale, images.shape[-1], domain)
    detection_scores = (detection_cosines(encoding)[:, 1] + 1) / 2
    return Prediction(maps, detection_scores, single_image_scores(maps, detection_scores, scale, levels, domain))
