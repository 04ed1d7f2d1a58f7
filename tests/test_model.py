"""The extension starts as the base model, sees what it should, and keeps the images of a batch apart."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.standin import standin_backbone, standin_images, standin_masks
from forward_utils_cross_attention import (
    STAGE1_FEATURES,
    ClassText,
    Encoding,
    PromptBank,
    encode,
    image_context,
    known_patches,
    make_anchors,
    predict,
    see_stage1,
    segmentation_terms,
    stage1_loss,
    stage2_loss,
)
from model.adapter import SimpleAdapter, SimpleProj, TextContext
from model.adapter_cross_attention import NEIGHBOURS, NeighbourCrossAttention
from model.config import PLACEMENTS, new_extension
from tests.conftest import encode_stage1, make_model, move_cross_attention
from utils.training.measures import added_terms

DESCRIPTIONS = {"nut": "metal nut which has four notched edges", "candle": "candle", "tile": "speckled tile surface"}
BOTH = {"text_cross_attn": True, "image_cross_attn": True}


def batch_of(count: int, size: int) -> dict:
    return {
        "mask": standin_masks(count, size),
        "label": torch.tensor([1] + [0] * (count - 1)),
        "has_mask": torch.ones(count, dtype=torch.bool),
    }


MODELS = ["demo", pytest.param("ViT-L-14-336", marks=pytest.mark.vit_l)]


@pytest.fixture(scope="module", params=MODELS)
def any_backbone(request, backbone):
    return backbone if request.param == "demo" else standin_backbone(request.param, 112)


@pytest.fixture(scope="module", params=PLACEMENTS)
def pair(request, any_backbone):
    """A base model and the same one with both cross-attentions at their zero start, and prompts for them."""
    backbone = any_backbone
    base, extended = make_model(backbone), make_model(backbone, **new_extension(request.param))
    for name in ("text_adapter", "image_adapter"):
        getattr(extended, name).load_state_dict(getattr(base, name).state_dict())
    return base, extended, PromptBank(backbone, DESCRIPTIONS, "industrial")


CLASSES = ["candle", "nut"]


def test_zero_start_adds_exactly_nothing(pair):
    base, extended, bank = pair
    images = standin_images(2, base.backbone.img_size)
    text = ClassText(extended, bank, fixed=False)
    context = text.contexts(CLASSES)
    features, plain = extended.visual(images, context), base.visual(images)
    prompts = bank.select(bank.prompts, bank.numbers(CLASSES))
    if extended.config.cross_attn == "block":
        tokens, queries = base.backbone.embed_images(images), prompts.tokens.flatten(1, 2)
        assert (extended.image_cross_attn(tokens, context.tokens, context.mask) - tokens == 0).all()
        assert (extended.text_cross_attn(queries, image_context(features)) - queries == 0).all()
    else:
        assert context is None
    for found, expected in zip(features.patches, plain.patches, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(features.det, plain.det) and torch.equal(features.cls, plain.cls)
    # The base reads the prompts in the same batches here, image by image, or class by class.
    anchors = make_anchors(base.text(prompts))
    if not extended.prompts_see_image:
        anchors = ClassText(base, bank, fixed=False).anchors(CLASSES, None)
    assert torch.equal(text.anchors(CLASSES, image_context(features)), anchors)
    # Equal features and anchors give equal maps, scores and losses; here through the whole path.
    batch, scale = batch_of(2, base.backbone.img_size), base.backbone.scale
    encoded = encode(extended, images, CLASSES, text)
    cosines = base.cosines(plain.patches, anchors, None)
    expected = Encoding(plain.patches, anchors, cosines, base.detection(plain.det, plain.patches, cosines))
    assert torch.equal(stage2_loss(encoded, scale, batch, 1)[0], stage2_loss(expected, scale, batch, 1)[0])


def test_zero_start_gives_the_base_models_losses_and_maps(pair):
    base, extended, bank = pair
    images, size = standin_images(2, base.backbone.img_size), base.backbone.img_size
    batch, scale = batch_of(2, size), base.backbone.scale
    losses, predictions = [], []
    for model in (base, extended):
        vv_start = model.backbone.default_vv_start
        model.set_stage("text")
        first = encode_stage1(model, images, CLASSES, ClassText(model, bank, fixed=False), "frozen", vv_start, True)
        model.set_stage("image")
        text = ClassText(model, bank, fixed=True)
        second = encode(model, images, CLASSES, text)
        losses.append((stage1_loss(first, scale, batch, "all", 0.1)[0], stage2_loss(second, scale, batch, 1)[0]))
        predictions.append(predict(model, images, CLASSES, text))
    for expected, found in zip(*losses, strict=True):
        assert abs(expected.item() - found.item()) <= 1e-5
    spread = predictions[0].maps.max() - predictions[0].maps.min()
    assert (predictions[0].maps - predictions[1].maps).abs().max() <= 1e-4 * spread
    assert torch.allclose(predictions[0].detection_scores, predictions[1].detection_scores, atol=1e-5)


def test_a_few_steps_move_both_modules_and_the_output(backbone):
    model = make_model(backbone, **BOTH)
    bank, images, batch = PromptBank(backbone, DESCRIPTIONS, "industrial"), standin_images(2, 64), batch_of(2, 64)
    before = predict(model, images, CLASSES, ClassText(model, bank, fixed=True))
    for stage in ("text", "image"):
        model.set_stage(stage)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        text = ClassText(model, bank, fixed=stage == "image")
        for _ in range(3):
            if stage == "text":
                encoded = encode_stage1(model, images, CLASSES, text, "frozen", backbone.default_vv_start, True)
                loss, _ = stage1_loss(encoded, backbone.scale, batch, "all", 0.1)
            else:
                loss, _ = stage2_loss(encode(model, images, CLASSES, text), backbone.scale, batch, 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = predict(model, images, CLASSES, ClassText(model, bank, fixed=True))
    assert not torch.equal(before.maps, after.maps) and not torch.equal(before.detection_scores, after.detection_scores)
    for module in (model.text_cross_attn, model.image_cross_attn):
        assert module.out_proj.weight.abs().max() > 0
        weight = module.out_proj.weight.detach().clone()
        module.out_proj.weight.data.zero_()
        bias = module.out_proj.bias.detach().clone()
        module.out_proj.bias.data.zero_()
        without = predict(model, images, CLASSES, ClassText(model, bank, fixed=True))
        assert not torch.equal(without.maps, after.maps)
        module.out_proj.weight.data.copy_(weight)
        module.out_proj.bias.data.copy_(bias)


@pytest.mark.parametrize(("placement", "context"), [("joint", "adapted"), ("block", "adapted"), ("block", "frozen")])
def test_images_of_a_batch_do_not_meet(backbone, placement, context):
    model = make_model(backbone, image_context=context, **new_extension(placement))
    move_cross_attention(model)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    images = standin_images(8, 64)
    names = [list(DESCRIPTIONS)[i % 3] for i in range(8)]
    with torch.no_grad():
        anchors = encode(model, images, names, text).anchors
    together = predict(model, images, names, text)
    if placement == "block":
        assert (anchors[0] - anchors[3]).abs().max() > 1e-3  # one class, two images: the anchors see the image
    for i in range(8):
        one = slice(i, i + 1)
        with torch.no_grad():
            alone_anchors = encode(model, images[one], names[one], text).anchors
        alone = predict(model, images[one], names[one], text)
        spread = alone.maps.max() - alone.maps.min()
        assert (anchors[one] - alone_anchors).abs().max() <= 1e-6
        assert (together.maps[one] - alone.maps).abs().max() <= 1e-4 * spread
        assert (
            together.detection_scores[one] - alone.detection_scores
        ).abs().max() <= 1e-4 * together.detection_scores.std()


def test_padding_is_not_attended_to(backbone):
    model = make_model(backbone, **BOTH)
    move_cross_attention(model)
    bank = PromptBank(backbone, DESCRIPTIONS, "industrial")
    prompts = bank.select(bank.prompts, bank.numbers(["candle"]))
    padded = prompts._replace(tokens=torch.nn.functional.pad(prompts.tokens, (0, 0, 0, 9), value=7.0))
    images = standin_images(1, 64)
    with torch.no_grad():
        found = [model.visual(images, TextContext.join(model.context_prompts(p))) for p in (prompts, padded)]
        context = image_context(found[0])
        anchors = [make_anchors(model.text(p, context)) for p in (prompts, padded)]
    assert torch.allclose(found[0].patches[3], found[1].patches[3], atol=1e-5)
    assert torch.allclose(*anchors, atol=1e-5)


def test_a_missing_context_is_an_error(backbone):
    model = make_model(backbone, **BOTH)
    bank = PromptBank(backbone, DESCRIPTIONS, "industrial")
    with pytest.raises(ValueError, match="needs a text context"):
        model.visual(standin_images(1, 64))
    with pytest.raises(ValueError, match="needs an image context"):
        model.text(bank.prompts)
    with pytest.raises(ValueError, match="needs its own context"):
        model.text(bank.prompts, torch.zeros(1, 65, backbone.embed_dim))


@pytest.mark.parametrize("stage", ["text", "image"])
def test_gradients_reach_the_stages_modules_and_no_others(backbone, stage):
    model = make_model(backbone, **BOTH)
    move_cross_attention(model)
    model.set_stage(stage)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=stage == "image")
    images, batch = standin_images(2, 64), batch_of(2, 64)
    if stage == "text":
        encoded = encode_stage1(model, images, CLASSES, text, "adapted", backbone.default_vv_start, True)
        assert not any(level.requires_grad for level in encoded.patches)
        loss, _ = stage1_loss(encoded, backbone.scale, batch, "all", 0.1)
    else:
        encoded = encode(model, images, CLASSES, text)
        assert not encoded.anchors.requires_grad  # anchors are fixed, the image in them included
        loss, _ = stage2_loss(encoded, backbone.scale, batch, 1)
    loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == set(model.trainable(stage))
    assert len(reached) == 2


def loss_of(model, stage: str, precision: str = "fp32") -> torch.Tensor:
    """The loss of a stage's step on two images."""
    model.set_stage(stage)
    backbone, images, batch = model.backbone, standin_images(2, 64), batch_of(2, 64)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=stage == "image")
    if stage == "image":
        return stage2_loss(encode(model, images, CLASSES, text, precision), backbone.scale, batch, 1)[0]
    first = encode_stage1(model, images, CLASSES, text, "adapted", backbone.default_vv_start, True, precision)
    return stage1_loss(first, backbone.scale, batch, "all", 0.1)[0]


def gradients_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("placement", "stage", "precision"),
    [("joint", "text", "fp32"), ("joint", "image", "bf16"), ("block", "text", "bf16"), ("block", "image", "fp32")],
)
def test_recomputed_blocks_give_the_same_gradients_for_less_memory(backbone, monkeypatch, placement, stage, precision):
    model = make_model(backbone, **new_extension(placement))
    move_cross_attention(model)
    losses, gradients, kept = [], [], []
    for recompute in (False, True):
        monkeypatch.setattr(backbone, "recompute", recompute)
        storages: dict[int, int] = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses.append(loss_of(model, stage, precision))
        gradients.append(gradients_of(model, losses[-1]))
        kept.append(sum(storages.values()))
    without, with_it = gradients
    assert torch.equal(*losses) and without.keys() == with_it.keys()
    assert not [name for name in without if not torch.equal(without[name], with_it[name])]
    assert kept[1] < kept[0] / 2


def test_losses_keep_no_maps_and_change_nothing(monkeypatch):
    batch, scale, size = batch_of(2, 128), torch.tensor(100.0), 0
    start = 0.2 * torch.rand(2, 4, 64, 2, generator=torch.Generator().manual_seed(0))

    def keep(tensor):
        nonlocal size
        size += tensor.nbytes
        return tensor

    found = []
    for walk in (checkpoint, lambda function, *given, **options: function(*given)):
        monkeypatch.setattr("forward_utils_cross_attention.checkpoint", walk)
        cosines, size = start.clone().requires_grad_(), 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = segmentation_terms(cosines, scale, batch)
        sum(terms.values()).backward()
        found.append((terms, cosines.grad, size))
    (terms, gradient, size), (plain_terms, plain_gradient, plain_size) = found
    assert terms == plain_terms and torch.equal(gradient, plain_gradient)
    assert size < plain_size / 8


def test_nothing_is_recomputed_without_gradient(backbone, monkeypatch):
    monkeypatch.setattr(backbone, "recompute", True)
    monkeypatch.setattr("model.backbone.checkpoint", lambda *arguments, **options: pytest.fail("recomputes"))
    model = joint_model(backbone)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    predict(model, standin_images(2, 64), CLASSES, text)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("stage", [None, "image"])
def test_the_visual_forward_is_one_graph(backbone, placement, stage):
    model = make_model(backbone, **new_extension(placement))
    model.set_stage(stage)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    torch.compiler.reset()
    with torch.set_grad_enabled(stage is not None):
        found = torch._dynamo.explain(model.visual)(standin_images(2, 64), text.contexts(CLASSES))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize(("placement", "recompute"), [("joint", False), ("block", False), ("joint", True)])
def test_a_compiled_model_is_close_and_compiles_once(backbone, monkeypatch, placement, recompute):
    monkeypatch.setattr(backbone, "recompute", recompute)
    torch.compiler.reset()
    graphs = []
    eager, compiled = (make_model(backbone, **new_extension(placement)) for _ in range(2))
    compiled.compile(
        backend="aot_eager", fullgraph=True
    )  # as "inductor", but for its last step, which needs a compiler
    values = []
    for model in (eager, compiled):
        move_cross_attention(model)
        for _ in range(2):
            torch._dynamo.utils.counters.clear()
            with added_terms(model) as added:  # whose hooks must not make it compile in every step
                loss = loss_of(model, "image")
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            gradients = gradients_of(model, loss)
        values.append({"loss": loss.detach()} | added | gradients)
    assert graphs == [0, 0, 1, 0]
    assert values[0].keys() == values[1].keys()
    for name, expected in values[0].items():
        assert (values[1][name] - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), name


def test_projectors_see_the_plain_clip(backbone):
    model = make_model(backbone, **BOTH)
    move_cross_attention(model)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=False)
    images = standin_images(2, 64)
    encoded = encode_stage1(model, images, CLASSES, text, "projectors", backbone.default_vv_start, True)
    for found, expected in zip(encoded.patches, model.project_levels(backbone.plain_tokens(images)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("context", ["adapted", "frozen"])
@pytest.mark.parametrize("features", STAGE1_FEATURES)
def test_walks_of_one_step_share_the_first_block(backbone, features, context):
    model = make_model(backbone, **new_extension("block") | {"image_context": context})
    text, images = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True), standin_images(2, 64)
    first, walks = backbone.first_image_block(images), []
    hook = backbone.image_blocks[0].ln_1.register_forward_hook(lambda *call: walks.append(call))
    see_stage1(model, images, CLASSES, text, features, backbone.default_vv_start, True)
    encode(model, images, CLASSES, text)
    hook.remove()
    assert len(walks) == 2  # one in each call
    for start in (0, 3):
        alone = backbone.vv_tokens(images, start)
        for found, expected in zip(backbone.vv_tokens(images, start, first=first), alone, strict=True):
            assert all(torch.equal(found[level], expected[level]) for level in backbone.levels)


def test_bf16_is_close_and_trains(backbone):
    model = make_model(backbone, **BOTH)
    move_cross_attention(model)
    bank, images, batch = PromptBank(backbone, DESCRIPTIONS, "industrial"), standin_images(2, 64), batch_of(2, 64)
    full, half = (
        predict(model, images, CLASSES, ClassText(model, bank, fixed=True), precision) for precision in ("fp32", "bf16")
    )
    assert half.maps.dtype == half.detection_scores.dtype == torch.float32
    assert not torch.equal(full.maps, half.maps)
    assert (full.maps - half.maps).abs().max() <= 0.1 * (full.maps.max() - full.maps.min())
    model.set_stage("text")
    text, vv_start = ClassText(model, bank, fixed=False), backbone.default_vv_start
    encoded = encode_stage1(model, images, CLASSES, text, "adapted", vv_start, True, precision="bf16")
    loss, terms = stage1_loss(encoded, backbone.scale, batch, "all", 0.1)
    loss.backward()
    assert {term.dtype for term in terms.values()} == {torch.float32}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(gradients[f"text_adapter.{k}.fc.0.weight"].any() for k in range(4))


def joint_model(backbone):
    model = make_model(backbone, **new_extension("joint"))
    move_cross_attention(model)
    return model


def test_the_joint_space_by_its_formulas(backbone):
    """Against loops over patches: what a patch has of its like, and what the detection feature takes."""
    model = joint_model(backbone)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    images = standin_images(2, 64)
    with torch.no_grad():
        found, features = encode(model, images, CLASSES, text), model.visual(images)
    gate, scale = new_extension("joint"), backbone.scale.item()
    for image in range(2):
        normal, abnormal = found.anchors[image].unbind(dim=1)
        taken = torch.zeros(backbone.embed_dim)
        for number, level in enumerate(found.patches):
            patches, differences = level[image], []
            for place, patch in enumerate(patches):
                others = torch.cat([patches[:place], patches[place + 1 :]])
                nearest = others[(others @ patch).argsort(descending=True)[:NEIGHBOURS]].mean(dim=0)
                cosines = patch @ (normal + gate["text_cross_attn_weight"] * nearest), patch @ abnormal
                assert torch.allclose(found.cosines[image, number, place], torch.stack(cosines), atol=1e-5)
                differences.append(cosines[1] - cosines[0])
            evidence = scale * torch.stack(differences)
            taken += (evidence.softmax(dim=0) - (-evidence).softmax(dim=0)) @ patches
        expected = features.det[image] + gate["image_cross_attn_weight"] * taken / len(found.patches)
        assert torch.allclose(found.det[image], expected, atol=1e-4)


def test_another_image_is_looked_at_instead(backbone):
    model = joint_model(backbone)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    images, classes = standin_images(3, 64), ["candle"] * 3
    own = encode(model, images, classes, text)
    model.config = replace(model.config, image_context="another")
    other = images.roll(1, dims=0)
    found = encode(model, images, classes, text, other=other)
    gate, last = model.text_cross_attn.gate[0], found.patches[0][2]
    nearest = torch.stack([last[[n for n in range(len(last)) if n != place]] for place in range(len(last))])
    likeness = (nearest @ found.patches[0][0].unsqueeze(-1)).squeeze(-1).topk(NEIGHBOURS).values.mean(dim=-1)
    expected = found.patches[0][0] @ found.anchors[0, :, 0] + gate * likeness
    assert torch.allclose(found.cosines[0, 0, :, 0], expected, atol=1e-5)
    det = model.visual(images).det
    assert torch.allclose(found.det[0] - det[0], own.det[2] - det[2], atol=1e-4)
    assert torch.equal(found.cosines[..., 1], own.cosines[..., 1])
    first = encode_stage1(model, images, classes, text, "adapted", backbone.default_vv_start, True, other=other)
    assert torch.allclose(first.cosines, found.cosines, atol=1e-5)
    with pytest.raises(ValueError, match="looks at another image, and none was given"):
        encode(model, images, classes, text)


def test_known_good_images_join_what_a_patch_is_compared_with(backbone):
    model = joint_model(backbone)
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    images = standin_images(4, 64)
    known = {
        "candle": known_patches(model, images[2:], "candle", text),
        "nut": known_patches(model, images[:2], "nut", text),
    }
    alone, found = encode(model, images[:2], CLASSES, text), encode(model, images[:2], CLASSES, text, known=known)
    level = found.patches[1][0]
    nearest = (level @ model.visual(images[2:]).patches[1].flatten(0, 1).T).amax(dim=1)
    likeness = (level @ level.T).fill_diagonal_(-2).topk(NEIGHBOURS).values.mean(dim=-1) + nearest
    expected = level @ found.anchors[0, :, 0] + model.text_cross_attn.gate[1] * likeness
    assert torch.allclose(found.cosines[0, 1, :, 0], expected, atol=1e-5)
    # The nut is among its own known images: each patch finds itself.
    gain = found.cosines[1, ..., 0] - alone.cosines[1, ..., 0]
    assert torch.allclose(gain, model.text_cross_attn.gate[:, None].expand_as(gain), atol=1e-5)
    assert torch.equal(found.cosines[..., 1], alone.cosines[..., 1])


def test_the_temperature_of_the_detection_loss(backbone):
    det, anchors = torch.randn(2, 8), torch.randn(2, 8, 2)
    encoding, batch = Encoding([], anchors, torch.zeros(2, 4, 4, 2), det), batch_of(2, 64)
    cosines = torch.stack([det[n] @ anchors[n] for n in range(2)])
    for temperature in (1, 7):
        _, terms = stage2_loss(encoding, backbone.scale, batch, temperature)
        expected = -(temperature * cosines).log_softmax(dim=1)[[0, 1], batch["label"]].mean()
        assert terms["classification"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_in_the_joint_space_image_modules_learn_through_their_patches_alone(backbone):
    """A patch's own gradient counts; that of its neighbours, which are the anchor's, and of the weights does not."""
    patches = [torch.nn.functional.normalize(torch.randn(1, 12, 8), dim=-1).requires_grad_() for _ in range(4)]
    module = NeighbourCrossAttention(backbone, 0.5)
    module.open(1)
    added = module(torch.zeros(1, 4, 12), module.find(patches, patches))
    (gradient,) = torch.autograd.grad(added[0, 0, 3], patches[:1])
    assert gradient[0, 3].any() and not gradient[0, torch.arange(12) != 3].any()
    model = joint_model(backbone)
    model.set_stage("image")
    text = ClassText(model, PromptBank(backbone, DESCRIPTIONS, "industrial"), fixed=True)
    encoding = encode(model, standin_images(2, 64), CLASSES, text)
    encoding.det.sum().backward()
    projectors = model.image_adapter["seg_proj"]
    assert all(level.fc.weight.grad.any() for level in projectors)
    model.set_stage("text")
    first = encode_stage1(model, standin_images(2, 64), CLASSES, text, "frozen", backbone.default_vv_start, True)
    assert not any(level.requires_grad for level in first.patches) and first.det is None


def test_what_does_not_go_together_is_an_error(backbone):
    with pytest.raises(ValueError, match="--image_context frozen goes with --cross_attn block alone"):
        make_model(backbone, image_context="frozen", **new_extension("joint"))
    with pytest.raises(ValueError, match="expected joint or block"):
        make_model(backbone, cross_attn="above")


@pytest.mark.vit_l
def test_shapes_of_the_vit_l_modules():
    backbone = standin_backbone("ViT-L-14-336", 56)
    model = make_model(backbone, image_adapt_until=6, **BOTH)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if "backbone" not in name}
    assert shapes["text_adapter.3.fc.0.weight"] == [768, 768]
    assert shapes["image_adapter.layer_adapters.5.fc.0.weight"] == [1024, 1024]
    assert shapes["image_adapter.seg_proj.3.fc.weight"] == [768, 1024]
    assert shapes["image_adapter.det_proj.fc.weight"] == [768, 1024]
    expected = {"q_proj": [768, 1024], "k_proj": [768, 768], "v_proj": [768, 768], "out_proj": [1024, 768]}
    for name, shape in expected.items():
        assert shapes[f"image_cross_attn.{name}.weight"] == shape
        assert shapes[f"text_cross_attn.{name}.weight"] == [768, 768]
    assert "text_adapter.4.fc.0.weight" not in shapes
    assert "image_adapter.layer_adapters.6.fc.0.weight" not in shapes


def test_relu_and_bottleneck_variants(backbone):
    model = make_model(backbone, relu=True, adapter_hidden=16)
    names = {name for name, _ in model.image_adapter.named_parameters()}
    assert {"seg_proj.0.fc.0.weight", "det_proj.fc.0.weight", "layer_adapters.0.fc.2.weight"} <= names
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    first, last = (model.image_adapter["layer_adapters"][0].fc[i].weight for i in (0, 2))
    leaky = torch.nn.functional.leaky_relu
    expected = leaky(leaky(x @ first.T, 0.01) @ last.T, 0.01)
    assert torch.allclose(model.image_adapter["layer_adapters"][0](x), expected, atol=1e-6)
    assert [list(p.shape) for p in SimpleAdapter(8, 3).parameters()] == [[3, 8], [8, 3]]
    assert torch.equal(SimpleProj(4, 2, relu=True)(torch.zeros(1, 4)), torch.zeros(1, 2))
    proj = model.image_adapter["seg_proj"][0]
    assert torch.allclose(proj(x), leaky(x @ proj.fc[0].weight.T, 0.01), atol=1e-6)
