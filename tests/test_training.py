"""The feedback schedule: what trains when, what is carried over, and exact continuation."""

import csv
import hashlib
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset.loading import AnomalyDataset, SeededSampler, make_loader
from dataset.transforms import Transform
from forward_utils_cross_attention import ClassText, PromptBank, encode, segmentation_terms, stage1_loss
from model.adapter_cross_attention import MODULES, STAGE_MODULES
from tests.conftest import (
    EPOCHS,
    SMALL,
    Scripts,
    assert_same_tensors,
    encode_stage1,
    make_model,
    tensors,
    write_small_dataset,
)
from utils import checkpoints
from utils.machine import Machine
from utils.settings import Settings
from utils.training.data import load_training_data
from utils.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rates
from utils.training.plan import Plan, plan_stages, vv_start
from utils.training.trainer import Trainer

BOTH = {"text_cross_attn": True, "image_cross_attn": True}
EXTEND = ["--dataset", "small", "--device", "cpu", *EPOCHS]
HELD_OUT = ["train_cross_attention", *EXTEND, "--loops", "2", "--val_fraction", "0.2"]


def at(data_root: Path) -> Machine:
    """A machine without a GPU that has its data there."""
    return Machine("cpu", None, data_root, num_workers=0)


def settings(**changes) -> Settings:
    small = {
        "dataset": "small",
        "seed": 3,
        "text_epoch": [1],
        "image_epoch": [1],
        "text_batch_size": 4,
        "text_lr": 1e-3,
    }
    return Settings(**small | changes)


def make_trainer(backbone, data_root, folder, loops=1, config=BOTH, kind=Trainer, **changes):
    chosen = settings(**changes)
    model = make_model(backbone, seed=chosen.seed, **config)
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(model.config, chosen, plan_stages(chosen, range(1, loops + 1)), folder, [])
    return kind(model, load_training_data(chosen, at(data_root), 64), plan)


def train(trainer: Trainer) -> list:
    """Train to the end; the stages."""
    with trainer.running():
        return list(trainer.stages())


def hashes(model) -> dict[str, str]:
    """A hash of each trainable module, and one of the frozen CLIP."""
    modules = model.trainable() | {"backbone": model.backbone}
    return {
        name: hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in module.state_dict().values())).hexdigest()
        for name, module in modules.items()
    }


class Watched(Trainer):
    """Notes the modules' hashes around each stage, and what Stage 1 might look at in its first step."""

    def run_stage(self, stage):
        before = hashes(self.model)
        super().run_stage(stage)
        self.seen = [*getattr(self, "seen", []), (stage.loop, stage.name, before, hashes(self.model))]

    def losses(self, stage, batch, text, *parts):
        if stage.name == "text" and self.position.step == 0:
            arguments = (self.model, batch["image"], batch["class_name"], text)
            frozen = encode_stage1(*arguments, "frozen", self.vv_start, True).patches
            self.choices = {**getattr(self, "choices", {}), stage.loop: (frozen, encode(*arguments).patches)}
        return super().losses(stage, batch, text, *parts)


def test_carry_over(backbone, data_root, tmp_path, monkeypatch):
    looked_at = []

    def watched_loss(encoding, *arguments):
        looked_at.append(encoding.patches)
        return stage1_loss(encoding, *arguments)

    monkeypatch.setattr("utils.training.trainer.stage1_loss", watched_loss)
    trainer = make_trainer(backbone, data_root, tmp_path, loops=3, kind=Watched)
    last = hashes(trainer.model)
    train(trainer)
    assert [entry[:2] for entry in trainer.seen] == [(k, s) for k in (1, 2, 3) for s in ("text", "image")]
    for _, stage, before, after in trainer.seen:
        assert before == last  # starts from the exact weights that the one before ended with
        assert {name for name in before if before[name] != after[name]} == set(STAGE_MODULES[stage])
        last = after
    steps = 5  # 20 images, batches of 4
    assert len(looked_at) == 3 * steps
    for loop, (frozen, trained) in trainer.choices.items():
        used = looked_at[(loop - 1) * steps]
        is_frozen = [torch.equal(a, b) for a, b in zip(used, frozen, strict=True)]
        is_trained = [torch.equal(a, b) for a, b in zip(used, trained, strict=True)]
        assert all(is_frozen) if loop == 1 else not any(is_frozen)
        assert not any(is_trained) if loop == 1 else all(is_trained)


def test_plan_of_epochs_rates_and_features():
    chosen = settings(text_epoch=[5, 3, 2], image_epoch=[20], text_lr=1e-5, image_cross_attn_lr=1e-4)
    plan = plan_stages(chosen, range(1, 5))
    assert [stage.epochs for stage in plan] == [5, 20, 3, 20, 2, 20, 2, 20]
    assert [stage.lr for stage in plan[::2]] == [1e-5, 5e-6, 2.5e-6, 1.25e-6]
    assert [stage.cross_attn_lr for stage in plan[1::2]] == [1e-4, 5e-5, 2.5e-5, 1.25e-5]
    assert [stage.features for stage in plan[::2]] == ["frozen", "adapted", "adapted", "adapted"]
    assert {stage.features for stage in plan_stages(settings(feedback="off"), range(1, 4))[::2]} == {"frozen"}


def test_learning_rate_is_halved_at_the_milestones(backbone, data_root, tmp_path):
    trainer = make_trainer(backbone, data_root, tmp_path, image_cross_attn_lr=1e-4)
    for stage, step, expected in [
        (trainer.plan.stages[1], 15999, (5e-4, 1e-4)),
        (trainer.plan.stages[1], 16000, (2.5e-4, 5e-5)),
        (trainer.plan.stages[1], 32000, (1.25e-4, 2.5e-5)),
        (trainer.plan.stages[0], 32000, (1e-3, 1e-3)),
    ]:
        optimizer = make_optimizer(trainer.model.trainable(stage.name), stage)
        set_learning_rates(optimizer, stage, trainer.settings, step, 50_000)
        assert tuple(group["lr"] for group in optimizer.param_groups) == expected
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("fused_from", [0, 3])
def test_fused_adam_is_close_and_goes_on_from_the_other(backbone, data_root, tmp_path, monkeypatch, fused_from):
    """What runs on a GPU, beside what runs here; a run may go on there from a state that was saved here."""
    stage = make_trainer(backbone, data_root, tmp_path).plan.stages[1]
    adam = torch.optim.Adam

    def after_steps(first_fused: int) -> dict[str, torch.Tensor]:
        model, state = make_model(backbone, **BOTH), None
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            fused = step >= first_fused
            with monkeypatch.context() as patch:
                patch.setattr("torch.optim.Adam", lambda *given, **named: adam(*given, **named | {"fused": fused}))  # noqa: B023
                optimizer = make_optimizer(model.learned("image"), stage, state)
            assert all(group["fused"] == fused for group in optimizer.param_groups)
            for parameter in (p for module in model.learned("image").values() for p in module.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            state = optimizer.state_dict()
        return checkpoints.states(model)["image_adapter"]

    expected = after_steps(first_fused=6)
    for name, found in after_steps(fused_from).items():
        assert (found - expected[name]).abs().max() <= 1e-6, name


def test_learning_rates_warm_up_and_follow_a_cosine():
    factors = [learning_rate_factor("cosine", step, 100, warmup_steps=3) for step in (0, 1, 50, 75, 100)]
    quarter = (1 + math.cos(0.75 * math.pi)) / 2
    expected = [0.25, 0.5 * (1 + math.cos(0.01 * math.pi)) / 2, 0.5, quarter, 0]
    assert factors == pytest.approx(expected, abs=1e-12)
    assert learning_rate_factor("cosine", 0, 100, warmup_steps=0) == 1
    assert learning_rate_factor("steps", 7, 100, warmup_steps=15, milestones=(5, 7)) == 0.125


def test_the_cosine_ends_with_the_stage(backbone, data_root, tmp_path):
    trainer = make_trainer(backbone, data_root, tmp_path, lr_schedule="cosine", image_epoch=[2])
    stage = trainer.plan.stages[1]
    optimizer = make_optimizer(trainer.model.trainable(stage.name), stage)
    steps = 2 * math.ceil(len(trainer.data.train) / stage.batch_size)
    assert set_learning_rates(optimizer, stage, trainer.settings, 0, steps)["lr"] == stage.lr
    assert set_learning_rates(optimizer, stage, trainer.settings, steps, steps)["lr"] == 0


def test_plain_aa_clip_inside(scripts, backbone, tmp_path):
    """One loop without the extension, from the fresh base that train.py starts with, is what train.py does."""
    epochs = ["--text_epoch", "2", "--image_epoch", "2", "--seed", "7"]
    assert scripts("train", *SMALL, *epochs, "--save_path", tmp_path / "trained") == 0
    fresh = checkpoints.states(make_model(backbone, seed=7))
    (tmp_path / "fresh").mkdir()
    for name in ("text_adapter", "image_adapter"):
        # The scripts refuse an untrained base, so this one says that it was trained.
        content = torch.load(tmp_path / "trained" / f"{name}.pth", weights_only=True)
        torch.save(content | {name: fresh[name]}, tmp_path / "fresh" / f"{name}.pth")
    flags = ["--loops", "1", "--feedback", "off", "--no_text_cross_attn", "--no_image_cross_attn"]
    flags += ["--stage1_levels", "last", "--optimizer_state", "reset", "--dataset", "small", "--device", "cpu"]
    command = ["train_cross_attention", *flags, *epochs, "--resume", tmp_path / "fresh", "--save_path", tmp_path / "x"]
    assert scripts(*command) == 0
    assert_same_tensors(tmp_path / "x" / "loop_1.pth", tmp_path / "trained")
    moved, start = tensors(tmp_path / "trained"), tensors(tmp_path / "fresh")
    assert not any(torch.equal(moved[name], start[name]) for name in moved)


def test_optimiser_state_resets_or_carries(backbone, data_root, tmp_path):
    moments = {}
    for choice in ("reset", "carry"):
        trainer = make_trainer(backbone, data_root, tmp_path / choice, loops=2, optimizer_state=choice)
        with trainer.running():
            moments[choice] = [
                (stage.name, int(trainer.optimizer_states[stage.name]["state"][0]["step"]))
                for stage in trainer.stages()
            ]
    per_loop = {"text": 5, "image": 10}  # 20 images, batches of 4 and of 2
    assert moments["reset"] == [("text", 5), ("image", 10)] * 2
    assert moments["carry"] == [(n, k * per_loop[n]) for k in (1, 2) for n in ("text", "image")]


@pytest.mark.parametrize("pieces", [2, 5])
def test_a_batch_in_pieces_trains_what_it_does_whole(backbone, data_root, tmp_path, pieces):
    trained = []
    for number in (1, pieces):
        trainer = make_trainer(backbone, data_root, tmp_path / str(number), image_batch_size=6, text_batch_size=20)
        trainer.pieces = number
        train(trainer)
        trained.append(trainer)
    whole, cut = (checkpoints.states(trainer.model)["image_adapter"] for trainer in trained)
    assert max((whole[name] - cut[name]).abs().max() for name in whole) < 1e-5
    measured = [trainer.log.metrics["image"] for trainer in trained]
    for name, value in measured[0].items():
        assert measured[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_measures_fetched_late_are_the_same(backbone, data_root, tmp_path):
    for steps in (1, 3):
        trainer = make_trainer(backbone, data_root, tmp_path / str(steps))
        trainer.fetch_steps = steps
        train(trainer)
    assert without_time(tmp_path / "1") == without_time(tmp_path / "3")


def test_v_v_attention_follows_its_flags(backbone, data_root, tmp_path, monkeypatch):
    assert vv_start(settings(), SimpleNamespace(image_blocks=range(24), default_vv_start=5)) == 5
    assert vv_start(settings(surgery_until_layer=20), SimpleNamespace(image_blocks=range(24))) == 5
    assert vv_start(settings(surgery_until_layer=1), backbone) == 12  # in no block
    calls = []

    def watched(images, start, across_batch, *more):
        calls.append((start, across_batch))
        return original(images, start, across_batch, *more)

    original = backbone.vv_tokens
    monkeypatch.setattr(backbone, "vv_tokens", watched)
    train(make_trainer(backbone, data_root, tmp_path, vv_attention="image", surgery_until_layer=4))
    assert set(calls) == {(9, False)}


def test_other_weights_and_images_are_refused_when_a_run_goes_on(scripts, backbone, tmp_path, monkeypatch, capsys):
    original = Trainer.train_step

    def stopped(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    command = ["train", *SMALL, *EPOCHS, "--save_path", tmp_path / "x"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopped)
        assert scripts(*command) == 1
    state = backbone.clip.state_dict()
    state["ln_final.bias"] = state["ln_final.bias"] + 1
    torch.save(state, tmp_path / "other.pt")
    assert scripts(*command, "--clip_weights", tmp_path / "other.pt") == 2
    assert "this run has CLIP weights of SHA-256" in capsys.readouterr().err
    write_small_dataset(tmp_path / "grown" / "small", per_kind=6)
    assert scripts(*command, data_root=tmp_path / "grown") == 2
    assert "began with 20 images to train on and 0 held out; now there are 24 and 0" in capsys.readouterr().err
    assert scripts(*command) == 0


def read_log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_time(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder)]


@pytest.fixture(scope="module")
def whole(base, data_root, tmp_path_factory) -> Path:
    """An uninterrupted run with a held-out part."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert Scripts(monkeypatch, data_root)(*HELD_OUT, "--resume", base, "--save_path", folder) == 0
    return folder


# Two classes of 5 + 5 images, a fifth held out: 4 steps of Stage 1, then 8 of Stage 2.
@pytest.mark.parametrize(
    ("call", "where"),
    [
        (3, "loop 1, Stage 1, epoch 1, step 3"),
        (4, "loop 1, Stage 1, epoch 1, step 4"),
        (7, "loop 1, Stage 2, epoch 1, step 3"),
        (12, "loop 1, Stage 2, epoch 1, step 8"),
    ],
)
def test_stopped_and_started_again_gives_the_same_run(scripts, base, whole, tmp_path, monkeypatch, capsys, call, where):
    original, calls = Trainer.train_step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    command = [*HELD_OUT, "--resume", base, "--save_path", tmp_path / "cut"]
    assert scripts(*command) == 1
    message = capsys.readouterr().err
    assert f"Stopped by SIGTERM at {where}; the state is saved" in message and "error:" not in message
    assert not (tmp_path / "cut" / "loop_1.pth").exists()
    assert scripts(*command) == 0
    assert f"Going on at {where}." in capsys.readouterr().err
    for loop in range(3):
        assert_same_tensors(tmp_path / "cut" / f"loop_{loop}.pth", whole / f"loop_{loop}.pth")
    assert without_time(tmp_path / "cut") == without_time(whole)


def test_extending_a_run_and_going_on_from_a_loop_file(scripts, base, tmp_path, capsys):
    command = ["train_cross_attention", *EXTEND, "--resume", base]
    assert scripts(*command, "--loops", "2", "--save_path", tmp_path / "whole") == 0
    assert scripts(*command, "--loops", "1", "--save_path", tmp_path / "grown") == 0
    assert scripts(*command, "--loops", "2", "--save_path", tmp_path / "grown") == 0
    assert_same_tensors(tmp_path / "grown" / "loop_2.pth", tmp_path / "whole" / "loop_2.pth")
    assert scripts(*command, "--loops", "2", "--save_path", tmp_path / "grown") == 0
    assert "is finished up to loop 2" in capsys.readouterr().err
    assert scripts(*command, "--loops", "1", "--save_path", tmp_path / "grown") == 2
    assert "already has 2 loops" in capsys.readouterr().err
    loop_1 = tmp_path / "whole" / "loop_1.pth"
    new = ["train_cross_attention", *EXTEND, "--resume", loop_1, "--save_path", tmp_path / "new", "--loops", "2"]
    assert scripts(*new) == 0
    assert_same_tensors(tmp_path / "new" / "loop_2.pth", tmp_path / "whole" / "loop_2.pth")
    assert_same_tensors(tmp_path / "new" / "loop_0.pth", tmp_path / "whole" / "loop_0.pth")
    assert scripts(*new, "--optimizer_state", "carry") == 2
    assert "hold no optimiser" in capsys.readouterr().err


def test_log_has_step_zero_and_every_measure(scripts, base, tmp_path):
    assert (
        scripts("train_cross_attention", *EXTEND, "--resume", base, "--loops", "2", "--save_path", tmp_path / "x") == 0
    )
    rows = read_log(tmp_path / "x")
    assert [(r["kind"], r["loop"], r["stage"], r["step"]) for r in rows[:2]] == [
        ("step", "1", "1", "0"),
        ("step", "1", "1", "1"),
    ]
    assert rows[0]["added_text_cross_attn"] == "0.0"
    assert float(rows[1]["added_text_cross_attn"]) > 0
    stage2 = [r for r in rows if (r["kind"], r["loop"], r["stage"]) == ("step", "1", "2")]
    assert stage2[0]["step"] == "0" and stage2[0]["added_image_cross_attn"] == "0.0"
    assert float(stage2[1]["added_image_cross_attn"]) > 0
    epochs = [r for r in rows if r["kind"] == "epoch"]
    assert len(epochs) == 4
    for row in epochs:
        own = STAGE_MODULES["text" if row["stage"] == "1" else "image"]
        for name in MODULES:
            for measure in ("grad_norm", "update"):
                learned = name in own and name.endswith("adapter")  # gates are opened, not learned
                assert (float(row[f"{measure}_{name}"]) > 0) if learned else row[f"{measure}_{name}"] == ""
        terms = [f"{t}_{k}" for t in ("focal", "dice_normal", "dice_abnormal") for k in range(1, 5)]
        total = sum(float(row[t]) for t in terms)
        total += 0.1 * float(row["orthogonal"]) if row["stage"] == "1" else float(row["classification"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
        assert 0 <= float(row["anchor_separation"]) <= 2 and float(row["lr"]) > 0


def test_step_zero_losses_are_the_base_models(scripts, base, tmp_path):
    """What the first row of a run with both modules says equals that of a run without them."""
    common = ["train_cross_attention", *EXTEND, "--resume", base, "--loops", "1"]
    assert scripts(*common, "--save_path", tmp_path / "with") == 0
    off = ["--no_text_cross_attn", "--no_image_cross_attn"]
    assert scripts(*common, *off, "--save_path", tmp_path / "without") == 0
    first = [float(read_log(tmp_path / name)[0]["loss"]) for name in ("with", "without")]
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    content = torch.load(tmp_path / "without" / "loop_1.pth", weights_only=True)
    assert content["text_cross_attn"] is None and content["image_cross_attn"] is None
    assert {
        k: v for k, v in tensors(tmp_path / "with" / "loop_0.pth").items() if "cross_attn" not in k
    }.keys() == tensors(base).keys()


def test_nan_loss_names_the_batch_and_keeps_the_state(scripts, base, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "x"
    original = Trainer.losses

    def broken(self, stage, batch, text, *parts):
        loss, terms = original(self, stage, batch, text, *parts)
        return (loss * float("nan"), terms) if stage.name == "image" else (loss, terms)

    monkeypatch.setattr(Trainer, "losses", broken)
    assert scripts("train_cross_attention", *EXTEND, "--resume", base, "--loops", "1", "--save_path", folder) == 1
    message = capsys.readouterr().err
    assert "loss is nan at loop 1, Stage 2, epoch 1, step 0" in message and ".png" in message
    state = checkpoints.read(folder / "state.pth")
    assert state["position"] == (1, "image", 0, 0)
    assert all(t.isfinite().all() for module in state["modules"].values() for t in module.values())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_do(scripts, base, tmp_path, monkeypatch, capsys, error):
    def exhausted(self, stage, batch, text, *parts):
        raise error

    monkeypatch.setattr(Trainer, "losses", exhausted)
    command = ["train_cross_attention", *EXTEND, "--resume", base, "--loops", "1", "--save_path", tmp_path / "x"]
    assert scripts(*command) == 1
    message = capsys.readouterr().err
    assert "--text_batch_size 4, --img_size 64" in message and "smaller --text_batch_size" in message
    assert "with --grad_checkpointing" in message


def test_order_and_augmentation_depend_on_the_seed_alone(data_root):
    folder = data_root / "small"
    records = load_training_data(settings(), at(data_root), 64).train
    dataset = AnomalyDataset(folder, records, Transform(64, "image"))

    def epoch(workers: int, number: int, skip: int = 0) -> torch.Tensor:
        sampler = SeededSampler(len(dataset), key=(5, 1, 1))
        sampler.set_epoch(number, skip)
        torch.manual_seed(number + workers)  # the global generator must not matter
        return torch.cat([batch["image"] for batch in make_loader(dataset, 3, workers, sampler)])

    first = epoch(0, 0)
    assert torch.equal(first, epoch(2, 0))
    assert torch.equal(first[6:], epoch(0, 0, skip=6))
    assert not torch.equal(first, epoch(0, 1))


def test_maskless_images_skip_the_segmentation_loss(backbone, data_root):
    model = make_model(backbone)
    bank = PromptBank(backbone, {"candle": "candle"}, "industrial")
    records = load_training_data(settings(), at(data_root), 64).train[:4]
    dataset = AnomalyDataset(data_root / "small", records, Transform(64))
    batch = next(iter(make_loader(dataset, 4, 0)))
    with torch.no_grad():
        encoding = encode(model, batch["image"], ["candle"] * 4, ClassText(model, bank, fixed=True))
    batch["has_mask"] = torch.tensor([True, False, True, True])
    found = segmentation_terms(encoding.cosines, backbone.scale, batch)
    rows = [0, 2, 3]
    kept = {"mask": batch["mask"][rows], "has_mask": torch.ones(3, dtype=torch.bool)}
    expected = segmentation_terms(encoding.cosines[rows], backbone.scale, kept)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    batch["has_mask"][:] = False
    assert segmentation_terms(encoding.cosines, backbone.scale, batch) == {}
