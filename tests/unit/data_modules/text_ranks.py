"""Trains on two ranks with loader processes, saves in the middle, and resumes: a script of its own, since
Lightning starts the second rank by running the command again.

Arguments: folder of text, folder for what each rank was given.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from data_modules import TextStream


class Remembering(LightningModule):
    """Remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, index):
        self.seen.append(batch["tokens"])
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(text: str, folder: Path, name: str, steps: int, resume: Path | None) -> Trainer:
    data = TextStream([text], sequence_length=60, batch_size=4, validation_fraction=0, lanes=4, num_workers=2)
    model = Remembering()
    trainer = Trainer(max_steps=steps, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                      use_distributed_sampler=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    torch.save(torch.stack(model.seen), folder / f"{name}{trainer.global_rank}.pt")
    return trainer


if __name__ == "__main__":
    text, folder = sys.argv[1], Path(sys.argv[2])
    run(text, folder, "whole", 6, None)
    run(text, folder, "first", 3, None).save_checkpoint(folder / "3.ckpt")
    run(text, folder, "resumed", 6, folder / "3.ckpt")
