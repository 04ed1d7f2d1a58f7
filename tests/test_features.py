"""Stage 1 on features that are kept: what it sees is what it would see, and only once."""

from types import SimpleNamespace

import pytest
import torch

from dataset.loading import SeededSampler
from forward_utils_cross_attention import ClassText
from tests.conftest import assert_same_tensors
from tests.test_training import EXTEND, make_trainer, train
from utils.training import features
from utils.training.features import SeenSteps, bytes_of_image, choose_place
from utils.training.steps import Steps
from utils.training.trainer import Trainer

JOINT = {"text_cross_attn": True, "image_cross_attn": True, "cross_attn": "joint"}


def steps_of(trainer: Trainer, place=None) -> tuple[Steps, SeenSteps, dict]:
    """The first stage's steps, as they are and as they are kept, and what its losses need beside a batch."""
    stage, text = trainer.plan.stages[0], ClassText(trainer.model, trainer.bank, fixed=False)
    dataset = trainer.data.images(trainer.data.train, trainer._transform("text"))
    drawn = Steps(dataset, stage.batch_size, 0, trainer.device, SeededSampler(len(dataset), (3, 1, 0)))
    seen = SeenSteps(place, (3, 1, 0))
    seen.fill(drawn, lambda batch, lengths: trainer.see(stage, batch, lengths, text))
    return drawn, seen, {"stage": stage, "text": text}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("config", [JOINT, {"text_cross_attn": True}, {}])
def test_losses_of_kept_features_are_those_of_the_images(backbone, data_root, tmp_path, config, on_disk):
    trainer = make_trainer(backbone, data_root, tmp_path / "run", config=config)
    place = tmp_path / "features" if on_disk else None
    drawn, seen, also = steps_of(trainer, place)
    assert not on_disk or len(list(place.iterdir())) == len(drawn)
    expected = {}
    for step in drawn.epoch(0):
        ((batch, part, _),) = step.pieces
        expected[tuple(batch["path"])] = trainer.losses(**also, batch=batch, part=part, lengths=step.lengths)
    found = 0
    for step in seen.epoch(1):
        ((batch, part, sight),) = step.pieces
        assert "image" not in batch and sight.patches[0].dtype == torch.float16
        loss, terms = trainer.losses(**also, batch=batch, part=part, lengths=step.lengths, sight=sight)
        exact, exact_terms = expected[tuple(batch["path"])]  # whole batches are kept
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
        assert terms.keys() == exact_terms.keys()
        found += 1
    assert found == len(drawn)
    seen.close()
    assert not on_disk or not place.exists()


def test_order_and_continuation_of_kept_batches(backbone, data_root, tmp_path):
    _, seen, _ = steps_of(make_trainer(backbone, data_root, tmp_path, config=JOINT))

    def paths(epoch: int, skip: int = 0) -> list[str]:
        return [step.pieces[0].batch["path"][0] for step in seen.epoch(epoch, skip)]

    assert sorted(paths(0)) == sorted(paths(1)) and paths(0) != paths(1)
    assert paths(1, skip=2) == paths(1)[2:]


def test_the_image_side_looks_once_a_loop(backbone, data_root, tmp_path, monkeypatch):
    calls = []
    original = Trainer.see

    def counted(self, stage, *arguments, **named):
        calls.append(stage.loop)
        return original(self, stage, *arguments, **named)

    monkeypatch.setattr(Trainer, "see", counted)
    trainer = make_trainer(backbone, data_root, tmp_path, loops=2, config=JOINT, text_epoch=[3], cache_features=True)
    train(trainer)
    assert calls == [1] * 5 + [2] * 5  # 20 images, batches of 4


def test_a_run_with_kept_features_goes_on(scripts, base, tmp_path, monkeypatch, capsys):
    command = ["train_cross_attention", *EXTEND, "--text_epoch", "2", "--loops", "1", "--cache_features"]
    command += ["--resume", base]
    assert scripts(*command, "--save_path", tmp_path / "whole") == 0
    assert "GB of features of 20 images, in memory" in capsys.readouterr().err
    monkeypatch.setattr(features.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))  # then on disk
    original, count = Trainer.train_step, []

    def stopped(self, *arguments):
        count.append(1)
        if len(count) == 8:
            self.stop.received = "SIGTERM"
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopped)
        assert scripts(*command, "--save_path", tmp_path / "cut") == 1
    assert not list((tmp_path / "cut").glob("features*"))
    (tmp_path / "cut" / "features_7").mkdir()  # as a killed process leaves it
    assert scripts(*command, "--save_path", tmp_path / "cut") == 0
    assert "in " + str(tmp_path / "cut" / "features_0") in capsys.readouterr().err
    assert not list((tmp_path / "cut").glob("features*"))
    assert_same_tensors(tmp_path / "cut" / "loop_1.pth", tmp_path / "whole" / "loop_1.pth")


def test_features_that_have_no_room_or_change_are_refused(backbone, data_root, tmp_path, monkeypatch):
    trainer = make_trainer(backbone, data_root, tmp_path, config=JOINT)
    kept = steps_of(trainer)[1]._tensors.values()
    assert sum(t.nbytes for tensors in kept for t in tensors.values()) == 20 * bytes_of_image(trainer.model)
    with pytest.raises(ValueError, match=r"too much for the memory .* and for the disk"):
        choose_place(trainer.model, 10**12, tmp_path)
    block = make_trainer(backbone, data_root, tmp_path, config={**JOINT, "cross_attn": "block"})
    with pytest.raises(ValueError, match="--cache_features: with --cross_attn block"):
        choose_place(block.model, 10, tmp_path)


def test_a_signal_is_obeyed_while_features_are_seen(scripts, base, tmp_path, monkeypatch, capsys):
    original, seen = Trainer.see, []

    def interrupted(self, *arguments, **named):
        self.stop.received = "SIGTERM"
        seen.append(1)
        return original(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "see", interrupted)
    command = ["train_cross_attention", *EXTEND, "--loops", "1", "--cache_features", "--resume", base]
    assert scripts(*command, "--save_path", tmp_path / "x") == 1
    assert "Stopped by SIGTERM. The same command goes on from here." in capsys.readouterr().err
    assert len(seen) == 1
