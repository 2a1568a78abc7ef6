"""Callbacks: what watches a run or steps into it.

To add one, write a subclass of `lightning.pytorch.Callback` into a file of this directory and name it in a
YAML under ``trainer.callbacks`` by its class name.
"""

from callbacks.expert_load import ExpertLoad
from callbacks.samples import Samples
from callbacks.slot_usage import SlotUsage
from callbacks.tasks import Tasks
from callbacks.throughput import Throughput

__all__ = ["ExpertLoad", "Samples", "SlotUsage", "Tasks", "Throughput"]
