"""The frozen CLIP: its configuration and weight files (by open_clip), and one walk through the blocks of a tower.

Shapes: B images, T = 1 + patches tokens (CLS first), W the image width, N prompts, L text tokens, D the text
width, E the embedding width. Blocks count from 0; a level is a number of blocks done, so level 6 is the
output of block 5.
"""

import logging
import math
from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import DEFAULT_MODEL
from model.weights import check_state, find_weights, read_weights, weights_sha256

logger = logging.getLogger(__name__)

# AA-CLIP adapts the 336 px model at 518 px (37 x 37 patches); every other model keeps the size of its configuration.
ADAPTED_SIZES = {DEFAULT_MODEL: 518}
# Side of an image, px: eight times what AA-CLIP uses, and 85,000 patches.
MOST_PIXELS = 4096
# Keys of open_clip's configurations of text towers with another mask, pooling or tokenizer.
OTHER_TEXT_TOWERS = {"hf_model_name", "hf_tokenizer_name", "no_causal_mask", "pool_type", "embed_cls", "text_arch"}
# The one weight whose shape depends on the size of images.
IMAGE_POSITIONS = "visual.positional_embedding"

open_clip.add_model_config(Path(__file__).parent / "configs")


def clip_config(model_name: str, img_size: int | None = None, quick_gelu: bool = False) -> dict:
    """open_clip's configuration of `model_name` at `img_size` pixels (None: 518 for ViT-L-14-336, else its own).

    The activation is plain GELU unless `quick_gelu`: AA-CLIP built OpenAI's ViT-L-14-336 so, although OpenAI
    trained it with quick-GELU, and every published base was adapted on that backbone.
    Raises ValueError for an unknown name and for a size that is no multiple of the patch.
    """
    # Asked first: open_clip would look for a name with a scheme ("hf-hub:...") on the network.
    if model_name not in open_clip.list_models():
        raise ValueError(
            f"--model_name {model_name}: open_clip has no such model. Choose {DEFAULT_MODEL}, demo, or another "
            f"ViT of open_clip.list_models()."
        )
    config = open_clip.get_model_config(model_name)
    vision = config.get("vision_cfg", {})
    # Sound models, captioners and the like have keys that CLIP does not take; a ResNet's patch size is null.
    other = config.keys() - signature(open_clip.CLIP).parameters.keys()
    if other or config["text_cfg"].keys() & OTHER_TEXT_TOWERS or not vision.get("patch_size"):
        raise ValueError(
            f"--model_name {model_name}: only OpenAI's architecture is supported, a ViT and a causal text transformer."
        )
    size = img_size or ADAPTED_SIZES.get(model_name, vision["image_size"])
    patch = vision["patch_size"]
    if size > MOST_PIXELS:
        raise ValueError(f"--img_size {size}: expected at most {MOST_PIXELS} px.")
    if size < patch or size % patch:
        lower = max(size // patch, 1) * patch
        raise ValueError(
            f"--img_size {size}: expected a multiple of {model_name}'s patch of {patch} px, "
            f"for instance {lower} or {lower + patch}."
        )
    config["quick_gelu"] = quick_gelu
    vision["image_size"] = size
    return config


def default_adapters(config: dict) -> dict[str, int]:
    """How many blocks of each tower AA-CLIP adapts, from the first: a quarter of them, as 6 of 24 and 3 of 12."""
    return {
        f"{tower}_adapt_until": max(1, config[f"{key}_cfg"]["layers"] // 4)
        for tower, key in (("text", "text"), ("image", "vision"))
    }


def self_attention(attention: nn.MultiheadAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-head self-attention of `x` [B, T, W] with CLIP's own weights; `mask` [T, T], or one for each of the batch,
    [B, 1, T, T], is added to the scores.

    The projections are called directly: `nn.MultiheadAttention` takes another path where gradients are off, so
    its results differ between grad modes, and it computes gradients of frozen weights' inputs more slowly.
    open_clip 4 has a class of its own instead, with the same parameters under the same names.
    """
    parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    query, key, value = (_split_heads(part, attention.num_heads) for part in parts)
    return attention.out_proj(_join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


def as_is(x: Tensor) -> Tensor:
    """`x`: what the whole batch has, where all of it is here."""
    return x


def vv_attention(
    attention: nn.MultiheadAttention, x: Tensor, across_batch: bool, of_batch: Callable[[Tensor], Tensor] = as_is
) -> Tensor:
    """softmax(v v^T / sqrt(d)) v per head, d the head's width, on `x` [B, T, W] (AA-CLIP's "surgery").

    `across_batch` attends to the same position in the other images of the batch, as the published code does (it
    reads [T, B, W] as [B, T, W]); otherwise each token attends to the tokens of its own image. `of_batch` gives the
    values of the whole batch, in any order, from those of the part of it that is here.
    """
    width = x.shape[-1]
    value = F.linear(x, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    if not across_batch:
        value = _split_heads(value, attention.num_heads)
        return attention.out_proj(_join_heads(F.scaled_dot_product_attention(value, value, value)))
    query, key = (_split_heads(part.transpose(0, 1), attention.num_heads) for part in (value, of_batch(value)))
    x = _join_heads(F.scaled_dot_product_attention(query, key, key))
    return attention.out_proj(x.transpose(0, 1))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # B T W -> B heads T W/heads


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """Tokens [N, L, W] at some places [N, P] of their sequences, [N, P, W]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    attend: Callable[[nn.MultiheadAttention, Tensor], Tensor] = self_attention,
    start: int = 0,
    stop: int | None = None,
    after_block: Callable[[int, Tensor], Tensor] | None = None,
    keep: Iterable[int] = (),
    recompute: bool = False,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Walk `x` [B, T, W] through `blocks[start:stop]`; every forward pass of the program goes through here.

    `after_block(i, x)` replaces the output of block i (adapters, cross-attention). With `recompute` the backward pass
    computes each block anew from its input, which is all that is kept of it. Returns the last tokens and
    {level: tokens} for the levels of `keep` from `start` on, taken after `after_block`.
    """

    def walk(index: int, x: Tensor) -> Tensor:
        block: ResidualAttentionBlock = blocks[index]
        x = x + block.ls_1(attend(block.attn, block.ln_1(x)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return x if after_block is None else after_block(index, x)

    kept = {start: x} if start in keep else {}
    for index in range(start, len(blocks) if stop is None else stop):
        if recompute and x.requires_grad:  # a frozen block that nothing trained precedes keeps nothing
            x = checkpoint(walk, index, x, use_reentrant=False, preserve_rng_state=False)  # nothing draws
        else:
            x = walk(index, x)
        if index + 1 in keep:
            kept[index + 1] = x
    return x, kept


def run_last_block(block: ResidualAttentionBlock, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a block makes of some `tokens` [B, Q, W] of `x` [B, T, W], where nothing looks at the others afterwards.

    `mask` [B, 1, Q, T] is added to the scores.
    """
    attention, width = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = F.linear(block.ln_1(tokens), weight[:width], bias[:width])
    key, value = F.linear(block.ln_1(x), weight[width:], bias[width:]).chunk(2, dim=-1)
    query, key, value = (_split_heads(part, attention.num_heads) for part in (query, key, value))
    seen = _join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    tokens = tokens + block.ls_1(attention.out_proj(seen))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


class Backbone(nn.Module):
    """A frozen CLIP in eval mode. Every size the program uses is read from here.

    `sha256` names the weights (None where they are known to nobody, as in tests). `recompute`, which may be switched
    at any time, trades time for memory in backward passes, as `run_blocks` says; results are the same.
    """

    def __init__(self, clip: open_clip.CLIP, model_name: str, quick_gelu: bool = False, sha256: str | None = None):
        super().__init__()
        blocks = [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]
        if not isinstance(clip.visual, VisionTransformer) or clip.visual.attn_pool is not None:
            raise ValueError(f"{model_name}: expected open_clip's VisionTransformer with a class token.")
        if len(clip.transformer.resblocks) < 2:
            raise ValueError(f"{model_name}: expected at least two text blocks, one of them before what is adapted.")
        activation = QuickGELU if quick_gelu else nn.GELU
        for block in blocks:
            if type(block) is not ResidualAttentionBlock or type(block.mlp.gelu) is not activation:
                raise ValueError(f"{model_name}: expected residual attention blocks with {activation.__name__}.")
        self.clip = clip.eval().requires_grad_(False)
        self.model_name, self.quick_gelu, self.sha256 = model_name, quick_gelu, sha256
        self.recompute = False
        self.image_blocks = clip.visual.transformer.resblocks
        self.text_blocks = clip.transformer.resblocks
        self.img_size = clip.visual.image_size[0]
        self.grid = clip.visual.grid_size[0]
        self.image_width = clip.visual.ln_post.normalized_shape[0]
        self.text_width = clip.ln_final.normalized_shape[0]
        self.embed_dim = clip.visual.output_dim
        depth = len(self.image_blocks)
        self.levels = tuple(depth * k // 4 for k in range(1, 5))
        self.default_vv_start = 5 * depth // 24
        self._tokenizer = open_clip.get_tokenizer(model_name)

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: the backbone is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.logit_scale.device

    @property
    def scale(self) -> Tensor:
        """Temperature of similarity maps: CLIP's own, at most 100 (exactly 100 for OpenAI's models)."""
        return self.clip.logit_scale.exp().clamp(max=100.0)

    # image tower

    def embed_images(self, images: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> tokens [B, T, W] before block 0."""
        expected = (3, self.img_size, self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: expected [B, {', '.join(map(str, expected))}], found {list(images.shape)}.")
        # In float32 also under autocast: small terms would be rounded away in the residual stream.
        return self.clip.visual._embeds(images).float()

    def project_image(self, tokens: Tensor) -> Tensor:
        """CLIP's own head on any image tokens: ln_post and projection, [..., W] -> [..., E], not normalised."""
        return self.clip.visual.ln_post(tokens) @ self.clip.visual.proj

    def first_image_block(self, images: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> tokens [B, T, W] after block 0, the same with adapters and without."""
        return run_blocks(self.image_blocks, self.embed_images(images), stop=1)[0]

    @torch.no_grad()
    def plain_tokens(self, images: Tensor, first: Tensor | None = None) -> dict[int, Tensor]:
        """{level: [B, T, W]} of CLIP as it is, at the four levels; `first`: the tokens after block 0, where known."""
        first = self.first_image_block(images) if first is None else first
        return run_blocks(self.image_blocks, first, start=1, keep=self.levels)[1]

    @torch.no_grad()
    def vv_tokens(
        self,
        images: Tensor,
        vv_start: int,
        across_batch: bool = True,
        of_batch: Callable[[Tensor], Tensor] = as_is,
        first: Tensor | None = None,
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Tokens at the four levels with V-V attention from block `vv_start` on, and those of CLIP as it is.

        Both walks share the blocks before `vv_start`; `first` as in `plain_tokens`, the rest as in `vv_attention`.
        Returns two dicts {level: [B, T, W]}; of CLIP as it is, the last level has CLS alone, [B, 1, W], which is all
        that is looked at.
        """
        blocks, last = self.image_blocks, len(self.image_blocks) - 1

        def attend(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
            return vv_attention(attention, x, across_batch, of_batch)

        if first is None or vv_start == 0:
            x, done = self.embed_images(images), 0
        else:
            x, done = first, 1
        x, shared = run_blocks(blocks, x, start=done, stop=vv_start, keep=self.levels)
        _, surgery = run_blocks(blocks, x, attend, start=vv_start, keep=self.levels)
        if vv_start > last:  # no block has V-V attention
            return shared, shared
        x, plain = run_blocks(blocks, x, start=vv_start, stop=last, keep=self.levels)
        return {**shared, **surgery}, {**shared, **plain, last + 1: run_last_block(blocks[last], x, x[:, :1])}

    # text tower

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [N, L], cropped to the longest prompt: what follows the last EOT changes nothing.

        Raises ValueError for a prompt over the context length, which CLIP's tokenizer would cut silently.
        """
        limit = self.clip.context_length
        for prompt in prompts:
            length = len(self._tokenizer.encode(prompt)) + 2  # start and end of text
            if length > limit:
                raise ValueError(
                    f"A prompt has {length} tokens, and CLIP reads at most {limit}: '{prompt}'. Shorten the class name."
                )
        ids = self._tokenizer(prompts, context_length=limit)
        return ids[:, : int(ids.argmax(dim=-1).max()) + 1].to(self.device)

    def token_texts(self, prompt: str) -> list[str]:
        """What each token of a prompt stands for, from start to end of text."""
        pieces = [self._tokenizer.decode([token]).strip() for token in self._tokenizer.encode(prompt)]
        return ["<start>", *pieces, "<end>"]

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that this CLIP was never trained on: their embedding is zero (no one's in OpenAI's)."""
        known = self.clip.token_embedding.weight.any(dim=1)
        return [word for word in text.split() if not known[self._tokenizer.encode(word)].all()]

    def causal_mask(self, length: int) -> Tensor:
        """CLIP's additive causal mask for prompts cropped to `length` tokens, [L, L]."""
        return self.clip.attn_mask[:length, :length]

    @torch.no_grad()
    def first_text_block(self, ids: Tensor) -> Tensor:
        """Token ids [N, L] -> tokens [N, L, D] after text block 0."""
        length = ids.shape[1]
        x = self.clip.token_embedding(ids) + self.clip.positional_embedding[:length]
        return self.run_text_blocks(x, stop=1)

    def run_text_blocks(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        after_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Tokens [N, L, D] through the text blocks `start` to `stop` (not included).

        `mask` [L, L] or [N, 1, L, L] is added to the scores; without it CLIP's causal one.
        """
        added = self.causal_mask(x.shape[1]) if mask is None else mask

        def attend(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
            return self_attention(attention, x, added)

        return run_blocks(self.text_blocks, x, attend, start, stop, after_block, recompute=self.recompute)[0]

    def end_of_text(self, x: Tensor, eot: Tensor) -> Tensor:
        """Tokens [N, L, D] after the last block, EOT positions [N, P] -> `ln_final` at the EOT tokens, [N, P, D]."""
        return self.clip.ln_final(at_places(x, eot))


def load_backbone(
    model_name: str = DEFAULT_MODEL,
    img_size: int | None = None,
    quick_gelu: bool = False,
    clip_weights: str | Path | None = None,
) -> Backbone:
    """Build `model_name` at `img_size` px with its weights; positional embeddings are resized bicubic, antialiased.

    Raises ValueError (configuration, or a weight that is missing, unknown or of another shape) or FileNotFoundError.
    """
    config = clip_config(model_name, img_size, quick_gelu)
    path = find_weights(model_name, clip_weights)
    logger.info("CLIP weights: %s", path)
    state = read_weights(path)
    with torch.device("meta"):
        clip = open_clip.CLIP(**config)
    expected, where = clip.state_dict(), f"{path}: not the weights of {model_name}; it"
    check_state(expected, state, where, but=IMAGE_POSITIONS)
    _check_positions(expected[IMAGE_POSITIONS], state[IMAGE_POSITIONS], where)
    state = {name: value.float() for name, value in state.items()}
    sha256 = weights_sha256(state)
    resize_pos_embed(state, clip)
    clip.load_state_dict(state, assign=True)
    clip.attn_mask = _causal_mask(clip.context_length)  # a buffer outside the state dict
    return Backbone(clip, model_name, quick_gelu, sha256)


def empty_backbone(
    model_name: str = DEFAULT_MODEL, img_size: int | None = None, quick_gelu: bool = False, device: str = "meta"
) -> Backbone:
    """The backbone without its weights, for counting what it has and does; on the meta device it takes no memory."""
    with torch.device(device):
        return Backbone(open_clip.CLIP(**clip_config(model_name, img_size, quick_gelu)), model_name, quick_gelu)


def _causal_mask(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu_(1)


def _check_positions(expected: Tensor, found: Tensor, where: str) -> None:
    """Raise ValueError, beginning with `where`, for positions [1 + n * n, W] that are not of a square of patches."""
    patches = len(found) - 1 if found.ndim == 2 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches or found.shape[1] != expected.shape[1]:
        raise ValueError(
            f"{where} holds '{IMAGE_POSITIONS}' of shape {list(found.shape)}; expected [1 + patches, "
            f"{expected.shape[1]}] of a square of patches."
        )
