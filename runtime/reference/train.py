"""Trains kimi-vl-nano from a seed and writes it as a published checkpoint directory.

    python -m kimi_lite.runtime.reference.train RUN_DIR [--minutes 60] [--export kimi_lite/nano]
    torchrun --nproc-per-node 2 -m kimi_lite.runtime.reference.train RUN_DIR ...

Each step takes one batch of text and one of pictures; loss only on the assistant's turns. Batch n depends on the seed
and n alone, and RUN_DIR keeps weights, optimizer and step, so a run that is stopped and started again continues
exactly as if it had not been. Under torchrun each process has batches of its own, and gradients are averaged: products
of this size gain little from a second thread, so that is what more cores are for. Matrices are trained by Muon, the rest by AdamW; the experts' load is balanced by the
published rule, which moves the router's bias and adds no loss. Products run in bf16 where the processor has it.

The learning rate falls over `--minutes` of training time in all; started again with more, it rises once more.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F_
from numpy.typing import NDArray
from torch import Tensor, nn

from kimi_lite.formats.config import ImageConfig, ModelConfig
from kimi_lite.formats.safetensors_file import ShardSpec, write_shards
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime.reference.image import process
from kimi_lite.runtime.reference.model import KimiVL, expert_loads, load, published_tensors
from kimi_lite.runtime.reference.nano import FIRST_SPECIAL, NANO_TEXT, NANO_VISION, RANKS, TOKEN_LIMIT
from kimi_lite.runtime.reference.pictures import SLOTS
from kimi_lite.runtime.reference.random_checkpoint import (
    SPECIAL_NAMES,
    to_bf16,
    write_side_files,
)
from kimi_lite.runtime.reference.tasks import Draw, Sample, reading, shapes, text_sample, two_pictures
from kimi_lite.runtime.reference.text import MoE
from kimi_lite.runtime.reference.vision import merge_patches
from kimi_lite.runtime.template import ImagePart, Message, render
from kimi_lite.runtime.tokenizer import Tokenizer

TEXT_BATCH, TEXT_POOL = 32, 768  # a pool is sorted by length and cut into batches of like length
PICTURE_BATCH, TOWER_BATCH = 64, 128
# First text and shapes; then the tower alone learns what lies over each slot of a patch (which character, and the how
# manyeth; the how manyeth shape), in short steps; then all together.
TOWER_FROM, READING_FROM = 900, 8400
TOWER_RATE = 1.6  # learning rate at the start of the tower's own phase, as a multiple; 2 % of it at the end
HINT_SHARE = 0.5  # of the tower's task in the loss of the last phase
N_CODES, N_PLACES = 128, 9
MATRIX_RATE, OTHER_RATE = 0.003, 0.003
WEIGHT_DECAY = 0.02
BALANCE_RATE = 0.002
IGNORE = -100
BF16_HERE = (
    torch.cpu._is_avx512_bf16_supported()
)  # elsewhere such products are emulated, at a sixth of the speed


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids [B, T], targets [B, T] (IGNORE where there is no loss), pictures [N, P, 588] of one grid or none.

    `hint_NPS2` holds, for each slot of each patch, the character over it and its place in the text, 0 for none.
    """

    ids_BT: NDArray[np.int64]
    targets_BT: NDArray[np.int64]
    patches_NPX: NDArray[np.float32] | None = None
    grid: tuple[int, int] | None = None
    hint_NPS2: NDArray[np.int64] | None = None


def nano_config() -> ModelConfig:
    return ModelConfig(
        name="kimi-vl-nano",
        text=NANO_TEXT,
        vision=NANO_VISION,
        image=ImageConfig(token_limit=TOKEN_LIMIT),
        media_pad_id=FIRST_SPECIAL + 21,
    )


def nano_tokenizer() -> Tokenizer:
    specials = {name: FIRST_SPECIAL + offset for offset, name in SPECIAL_NAMES.items()}
    return Tokenizer(Vocab(RANKS, specials, NANO_TEXT.vocab_size))


def encode_sample(sample: Sample, tokenizer: Tokenizer, n_image_tokens: int) -> tuple[list[int], list[bool]]:
    """Token ids of the whole conversation, and which of them the model must produce.

    Earlier answers stand without their thinking, as a chat sends them back; so only the last reply is learned.
    """
    messages = []
    for i, turn in enumerate(sample.turns):
        pictures = [ImagePart(n_image_tokens)] * len(turn.pictures)
        messages.append(Message("user", [*pictures, turn.question]))
        if i < len(sample.turns) - 1:
            messages.append(Message("assistant", turn.answer))
    prompt = render(messages, tokenizer)
    reply = [*tokenizer.encode(sample.turns[-1].reply), tokenizer.special("<|im_end|>")]
    return prompt + reply, [False] * len(prompt) + [True] * len(reply)


def collate(samples: list[Sample], tokenizer: Tokenizer, pad_id: int) -> Batch:
    """Right-padded batch; causal attention makes the padding harmless. All pictures must share one grid."""
    image_config, patches, grid = ImageConfig(token_limit=TOKEN_LIMIT), [], None
    for sample in samples:
        for picture in sample.pictures:
            values, this = process(picture, image_config)
            assert grid in (None, this), f"grids {grid} and {this} in one batch"
            patches.append(values)
            grid = this
    n_tokens = grid[0] * grid[1] // 4 if grid else 0
    rows = [encode_sample(sample, tokenizer, n_tokens) for sample in samples]
    T = max(len(ids) for ids, _ in rows)
    ids_BT = np.full((len(rows), T), pad_id, np.int64)
    targets_BT = np.full((len(rows), T), IGNORE, np.int64)
    for i, (ids, learned) in enumerate(rows):
        ids_BT[i, : len(ids)] = ids
        targets_BT[i, : len(ids) - 1] = np.where(learned[1:], ids[1:], IGNORE)
    hints = [hint.reshape(-1, SLOTS, 2) for sample in samples for hint in sample.hints]
    return Batch(
        ids_BT, targets_BT, np.stack(patches) if patches else None, grid, np.stack(hints) if hints else None
    )


def make_batches(seed: int, step: int, process: int = 0) -> list[Batch]:
    """The batches of one step: text and pictures, or pictures alone in the tower's phase.

    Processes draw others of the same kind and size, so that none waits for another.
    """
    tokenizer, pad_id = nano_tokenizer(), NANO_TEXT.pad_id or 0
    size = np.random.default_rng((seed, 3, step))
    draw = Draw(
        np.random.default_rng((seed, 4, step, process)), held_out=False, hard=bool(size.random() < 0.5)
    )
    tower_alone = TOWER_FROM <= step < READING_FROM
    if step < TOWER_FROM or step % 4 == 1:
        grid = (int(size.integers(2, 5)), int(size.integers(2, 5)))
        pictures = [shapes(draw, grid) for _ in range(PICTURE_BATCH // 2)]
    elif step % 4 == 3 and not tower_alone:
        grid = (int(size.integers(2, 4)), int(size.integers(2, 6)))
        pictures = [two_pictures(draw, grid) for _ in range(PICTURE_BATCH // 2)]
    else:
        grid = (int(size.choice((1, 1, 2, 2, 3))), int(size.integers(2, 8)))
        pictures = [reading(draw, grid) for _ in range(TOWER_BATCH if tower_alone else PICTURE_BATCH)]
    seen = collate(pictures, tokenizer, pad_id)
    if tower_alone:
        return [seen]
    per_pool = TEXT_POOL // TEXT_BATCH
    words = Draw(np.random.default_rng((seed, 1, step // per_pool, process)), held_out=False)
    # Length follows the reply; sorting by it keeps padding small.
    pool = sorted(
        (text_sample(words) for _ in range(TEXT_POOL)),
        key=lambda s: len(s.turns[-1].reply) + 20 * len(s.turns),
    )
    order = np.random.default_rng((seed, 2, step // per_pool)).permutation(per_pool)
    at = int(order[step % per_pool]) * TEXT_BATCH
    return [collate(pool[at : at + TEXT_BATCH], tokenizer, pad_id), seen]


def prefetch(seed: int, start: int, process: int, ahead: int = 4) -> Iterator[list[Batch]]:
    """Batches made by one process beside the training."""
    with ProcessPoolExecutor(1) as pool:
        queue: list[Future[list[Batch]]] = [
            pool.submit(make_batches, seed, start + i, process) for i in range(ahead)
        ]
        step = start + ahead
        while True:
            yield queue.pop(0).result()
            queue.append(pool.submit(make_batches, seed, step, process))
            step += 1


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each by its mean over the processes of the run."""
    if dist.is_initialized():
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(whole)
        for tensor, mean in zip(tensors, torch.split(whole, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor) / dist.get_world_size())


def initialise(model: KimiVL, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                # Outputs that add to the residual stream start small, so that depth does not inflate it.
                small = name.endswith(("o.weight", "down.weight", "down", "wo.weight", "fc1.weight"))
                std = (
                    0.02
                    if name in ("text.embed", "text.head")
                    else parameter[0].numel() ** -0.5 * (0.4 if small else 1)
                )
                parameter.normal_(0, 0.02 if "positions" in name else std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def loss_of(model: KimiVL, hint: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the learned tokens, and of the tower's guess of what lies over its patches."""
    ids, targets = torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.targets_BT)
    rows, hint_loss = None, torch.zeros(())
    if batch.patches_NPX is not None:
        merged, hint_loss = look(model, hint, batch)
        rows = model.projector(merged)
    learned = targets != IGNORE
    logits = model(ids, rows, last=learned)
    return F_.cross_entropy(logits.float(), targets[learned]), hint_loss


def look(model: KimiVL, hint: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor]:
    """The tower's rows [N, P/4, 4, W], and the mean cross-entropy of characters and places guessed from them."""
    assert model.tower is not None
    assert batch.patches_NPX is not None
    assert batch.grid is not None
    assert batch.hint_NPS2 is not None
    merged = model.tower(torch.from_numpy(batch.patches_NPX), batch.grid)
    truth = torch.from_numpy(batch.hint_NPS2).flatten(2)
    codes, places = merge_patches(truth, batch.grid).reshape(-1, 2).unbind(-1)
    guess = hint(merged).float().view(-1, N_CODES + N_PLACES)
    loss = F_.cross_entropy(guess[:, N_CODES:], places)
    if bool(codes.any()):  # shapes have no characters
        loss = loss + F_.cross_entropy(guess[:, :N_CODES], codes)
    return merged, loss


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made nearly orthogonal: Jordan's method, scaled to AdamW's step length.

    As torch.optim.Muon, but in float32: that one multiplies in bfloat16, which costs four seconds a step on a processor
    that has no such products.
    """

    MOMENTUM, ROUNDS, QUINTIC = 0.95, 5, (3.4445, -4.7750, 2.0315)

    def __init__(self, matrices: list[nn.Parameter], rate: float) -> None:
        super().__init__(matrices, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = self.orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                matrix.mul_(1 - group["lr"] * WEIGHT_DECAY)
                matrix.sub_(update, alpha=group["lr"] * 0.2 * max(matrix.shape) ** 0.5)

    def orthogonal(self, x_AB: Tensor) -> Tensor:
        """The matrix with its singular values drawn towards one, by Newton-Schulz rounds of its odd quintic."""
        if x_AB.shape[0] > x_AB.shape[1]:
            return self.orthogonal(x_AB.T).T
        x_AB = x_AB / (x_AB.norm() + 1e-7)
        a, b, c = self.QUINTIC
        for _ in range(self.ROUNDS):
            gram_AA = x_AB @ x_AB.T
            x_AB = a * x_AB + (b * gram_AA + c * gram_AA @ gram_AA) @ x_AB
        return x_AB


class Trainer:
    """Model, optimizers and step; saved and restored as one file."""

    def __init__(self, run: Path, seed: int, start_from: Path | None = None, rate: float = 1.0) -> None:
        """A run of its own or the one that `run` holds; a new one may take its weights from a checkpoint.

        Such a run begins with the tower's phase: the checkpoint has learned the text.
        """
        self.run, self.seed, self.rate, self.step, self.trained_s = run, seed, rate, 0, 0.0
        self.model = KimiVL(nano_config())
        if start_from:
            self.model, self.step = load(start_from)[0].train(), TOWER_FROM
        else:
            initialise(self.model, seed)
        # The trainer's own, never exported: the slots of a patch from its row.
        self.hint = nn.Linear(NANO_VISION.hidden_size, SLOTS * (N_CODES + N_PLACES))
        with torch.no_grad():
            self.hint.weight.zero_()
            self.hint.bias.zero_()
        matrices = [
            p
            for n, p in self.model.named_parameters()
            if p.dim() == 2 and n not in ("text.embed", "text.head")
        ]
        ids = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in ids] + [*self.hint.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, MATRIX_RATE),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [MATRIX_RATE, OTHER_RATE]
        if (run / "state.pt").exists():
            state = torch.load(run / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.hint.load_state_dict(state["hint"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.trained_s = state["step"], state["trained_s"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "hint": self.hint.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "trained_s": self.trained_s,
        }
        torch.save(state, self.run / "state.tmp")
        (self.run / "state.tmp").replace(self.run / "state.pt")

    def update(self, batches: list[Batch], total_s: float) -> list[float]:
        """One step over all batches; returns the mean loss and hint loss of each."""
        tower_alone = len(batches) == 1
        if tower_alone:  # fall linearly
            progress = (self.step - TOWER_FROM) / (READING_FROM - TOWER_FROM)
            factor = TOWER_RATE * (1 - 0.98 * progress)
        else:  # warm up over 100 steps, hold, and fall linearly to 2 % over the last half of the time
            left = max(0.0, 1 - self.trained_s / total_s)
            factor = self.rate * min(1.0, (self.step + 1) / 100, max(0.02, left / 0.5))
        losses, loads = [], list[tuple[MoE, Tensor]]()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16_HERE):
                if tower_alone:
                    loss = hint_loss = look(self.model, self.hint, batch)[1]
                else:
                    loss, hint_loss = loss_of(self.model, self.hint, batch)
            (loss if tower_alone else loss + HINT_SHARE * hint_loss).backward()  # type: ignore[no-untyped-call]
            losses += [float(loss.detach()), float(hint_loss.detach())]
            loads += [
                (layer, load_E.float()) for layer, load_E in expert_loads(self.model) if not tower_alone
            ]
        parameters = [*self.model.parameters(), *self.hint.parameters()]
        average([p.grad for p in parameters if p.grad is not None] + [load_E for _, load_E in loads])
        for layer, load_E in loads:
            layer.router_bias += BALANCE_RATE * factor * torch.sign(load_E.mean() - load_E)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def train(self, total_s: float, export_dir: Path | None, every_s: float = 180) -> None:
        process = dist.get_rank() if dist.is_initialized() else 0
        seen: dict[str, list[float]] = {}
        saved = time.monotonic()
        log = (self.run / "log.jsonl").open("a", buffering=1)
        for batches in prefetch(self.seed, self.step, process):
            start = time.process_time()
            losses = self.update(batches, total_s)
            # The processor's time, so that a pause or a busy machine does not count as training.
            spent = torch.tensor((time.process_time() - start) / torch.get_num_threads())
            average([spent])
            self.trained_s += float(spent)
            hint = batches[-1].hint_NPS2
            kind = "reading" if hint is not None and hint[..., 0].any() else "shapes"
            if len(batches) > 1:
                seen.setdefault("text", []).append(losses[0])
                seen.setdefault(kind, []).append(losses[2])
            seen.setdefault(f"{kind}_hint", []).append(losses[-1])
            if self.step % 50 == 0 and not process:
                record: dict[str, float] = {"step": self.step, "trained_s": round(self.trained_s)}
                record |= {f"{name}_loss": round(sum(v) / len(v), 4) for name, v in seen.items()}
                print(json.dumps(record), flush=True)
                log.write(json.dumps(record) + "\n")
                seen.clear()
            over = self.trained_s >= total_s
            if not process and (over or time.monotonic() - saved > every_s):
                self.save()
                if export_dir:
                    export(self.model, export_dir)
                saved = time.monotonic()
            if over:
                return


def export(model: KimiVL, directory: Path, shard_bytes: int = 8 << 20) -> None:
    """Write the model as a published checkpoint directory, in bf16."""
    assert model.config.vision is not None
    write_side_files(directory, model.config.text, model.config.vision, RANKS, TOKEN_LIMIT)
    specs, patch = [], model.config.vision.patch_size
    for name, tensor in published_tensors(model):
        conv = name == "vision_tower.patch_embed.proj.weight"
        specs.append(ShardSpec(name, "BF16", (len(tensor), 3, patch, patch) if conv else tuple(tensor.shape)))
    values = ((n, to_bf16(t.float().numpy())) for n, t in published_tensors(model))
    for old in directory.glob("*.safetensors"):
        old.unlink()
    for _ in write_shards(directory, specs, values, shard_bytes):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of the run: state, log")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="training time in all, earlier runs counted"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rate",
        type=float,
        default=1.0,
        help="the learning rate when all learn together, as a multiple; less than 1 keeps what a tower has learned",
    )
    parser.add_argument(
        "--export", type=Path, help="directory of the checkpoint, rewritten every few minutes"
    )
    parser.add_argument(
        "--start-from", type=Path, help="a nano checkpoint whose weights a new run begins with"
    )
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # as torchrun says
        dist.init_process_group("gloo")
    trainer = Trainer(arguments.run, arguments.seed, arguments.start_from, arguments.rate)
    print(
        f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters, step {trainer.step}", flush=True
    )
    trainer.train(arguments.minutes * 60, arguments.export)


if __name__ == "__main__":
    main()
