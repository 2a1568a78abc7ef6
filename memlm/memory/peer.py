"""Options of PEER: memory layers whose slots are experts of one neuron."""

from dataclasses import dataclass
from typing import Literal

from memlm.memory.config import MemoryConfig
from memlm.memory.layer import PreValues
from memlm.memory.query import QueryNorm


@dataclass
class PEERConfig(MemoryConfig):
    """PEER (Mixture of A Million Experts, arXiv 2407.04153).

    The defaults are those of the comparison in Memory Layers at Scale: 768 * 768 experts in one layer, 4
    heads of 32 reads. Its own paper has 1,048,576 experts: ``half_keys: 1024``, ``heads: 8``, ``reads: 16``.
    """

    half_keys: int | tuple[int, int] = 768
    """K: half keys in each of the two sets of a head; there are K * K experts. Two numbers [K0, K1] give the
    sets different sizes, and K0 * K1 experts."""
    count: int = 1
    """Number of PEER layers, placed around the middle of the model; only used if layers is not given."""
    key_dim: int | None = 256
    """Elements of a key, both halves together, even. null: half of the model dim."""
    gate: Literal["silu", "none"] = "none"
    """silu: the read is multiplied by silu of a linear map of the layer's input. none: it is not."""
    projection: bool = False
    """Whether a linear map from value dim to model dim follows the read (and the gate)."""
    pre_values: PreValues = "gelu"
    """Activation of the experts' neuron, of the dot product of the layer's input and the expert's row in the
    pool "<name>_down"; the expert's output is that times its row in the pool "<name>"."""
    query_norm: QueryNorm = "batch"
    """none, batch (BatchNorm of the query, as in the paper) or qk (queries and half keys normalised, with a
    learned gain)."""
