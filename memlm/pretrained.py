"""Starting from a pretrained model: its weights, and what is trained of it."""

from dataclasses import dataclass
from typing import Literal

from memlm.errors import ConfigError
from memlm.memory import MemoryPlan
from memlm.transformer.moe_config import MoEConfig


@dataclass
class PretrainedConfig:
    """Weights of a dense Llama-family model (or a mixture of experts) in the Hugging Face format.

    ``model.transformer`` (and ``model.moe``) come from the folder's config.json; keys that you set must agree
    with it.
    """

    folder: str
    """Folder with config.json and safetensors, sharded or not."""
    train: Literal["everything", "memory"] = "everything"
    """memory: only the memory layers and their pools are trained, all else stays as it was."""
    allow_pickle: bool = False
    """Whether pytorch_model.bin files may be read where there are no safetensors."""

    def validate(self, memory: MemoryPlan | None, experts: MoEConfig | None) -> None:
        """Check that what is added leaves the pretrained model what it is.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name in ("auxiliary_loss", "z_loss", "balance_rate"):
            if experts is not None and self.train == "memory" and getattr(experts, name):
                raise ConfigError(
                    f"model.moe.{name}",
                    f"is {getattr(experts, name)}, but model.pretrained.train is memory: the experts stay as "
                    "they are",
                )
        if memory is None:
            if self.train == "memory":
                raise ConfigError("model.pretrained.train", "is memory, but the model has no memory")
            return
        if memory.placed == "replace":
            raise ConfigError(
                "model.memory.mode",
                "is replace, which would throw pretrained feed-forward networks away; set it to beside",
            )
        if not memory.start_at_zero:
            raise ConfigError(
                "model.memory.start_at_zero",
                "is false: the new layers would disturb the pretrained model; set it to true",
            )


def is_memory(name: str) -> bool:
    """Whether a transformer's parameter of this name belongs to its memory."""
    return name.startswith("pools.") or ".memory." in name
