"""The trainer: batches depend on seed and step alone, a stopped run continues exactly, payloads stay held out."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_lite.runtime.reference import train
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.model import load
from kimi_lite.runtime.reference.tasks import (
    Draw,
    about_shapes,
    difference_steps,
    edge_sums,
    sum_steps,
    text_sample,
)
from kimi_lite.runtime.reference.train import IGNORE, Trainer, export, make_batches, nano_tokenizer


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TEXT_BATCH", 4)
    monkeypatch.setattr(train, "TEXT_POOL", 16)
    monkeypatch.setattr(train, "PICTURE_BATCH", 4)


def test_a_stopped_run_continues_exactly(tmp_path: Path) -> None:
    batches = [make_batches(1, step) for step in range(3)]
    whole = Trainer(tmp_path / "none", seed=1)
    for step in batches:
        whole.update(step, total_s=1e9)
    first = Trainer(tmp_path, seed=1)
    first.update(batches[0], total_s=1e9)
    first.save()
    second = Trainer(tmp_path, seed=1)
    assert second.step == 1
    for step in batches[1:]:
        second.update(step, total_s=1e9)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_batches_repeat_from_their_seed() -> None:
    for first, second in zip(make_batches(5, 9), make_batches(5, 9), strict=True):
        assert np.array_equal(first.ids_BT, second.ids_BT)
        assert first.grid == second.grid
        assert (first.patches_NPX is None) == (second.patches_NPX is None)


def a_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    for name, n in (("TEXT_BATCH", 4), ("TEXT_POOL", 16), ("PICTURE_BATCH", 4)):
        setattr(train, name, n)
    ranks = [torch.tensor([[float(rank)], [3.0]]), torch.tensor(float(rank))]
    train.average(ranks)
    assert [mean.tolist() for mean in ranks] == [[[0.5], [3.0]], 0.5]
    trainer = Trainer(folder / f"process {rank}", seed=1)
    (folder / f"process {rank}").mkdir()
    for step in range(2):
        trainer.update(make_batches(1, step, rank), total_s=1e9)
    trainer.save()
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_does_on_the_batches_of_both(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(a_process, (0, 1), (tmp_path, tmp_path)))
    one = Trainer(tmp_path / "none", seed=1)
    start = {name: value.clone() for name, value in one.model.state_dict().items()}
    for step in range(2):  # the sum where theirs is the mean; both optimizers go by its direction alone
        one.update([*make_batches(1, step, 0), *make_batches(1, step, 1)], total_s=1e9)
    two = [
        torch.load(tmp_path / f"process {rank}" / "state.pt", weights_only=True)["model"] for rank in (0, 1)
    ]
    for name, value in one.model.state_dict().items():
        assert torch.equal(two[0][name], two[1][name]), name
        if name.endswith("router_bias"):  # one step a batch, and one process has twice as many
            continue
        moved = float((value - start[name]).norm())
        # Sums in another order, 2^-24 each. Where a gradient is nearly none that may turn its sign, and Adam's step with it: of
        # one weight in 1,600, which makes 2 / sqrt(1600) of the norm.
        assert float((two[0][name] - value).norm()) <= 0.05 * moved, name


def test_only_the_last_reply_is_learned() -> None:
    tokenizer = nano_tokenizer()
    batch = make_batches(2, 0)[0]
    for ids_T, targets_T in zip(batch.ids_BT, batch.targets_BT, strict=True):
        learned = np.flatnonzero(targets_T != IGNORE)
        assert np.array_equal(learned, np.arange(learned[0], learned[-1] + 1))  # one run
        assert np.array_equal(targets_T[learned], ids_T[learned + 1])  # of next tokens
        assert tokenizer.name(int(ids_T[learned[0]])) == "<|im_middle|>"
        assert tokenizer.name(int(targets_T[learned[-1]])) == "<|im_end|>"


def test_training_never_draws_a_held_out_payload() -> None:
    training = Draw(np.random.default_rng(0), held_out=False)
    questions = {turn.question for _ in range(3000) for turn in text_sample(training).turns}
    assert not any("38 + 47" in q or "38+47" in q for q in questions)
    unseen = {
        s.turns[0].question for task, samples in held_out(7, 60).items() if task != "talk" for s in samples
    }
    text = {q for q in unseen if any(c.isdigit() or c in "\"':" for c in q)}
    assert len(text) > 100
    assert not text & questions


def test_the_chains_of_thought_are_right() -> None:
    for a in range(0, 100, 7):
        for b in range(0, 100, 3):
            assert sum_steps(a, b).endswith(f"so {a + b}")
            assert difference_steps(a, b).endswith(f"so {a - b}")
            for steps in (sum_steps(a, b), difference_steps(a, b)):
                for claim in steps.replace(", carry 1", "").replace("borrow 1, ", "").split("; "):
                    left, equals, right = claim.rpartition(": ")[2].partition("=")
                    assert not equals or eval(left) == int(right), claim  # digits, + and - only


def test_an_exported_checkpoint_is_the_model_in_bf16(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "none", seed=3)
    export(trainer.model, tmp_path / "out")
    loaded, _ = load(tmp_path / "out")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16).float()), name


def test_muon_steps_as_pytorchs_does_within_its_bfloat16() -> None:
    # PyTorch's rounds to bfloat16 after each of the five rounds' three products, 2^-9 each; the quintic's slope at 0 is 3.4445
    # a round, near 1 it is below 1, so an error grows while a singular value is small and is then held: 5 * 3 * 2^-9 = 3 %
    # of the update's largest values, which are about 1 over the root of the longer side, before its scale 0.2 * sqrt(longer side).
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
        ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        optimizers = (
            train.Muon([ours], 0.01),
            torch.optim.Muon(
                [theirs], lr=0.01, weight_decay=train.WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            ),
        )
        for gradient in gradients:
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        moved = float((theirs - start).detach().norm())
        assert float((ours - theirs).detach().norm()) < 0.03 * moved


def test_hard_pictures_are_for_training_and_edge_sums_keep_their_rule() -> None:
    counts = {
        int(answer)
        for seed in range(60)
        for answer in [
            about_shapes(Draw(np.random.default_rng(seed), False, hard=True), (3, 3))["count"].answer
        ]
    }
    assert counts == {4, 5, 6}
    draw = Draw(np.random.default_rng(2), held_out=False)
    for _ in range(300):
        turn = edge_sums(draw)
        a, operator, b = re.search(r"(\d+)([+-])(\d+):", turn.thinking).groups()  # type: ignore[union-attr]
        assert a == b or len(a) == 1 or len(b) == 1
        size = abs(int(turn.answer))
        assert size == (int(a) + int(b) if operator == "+" else int(a) - int(b))
