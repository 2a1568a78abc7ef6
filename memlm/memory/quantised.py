"""Values of one byte an element, for inference: int8 or fp8 rows, each with a scale of its own."""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from memlm.kernels import cpu_quantised
from memlm.kernels.checks import check_dot, check_read
from memlm.memory.exchange import Alone, Pending, Sent
from memlm.memory.file_rows import FileRows
from memlm.memory.pool import MemoryPool
from memlm.memory.value_expansion import expanded

Format = Literal["float32", "bfloat16", "int8", "fp8"]
"""How the values of a pool are held; fp8 is float8_e4m3fn."""

FORMATS: tuple[str, ...] = get_args(Format)
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The formats that have scales, and their types."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Elements of a chunk of rows: 8 MB of fp32, which stay in a CPU's last-level cache.
_CHUNK_ELEMENTS = 2_000_000


class HasPools(Protocol):
    """A transformer, as far as it matters here."""

    pools: nn.ModuleDict


@torch.no_grad()
def quantise(values: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    """Values in another format.

    Every row has a scale, its largest magnitude divided by the format's (127 or 448): ``row = scale * code``,
    codes rounded to nearest. A row of zeros has the scale 0. No temporary grows with the table.

    Args:
        values: ``[S, V]`` floating point, on any device; it may be mapped from a file.
        format: One of :data:`FORMATS`.

    Returns:
        values: ``[S, V]`` of the format's type; the argument itself if it is of that type already.
        scales: ``[S]`` fp32, or None for float32 and bfloat16.

    Raises:
        ValueError: There is no such format, or a row holds NaN or infinity; names it.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r} of values; expected one of {', '.join(FORMATS)}")
    if format not in QUANTISED:
        return values.to(getattr(torch, format)), None
    dtype = QUANTISED[format]
    largest = _LARGEST[dtype]
    codes = torch.empty(values.shape, dtype=dtype, device=values.device)
    scales = torch.empty(len(values), dtype=torch.float32, device=values.device)
    for part in row_chunks(values):
        rows = values[part].float()
        size = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
        if not bool(size.isfinite().all()):
            row = part.start + int((~size.isfinite()).nonzero()[0])
            raise ValueError(
                f"row {row} of the values holds NaN or infinity, which {format} has no place for"
            )
        scale = size / largest
        # A row so small that its scale vanishes is one of zeros.
        # Not in place: rows of fp32 are the table's own.
        rows = (rows / torch.where(scale > 0, scale, torch.inf).unsqueeze(1)).clamp_(-largest, largest)
        codes[part] = (rows.round_() if dtype == torch.int8 else rows).to(dtype)
        scales[part] = scale
    return codes, scales


@torch.no_grad()
def dequantise(values: Tensor, scales: Tensor, into: Tensor) -> Tensor:
    """The inverse of :func:`quantise`, by chunks of rows.

    Args:
        values: ``[S, V]`` int8 or float8_e4m3fn.
        scales: ``[S]`` fp32.
        into: ``[S, V]`` floating point, filled and returned.
    """
    for part in row_chunks(values):
        into[part] = values[part].float() * scales[part].unsqueeze(1)
    return into


def row_chunks(table: Tensor) -> Iterator[slice]:
    """Slices of rows whose fp32 copies stay small, from first to last."""
    step = max(1, _CHUNK_ELEMENTS // max(1, table.shape[1]))
    for start in range(0, table.shape[0], step):
        yield slice(start, min(start + step, table.shape[0]))


class QuantisedPool(nn.Module):
    """A pool of int8 or fp8 values, read as a :class:`~memlm.memory.pool.MemoryPool` is; it has no gradient.

    Args:
        slots: ``S``, rows of the table.
        value_dim: ``V``, elements of a row.
        format: ``int8`` or ``fp8``.
        device: Of the buffers, which are not filled.

    Attributes:
        values: ``[S, V]`` buffer, int8 or float8_e4m3fn.
        scales: ``[S]`` fp32 buffer, one for each row.
        observers: As of a :class:`~memlm.memory.pool.MemoryPool`.
        file_rows: See :func:`memlm.memory.mapped.bound_residency`.
    """

    values: Tensor
    scales: Tensor

    def __init__(
        self, slots: int, value_dim: int, format: str, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.slots, self.value_dim = slots, value_dim
        dtype = QUANTISED[format]
        self.register_buffer("values", torch.empty(slots, value_dim, dtype=dtype, device=device))
        self.register_buffer("scales", torch.empty(slots, dtype=torch.float32, device=device))
        self.observers: list[Callable[[Tensor, Tensor], None]] = []
        self.file_rows: FileRows | None = None

    @torch.compiler.disable
    @torch.no_grad()
    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As :meth:`MemoryPool.read`; ``[N, V]`` fp32."""
        check_read(self.values, slots, weights)
        for observe in self.observers:
            observe(slots, weights)
        return self._by_device(cpu_quantised.weighted_read, _weighted_read, slots, weights)

    @torch.compiler.disable
    @torch.no_grad()
    def dot(self, slots: Tensor, hidden: Tensor) -> Tensor:
        """As :meth:`MemoryPool.dot`; ``[N, L]`` fp32."""
        check_dot(self.values, slots, hidden)
        for observe in self.observers:
            observe(slots, torch.ones(slots.shape, dtype=torch.float32, device=slots.device))
        return self._by_device(cpu_quantised.dots, _dots, slots, hidden)

    def send(self, slots: Tensor, expansion: int = 1) -> Sent:
        """As :meth:`MemoryPool.send`; there is nobody to send to."""
        return Sent(slots, Alone().gather(slots), self.slots, expansion)

    def start_read(self, slots: Sent, weights: Tensor) -> Pending:
        """As :meth:`MemoryPool.start_read`."""
        answer = self.read(*expanded(slots.own, weights, self.slots, slots.expansion))
        return Pending(lambda: Alone().gather(answer))

    def start_dot(self, slots: Sent, hidden: Tensor) -> Pending:
        """As :meth:`MemoryPool.start_dot`."""
        answer = self.dot(slots.rows_of(slots.own), hidden)
        return Pending(lambda: Alone().gather(answer))

    def _by_device(self, on_cpu: "_Operation", elsewhere: "_Operation", slots: Tensor, x: Tensor) -> Tensor:
        if self.file_rows is not None:
            return self.file_rows.apply(
                lambda table, rows, slots, x: on_cpu(table, self.scales[rows], slots, x), slots, x
            )
        operation = on_cpu if self.values.device.type == "cpu" else elsewhere
        return operation(self.values, self.scales, slots, x)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, value_dim={self.value_dim}, dtype={self.values.dtype}"


_Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of values, scales, slots and the other factors."""


def held_as(pool: MemoryPool, format: str) -> MemoryPool | QuantisedPool:
    """A pool of the same values in another format, frozen.

    Raises:
        ValueError: As :func:`quantise`.
    """
    values, scales = quantise(pool.values.detach(), format)
    held: MemoryPool | QuantisedPool
    with torch.device("meta"):  # what it holds is put in at once
        if scales is None:
            held = MemoryPool(pool.slots, pool.value_dim, values.dtype, pool.gradient.kernels)
        else:
            held = QuantisedPool(pool.slots, pool.value_dim, format)
    if scales is None:
        held.values = nn.Parameter(values, requires_grad=False)
    else:
        held.values, held.scales = values, scales
    held.observers = list(pool.observers)
    return held


def use_quantised(model: HasPools, format: str) -> None:
    """Make the pools of a model such as hold values of a quantised format; they are not filled.

    The state dict then has ``pools.<name>.values`` and ``pools.<name>.scales``.

    Args:
        model: A transformer, on the meta device or any other.
        format: ``int8`` or ``fp8``.
    """
    for name, pool in list(model.pools.items()):
        assert isinstance(pool, MemoryPool)
        model.pools[name] = QuantisedPool(pool.slots, pool.value_dim, format, pool.values.device)


def _weighted_read(values: Tensor, scales: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    result = torch.empty(slots.shape[0], values.shape[1], dtype=torch.float32, device=values.device)
    for part, rows in _gathered(values, slots):
        weighted = weights[part].float() * scales[slots[part].long()]
        result[part] = torch.bmm(weighted.unsqueeze(1), rows).squeeze(1)
    return result


def _dots(values: Tensor, scales: Tensor, slots: Tensor, hidden: Tensor) -> Tensor:
    result = torch.empty(slots.shape, dtype=torch.float32, device=values.device)
    for part, rows in _gathered(values, slots):
        products = torch.bmm(rows, hidden[part].float().unsqueeze(-1)).squeeze(-1)
        result[part] = products * scales[slots[part].long()]
    return result


def _gathered(values: Tensor, slots: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens, and the codes of their rows in fp32, ``[n, L, V]``, in pieces of bounded size."""
    step = max(1, _CHUNK_ELEMENTS // max(1, slots.shape[1] * values.shape[1]))
    for start in range(0, slots.shape[0], step):
        part = slice(start, start + step)
        # Not every device has an index for fp8: its bits are gathered.
        yield part, values.view(torch.int8)[slots[part].long()].view(values.dtype).float()
