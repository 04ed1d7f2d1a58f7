"""The two cross-attentions, in two placements, and the model that adds them to AA-CLIP's base.

    joint   in the embedding space, where CLIP compares text and image: x + gate * attended
    block   after block 0 of either tower:
            x + w * out_proj(attention(q_proj(LN(x)), k_proj(LN(context)), v_proj(LN(context))))

Gates and `out_proj` start at zero: before the first step the extended model is the base model. Shapes as in
`model.adapter`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapter import AdaptedCLIP, TextContext
from model.backbone import Backbone
from model.config import ModelConfig

HEADS = 8
# The modules that train, by the names they have in checkpoints, stage by stage.
STAGE_MODULES = {"text": ("text_adapter", "text_cross_attn"), "image": ("image_adapter", "image_cross_attn")}
STAGES = tuple(STAGE_MODULES)
MODULES = tuple(name for names in STAGE_MODULES.values() for name in names)
# How many patches of its image a patch is compared with.
NEIGHBOURS = 8


class CrossAttention(nn.Module):
    """Multi-head attention of `x` [B, Q, query_width] over `context` [B, K, context_width], added to `x`.

    Layer norms have no learned parameters. No gate and no dropout. `mask` [B, K] is False where `context` is padding.
    """

    def __init__(self, query_width: int, context_width: int, inner_width: int, weight: float):
        super().__init__()
        if inner_width % HEADS:
            raise ValueError(f"Cross-attention has {HEADS} heads: a width of {inner_width} cannot be split.")
        self.weight = weight
        self.q_proj = nn.Linear(query_width, inner_width)
        self.k_proj = nn.Linear(context_width, inner_width)
        self.v_proj = nn.Linear(context_width, inner_width)
        self.out_proj = nn.Linear(inner_width, query_width)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self._heads(x, context)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=_over_heads(mask))
        return x + self.weight * self.out_proj(attended.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def attention(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much each query looks at each part of the context: mean over heads, [B, Q, K], rows that sum to 1."""
        query, key, _ = self._heads(x, context)
        # Attention gives back what each key's value is: one-hot values give the weights.
        values = torch.eye(key.shape[2], device=key.device, dtype=key.dtype).expand(*key.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(query, key, values, attn_mask=_over_heads(mask)).mean(dim=1)

    def _heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [B, heads, T, inner width / heads]."""
        if x.shape[0] != context.shape[0]:  # len() would fix the number in an exported graph
            raise ValueError(f"Each of the {len(x)} queries needs its own context, found {len(context)}.")
        context = F.layer_norm(context, context.shape[-1:])
        query = self.q_proj(F.layer_norm(x, x.shape[-1:]))
        parts = (query, self.k_proj(context), self.v_proj(context))
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)


def _over_heads(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None, :]


class CrossAttentionModule(CrossAttention):
    """Text -> image: the prompts' tokens look at the image context [B, patches + 1, E]."""

    def __init__(self, backbone: Backbone, weight: float):
        super().__init__(backbone.text_width, backbone.embed_dim, backbone.text_width, weight)


class ImageCrossAttentionModule(CrossAttention):
    """Image -> text: CLS and patch tokens look at the text context [B, P*L, D]."""

    def __init__(self, backbone: Backbone, weight: float):
        super().__init__(backbone.image_width, backbone.text_width, backbone.text_width, weight)


class Gated(nn.Module):
    """Cross-attention in the joint space: what it attends to is added to `x`, times a gate per level.

    Gates start at zero and are opened, step by step, to `weight`.
    """

    gate: Tensor

    def __init__(self, backbone: Backbone, weight: float):
        super().__init__()
        self.weight = weight
        self.register_buffer("gate", torch.zeros(len(backbone.levels)))

    def open(self, share: float) -> None:
        """Open the gates to that share of their weight."""
        self.gate.fill_(share * self.weight)


class NeighbourCrossAttention(Gated):
    """Text -> image: at each patch the normal anchor sees the patches of the same image that are most like it.

    The anchor of patch i is t + g r_i, r_i the mean of its NEIGHBOURS most similar patches: a patch that has its like
    elsewhere in the image is more normal. Where good images are known, r_i has the most similar patch of theirs added
    (https://arxiv.org/abs/2405.14529).
    """

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        """Cosines with the normal anchor `x` and what `find` gave, both [B, levels, N] -> `x` + gate * V_i . r_i."""
        return x + self.gate[:, None] * found

    def find(self, patches: list[Tensor], context: list[Tensor], known: list[Tensor] | None = None) -> Tensor:
        """How much of its like each patch finds, V_i . r_i, [B, levels, N], from V1..V4, each [B, N, E].

        r_i comes, without gradient, from `context`, V1..V4 of the image that is seen, and `known`, each [B, K, E].
        """
        found = [neighbour_cosines(*level) for level in zip(patches, context, strict=True)]
        if known is not None:
            nearest = [(level @ good.transpose(1, 2)).amax(-1) for level, good in zip(patches, known, strict=True)]
            found = [own + other for own, other in zip(found, nearest, strict=True)]
        return torch.stack(found, dim=1)

    def attention(self, x: Tensor, found: Tensor) -> Tensor:
        """What `forward` adds, before the gate: [B, levels, N]."""
        return found


def neighbour_cosines(patches: Tensor, context: Tensor) -> Tensor:
    """Mean cosine of each patch with the NEIGHBOURS most similar of the context, both [B, N, E] -> [B, N].

    The patch in its own place is left out.
    """
    cosines = patches @ context.detach().transpose(1, 2)
    itself = torch.eye(cosines.shape[1], dtype=torch.bool, device=cosines.device)
    count = min(NEIGHBOURS, cosines.shape[1] - 1)
    return cosines.masked_fill(itself, -2).topk(count, dim=-1).values.mean(dim=-1)


class DetectionCrossAttention(Gated):
    """Image -> text: the detection feature takes what the prompts find in the image.

    Per level, c_a and c_n are means of V over the patches, weighted by a softmax of `scale` times abnormal - normal
    cosine, and of its negative: det + mean over levels of g (c_a - c_n).
    """

    def forward(self, x: Tensor, patches: list[Tensor], evidence: Tensor) -> Tensor:
        """`x` [B, E], V1..V4, each [B, N, E], and `evidence` [B, levels, N] = scale (abnormal - normal) -> [B, E]."""
        found = torch.einsum("bln,blne->ble", self.attention(x, patches, evidence), torch.stack(patches, dim=1))
        return x + (self.gate[:, None] * found).mean(dim=1)

    def attention(self, x: Tensor, patches: list[Tensor], evidence: Tensor) -> Tensor:
        """How much the feature takes from each patch, [B, levels, N]; what it takes and what it gives sum to 1 each."""
        return evidence.softmax(dim=-1) - (-evidence).softmax(dim=-1)


TextKind = NeighbourCrossAttention | CrossAttentionModule
ImageKind = DetectionCrossAttention | ImageCrossAttentionModule
# {placement: what looks from text to image, what looks from image to text}
KINDS: dict[str, tuple[type[TextKind], type[ImageKind]]] = {
    "joint": (NeighbourCrossAttention, DetectionCrossAttention),
    "block": (CrossAttentionModule, ImageCrossAttentionModule),
}


class CrossAttentionCLIP(AdaptedCLIP):
    """AA-CLIP with text and image cross-attention, each of them None where `config` switches it off.

    With both off it is the base model. A module that is on needs its context: a missing one raises ValueError.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig):
        super().__init__(
            backbone,
            text_adapt_until=config.text_adapt_until,
            image_adapt_until=config.image_adapt_until,
            text_adapt_weight=config.text_adapt_weight,
            image_adapt_weight=config.image_adapt_weight,
            relu=config.relu,
            adapter_hidden=config.adapter_hidden,
        )
        self.config = config
        if config.cross_attn not in KINDS:
            raise ValueError(f"--cross_attn {config.cross_attn}: expected {' or '.join(KINDS)}.")
        if config.cross_attn == "joint" and config.image_context == "frozen":
            raise ValueError("--image_context frozen goes with --cross_attn block alone.")
        text_kind, image_kind = KINDS[config.cross_attn]
        text_weight, image_weight = config.text_cross_attn_weight, config.image_cross_attn_weight
        # What is off is not made: it would draw from the generator that the other's weights come from.
        self.text_cross_attn = text_kind(backbone, text_weight) if config.text_cross_attn else None
        self.image_cross_attn = image_kind(backbone, image_weight) if config.image_cross_attn else None

    @property
    def prompts_see_image(self) -> bool:
        """Whether the text forward needs an image context."""
        return isinstance(self.text_cross_attn, CrossAttentionModule)

    @property
    def sees_known_images(self) -> bool:
        """Whether images that are known to be good make a difference to `cosines`."""
        return isinstance(self.text_cross_attn, NeighbourCrossAttention)

    @property
    def sees_another_image(self) -> bool:
        """Whether the cross-attentions look at another image than the one that is judged."""
        return self.config.image_context == "another" and bool(self.cross_attentions())

    @property
    def image_sees_prompts(self) -> bool:
        """Whether the visual forward needs a text context."""
        return isinstance(self.image_cross_attn, ImageCrossAttentionModule)

    def neighbours(
        self, patches: list[Tensor], context: list[Tensor], known: list[Tensor] | None = None
    ) -> Tensor | None:
        """What patches find in the other two, see `NeighbourCrossAttention.find`, in float32: [B, levels, N].

        None where the model has no text cross-attention in the joint space.
        """
        if not isinstance(self.text_cross_attn, NeighbourCrossAttention):
            return None
        with torch.autocast(patches[0].device.type, enabled=False):
            patches, context = ([level.float() for level in levels] for levels in (patches, context))
            return self.text_cross_attn.find(patches, context, known and [level.float() for level in known])

    def cosines(self, patches: list[Tensor], anchors: Tensor, neighbours: Tensor | None) -> Tensor:
        """Cosines of patches, each level [B, N, E], with both anchors [B, E, 2], in float32: [B, levels, N, 2].

        Text cross-attention in the joint space adds to them what the patches found, see `neighbours`.
        """
        with torch.autocast(anchors.device.type, enabled=False):
            found = torch.stack([level.float() @ anchors.float() for level in patches], dim=1)
            if neighbours is None or not isinstance(self.text_cross_attn, NeighbourCrossAttention):
                return found
            return torch.stack([self.text_cross_attn(found[..., 0], neighbours), found[..., 1]], dim=-1)

    def detection(self, det: Tensor, patches: list[Tensor], cosines: Tensor) -> Tensor:
        """The detection feature [B, E] in float32, with what image cross-attention in the joint space adds to it.

        `patches`, each level [B, N, E], are what it looks at, `cosines` [B, levels, N, 2] those with both anchors.
        """
        det = det.float()
        if not isinstance(self.image_cross_attn, DetectionCrossAttention):
            return det
        evidence = self.backbone.scale * (cosines[..., 1] - cosines[..., 0]).detach()
        with torch.autocast(det.device.type, enabled=False):
            return self.image_cross_attn(det, [level.float() for level in patches], evidence)

    def open_gates(self, stage: str, share: float) -> None:
        """Open the gates of the stage's cross-attention to that share, where it has any."""
        for module in self.trainable(stage).values():
            if isinstance(module, Gated):
                module.open(share)

    def cross_attentions(self) -> dict[str, TextKind | ImageKind]:
        """{name: module} of the cross-attentions that are on."""
        both: dict[str, TextKind | ImageKind | None]
        both = {"text_cross_attn": self.text_cross_attn, "image_cross_attn": self.image_cross_attn}
        return {name: module for name, module in both.items() if module is not None}

    def after_image_block(self, index: int, x: Tensor, text_context: TextContext | None) -> Tensor:
        if index == 0 and isinstance(self.image_cross_attn, ImageCrossAttentionModule):
            if text_context is None:
                raise ValueError("Image cross-attention is on, so the visual forward needs a text context.")
            x = self.image_cross_attn(x, text_context.tokens, text_context.mask)
        return super().after_image_block(index, x, text_context)

    def after_text_block(self, index: int, x: Tensor, image_context: Tensor | None) -> Tensor:
        if index == 0 and isinstance(self.text_cross_attn, CrossAttentionModule):
            if image_context is None:
                raise ValueError("Text cross-attention is on, so the text forward needs an image context.")
            # All tokens of an image's prompts are queries of one attention over that image.
            x = self.text_cross_attn(x.flatten(1, 2), image_context).view_as(x)
        return super().after_text_block(index, x, image_context)

    def trainable(self, stage: str | None = None) -> dict[str, nn.Module]:
        """{name: module} of what trains, in `stage` ("text" or "image") or in both; without what is switched off."""
        names = STAGE_MODULES[stage] if stage else MODULES
        return {name: module for name in names if (module := getattr(self, name)) is not None}

    def learned(self, stage: str) -> dict[str, nn.Module]:
        """Those of the stage's modules that have weights to learn; gates are opened instead."""
        return {
            name: module
            for name, module in self.trainable(stage).items()
            if next(module.parameters(), None) is not None
        }

    def set_stage(self, stage: str | None) -> None:
        """Let the modules of `stage` have gradients, and no others."""
        self.requires_grad_(False)
        for module in self.trainable(stage).values() if stage else ():
            module.requires_grad_(True)
