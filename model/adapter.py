"""AA-CLIP's base model: residual adapters in the first blocks of a frozen CLIP, and projectors at its ends.

Reproduces https://github.com/Mwxinnn/AA-CLIP (Ma et al., CVPR 2025, arXiv 2503.06661). Shapes: B images, N sets of
P prompts (one set per class or per image), T = 1 + patches tokens (CLS first), L text tokens, W, D and E the image,
text and embedding widths.
"""

from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import Backbone, at_places, run_blocks, run_last_block

LEAK = 0.01


class Prompts(NamedTuple):
    """Prompts after the frozen text block 0: `tokens` [N, P, L, D] and EOT positions `eot` [N, P].

    `most`: tokens up to the EOT in the set that has most of them, M below.
    """

    tokens: Tensor
    eot: Tensor
    most: int

    @property
    def is_token(self) -> Tensor:
        """Where tokens are, [N, P, L]: what follows a prompt's EOT is padding."""
        return torch.arange(self.tokens.shape[2], device=self.eot.device) <= self.eot.unsqueeze(-1)

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, P, L, D] of these prompts without padding, each set of prompts as one sequence [N, M, D].

        And where in it each prompt's EOT is, [N, P], and the causal mask [N, 1, M, M], added to the scores, that keeps
        the prompts of a set apart. A set with fewer tokens than M ends with some of its padding.
        """
        is_token = self.is_token.flatten(1)
        order = torch.arange(is_token.shape[1], device=x.device)
        places = torch.where(is_token, order, order + len(order)).argsort(dim=1)[:, : self.most]
        prompt, position = places // self.tokens.shape[2], places % self.tokens.shape[2]
        seen = (prompt.unsqueeze(2) == prompt.unsqueeze(1)) & (position.unsqueeze(2) >= position.unsqueeze(1))
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, float("-inf")).unsqueeze(1)
        return at_places(x.flatten(1, 2), places), (self.eot + 1).cumsum(dim=1) - 1, mask


class TextContext(NamedTuple):
    """What image cross-attention looks at: `tokens` [B, P*L, D] and `mask` [B, P*L], False at padding."""

    tokens: Tensor
    mask: Tensor

    @classmethod
    def join(cls, prompts: Prompts) -> "TextContext":
        """All tokens of each set of prompts as one sequence, with padding."""
        return cls(prompts.tokens.flatten(1, 2), prompts.is_token.flatten(1))


class VisualFeatures(NamedTuple):
    """All that one visual forward gives.

    `patches`: V1..V4, four of [B, T-1, E], normalised; `det` [B, E], the detection feature, a mean of normalised
    vectors; `cls` [B, E], the CLS feature through CLIP's own head, normalised.
    """

    patches: list[Tensor]
    det: Tensor
    cls: Tensor


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    return layer


class SimpleAdapter(nn.Module):
    """Linear and LeakyReLU without bias, [..., width] -> [..., width]; with `hidden`, a bottleneck of that width.

    The published adapters have no bottleneck.
    """

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        widths = (width, width) if hidden is None else (width, hidden, width)
        layers = []
        for size_in, size_out in pairwise(widths):
            layers += [_xavier(nn.Linear(size_in, size_out, bias=False)), nn.LeakyReLU(LEAK)]
        self.fc = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class SimpleProj(nn.Module):
    """Linear without bias, [..., size_in] -> [..., size_out], with `relu` followed by LeakyReLU."""

    def __init__(self, size_in: int, size_out: int, relu: bool):
        super().__init__()
        layer = _xavier(nn.Linear(size_in, size_out, bias=False))
        self.fc = nn.Sequential(layer, nn.LeakyReLU(LEAK)) if relu else layer

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def adapt(x: Tensor, adapter: nn.Module, weight: float) -> Tensor:
    """w * a + (1 - w) * x, with a = adapter(x) brought to the norm of x, token by token."""
    a = adapter(x)
    a = a * x.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True)
    return weight * a + (1 - weight) * x


class AdaptedCLIP(nn.Module):
    """The base model: `text_adapter` trains in Stage 1, `image_adapter` in Stage 2, the backbone never.

    `text_adapt_until` and `image_adapt_until` are the numbers of adapted blocks, counted from the first.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        text_adapt_until: int,
        image_adapt_until: int,
        text_adapt_weight: float = 0.1,
        image_adapt_weight: float = 0.1,
        relu: bool = False,
        adapter_hidden: int | None = None,
    ):
        super().__init__()
        for name, until, blocks in (
            ("text_adapt_until", text_adapt_until, backbone.text_blocks),
            ("image_adapt_until", image_adapt_until, backbone.image_blocks),
        ):
            if not 1 <= until <= len(blocks):
                raise ValueError(f"--{name} {until}: expected 1 to {len(blocks)}, the blocks of {backbone.model_name}.")
        self.backbone = backbone
        self.text_adapt_weight = text_adapt_weight
        self.image_adapt_weight = image_adapt_weight
        text_width, image_width, embed = backbone.text_width, backbone.image_width, backbone.embed_dim
        self.text_adapter = nn.ModuleList(SimpleAdapter(text_width, adapter_hidden) for _ in range(text_adapt_until))
        self.text_adapter.append(SimpleProj(text_width, embed, relu=True))
        self.image_adapter = nn.ModuleDict(
            {
                "layer_adapters": nn.ModuleList(
                    SimpleAdapter(image_width, adapter_hidden) for _ in range(image_adapt_until)
                ),
                "seg_proj": nn.ModuleList(SimpleProj(image_width, embed, relu) for _ in backbone.levels),
                "det_proj": SimpleProj(image_width, embed, relu),
            }
        )

    def visual(
        self, images: Tensor, text_context: TextContext | None = None, first: Tensor | None = None
    ) -> VisualFeatures:
        """The visual forward: normalised pixels [B, 3, S, S] -> V1..V4, det and CLS.

        `first`: the tokens after the frozen block 0, where they are known.
        """
        backbone = self.backbone
        # Inside the call, so that nothing holds these tokens while the blocks run.
        x, levels = run_blocks(
            backbone.image_blocks,
            self.after_image_block(0, backbone.first_image_block(images) if first is None else first, text_context),
            start=1,
            after_block=lambda index, tokens: self.after_image_block(index, tokens, text_context),
            keep=backbone.levels,
            recompute=backbone.recompute,
        )
        last = backbone.clip.visual.ln_post(x[:, 1:])
        det = F.normalize(self.image_adapter["det_proj"](last), dim=-1).mean(dim=1)
        cls = F.normalize(backbone.project_image(x[:, 0]), dim=-1)
        return VisualFeatures(self.project_levels(levels), det, cls)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have the visual forward compiled from its next call on; the arguments are those of `torch.compile`.

        The text forward is not: it is short, and its shapes change with the classes of a batch.
        """
        self.visual = torch.compile(self.visual, *args, **kwargs)  # type: ignore[method-assign]

    def after_image_block(self, index: int, x: Tensor, text_context: TextContext | None) -> Tensor:
        """What follows ViT block `index`, [B, T, W] -> [B, T, W]: its adapter, where it has one."""
        return self.adapt_image(index, x)

    def adapt_image(self, index: int, x: Tensor) -> Tensor:
        """Tokens [..., W] through the adapter of ViT block `index`; unchanged where the block has none."""
        adapters = cast(nn.ModuleList, self.image_adapter["layer_adapters"])
        return adapt(x, adapters[index], self.image_adapt_weight) if index < len(adapters) else x

    def project_levels(self, levels: dict[int, Tensor]) -> list[Tensor]:
        """Tokens {level: [B, T, W]} through `ln_post` and the trained projectors -> V1..V4, each [B, T-1, E]."""
        ln_post = self.backbone.clip.visual.ln_post
        projectors = cast(nn.ModuleList, self.image_adapter["seg_proj"])
        return [
            F.normalize(proj(ln_post(levels[level][:, 1:])), dim=-1)
            for level, proj in zip(self.backbone.levels, projectors, strict=True)
        ]

    def text(self, prompts: Prompts, image_context: Tensor | None = None) -> Tensor:
        """The text forward: prompts after block 0 -> embeddings [N, P, E], not normalised."""
        x, ends, mask = prompts.pack(self.after_text_block(0, prompts.tokens, image_context))
        blocks = self.backbone.text_blocks
        last = len(blocks) - 1
        x = self.backbone.run_text_blocks(
            x, mask, 1, last, lambda index, tokens: self.after_text_block(index, tokens, image_context)
        )
        # Of the last block the EOT tokens alone are looked at.
        of_ends = mask.gather(2, ends[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))
        x = run_last_block(blocks[last], x, at_places(x, ends), of_ends)
        x = self.after_text_block(last, x, image_context)
        return self.text_adapter[-1](self.backbone.clip.ln_final(x))

    def after_text_block(self, index: int, x: Tensor, image_context: Tensor | None) -> Tensor:
        """What follows text block `index`: its adapter, where it has one. After block 0, `x` is [N, P, L, D]."""
        return self.adapt_text(index, x)

    def adapt_text(self, index: int, x: Tensor) -> Tensor:
        """Tokens [..., D] through the adapter of text block `index`; unchanged where the block has none."""
        adapters = self.text_adapter[:-1]  # the last one is the projector
        return adapt(x, adapters[index], self.text_adapt_weight) if index < len(adapters) else x

    @torch.no_grad()
    def context_prompts(self, prompts: Prompts) -> Prompts:
        """The prompts after block 0 and its adapter, without any image in them: the text context, prompt by prompt."""
        return prompts._replace(tokens=self.adapt_text(0, prompts.tokens))
