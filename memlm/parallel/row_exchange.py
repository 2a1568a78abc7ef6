"""What groups exchange in a step: the row gradients of replicas, and the rows that their owners have updated.

Of the ``D`` replicas of a slice each owns a block of consecutive rows: their sums over all replicas come to
it, it alone has their optimizer state and updates them, and it gives the new rows to the others.

Where few rows are touched, rows are sent with their numbers; where most are, whole stretches of the blocks,
which an owner adds up without sorting: by an all-to-all and additions in fp32, which took half as long as
gloo's reduce-scatter, and send as many bytes. Both ways give the same sums but for the last bit, in which the
order of three and more addends shows. Either way a stretch of all blocks is exchanged at a time, so that what
is sent and received is never as large as the table.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from memlm.kernels.backend import select
from memlm.kernels.interface import RowSums, slot_dtype
from memlm.parallel.collectives import all_gather
from memlm.parallel.group_exchange import narrowed
from memlm.parallel.mesh import MemoryMesh

_ELEMENTS_AT_ONCE = 1 << 22
"""Of rows that all replicas send to all others at a time."""

MERGE_WHOLE_ABOVE, SHARE_WHOLE_ABOVE = 0.95, 0.8
"""Shares of touched rows from which whole stretches take no longer, or less.

Measured by ``benchmarks/row_exchange.py`` on two and four gloo processes of one machine, not on NCCL.
"""


class RowExchange:
    """The row gradient and the rows of one table among all ranks.

    Args:
        table: ``[S, V / G]``, this rank's columns of the values.
        mesh: Of the ranks that hold the other columns, and of those that hold the same.
        kernels: See :func:`memlm.kernels.backend.select`.
        merge_whole_above: Share of the rows that a replica touches, above which in one of them all rows' sums
            are sent; the same on all ranks.
        share_whole_above: Share of an owner's rows that it updates, above which in one of them all rows are
            shared.
        wire_dtype: What sums travel to their owners as, which adds them up in fp32; default: fp32.

    Attributes:
        first: The first row that this rank owns.
        rows: How many it owns: ``ceil(S / D)``, but for the last ranks, as ``Shard(0)`` divides.
        first_column: The first of this rank's columns in the whole table.
        split: ``G``, ranks that share the columns.
    """

    def __init__(
        self,
        table: Tensor,
        mesh: MemoryMesh,
        kernels: str,
        merge_whole_above: float = MERGE_WHOLE_ABOVE,
        share_whole_above: float = SHARE_WHOLE_ABOVE,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.table, self.mesh, self.kernels, self.wire_dtype = table, mesh, kernels, wire_dtype
        self.merge_whole_above, self.share_whole_above = merge_whole_above, share_whole_above
        self.group, self.replicas = mesh.group, mesh.replicas
        slots, width = table.shape
        self.block = -(-slots // mesh.groups)
        self.first = min(mesh.replica * self.block, slots)
        self.rows = min(self.block, slots - self.first)
        self.first_column, self.split = mesh.place * width, mesh.group_size

    def owned(self) -> Tensor:
        """The rows and columns this rank updates, ``[S, V]`` as a DTensor over the table's own memory."""
        slots, width = self.table.shape
        return DTensor.from_local(
            self.table[self.first : self.first + self.rows],
            self.mesh.mesh,
            [Shard(0), Shard(1)],
            run_check=False,
            shape=torch.Size((slots, width * self.split)),
            stride=(width * self.split, 1),
        )

    def merge(self, own: RowSums | None) -> RowSums:
        """The mean over all ranks of their row gradients, of the rows that this one owns.

        Every rank must call this, whether it has read anything or not.

        Args:
            own: What this rank's group has summed, which may be overwritten; None for nothing.

        Returns:
            Rows counted from :attr:`first`; ``sums`` of this rank's columns, ``squares`` of all columns.
        """
        rows, sums = self._counted(own)
        ranks = self.split * self.replicas.size()
        if self.replicas.size() > 1:
            rows, sums = self._to_owners(rows, sums)
        if ranks > 1:
            sums /= ranks
        squares = sums.new_empty(len(sums))
        for part, of_part in zip(sums.split(self._at_once), squares.split(self._at_once), strict=True):
            torch.sum(part.square(), -1, out=of_part)
        if self.split > 1:
            # The ranks of a group have gathered the same slots, and so have the same rows in the same order.
            dist.all_reduce(squares, group=self.group)
        return RowSums(rows, sums, squares)

    def share(self, rows: Tensor) -> None:
        """Give the rows that this rank has updated to its replicas, and take theirs.

        Args:
            rows: ``[U]``, counted from :attr:`first`.
        """
        if self.replicas.size() == 1:
            return
        updated = self._of_all(torch.tensor([len(rows)], device=self.table.device)).flatten().tolist()
        if max(updated) > self.share_whole_above * self.block:
            self._share_blocks()
        else:
            self._share_rows((rows + self.first).to(slot_dtype(len(self.table))), updated)

    def sum_over_owners(self, x: Tensor) -> Tensor:
        """Sum over the replicas of a scalar of their own rows."""
        if self.replicas.size() > 1:
            dist.all_reduce(x, group=self.replicas)
        return x

    # -- helpers

    def _on_the_wire(self, sums: Tensor) -> Tensor:
        return sums if self.wire_dtype is None else narrowed(sums, self.wire_dtype)

    @property
    def _at_once(self) -> int:
        """Rows of a replica that are exchanged at a time."""
        return max(_ELEMENTS_AT_ONCE // self.table.shape[1] // self.replicas.size(), 1)

    def _counted(self, own: RowSums | None) -> tuple[Tensor, Tensor]:
        kind = slot_dtype(len(self.table))
        if own is None:
            dtype = torch.promote_types(self.table.dtype, torch.float32)
            nothing = self.table.new_zeros(0, dtype=kind)
            return nothing, self.table.new_zeros(0, self.table.shape[1], dtype=dtype)
        count = len(own.rows) if own.count is None else int(own.count)
        return own.rows[:count].to(kind), own.sums[:count]

    def _of_all(self, own: Tensor) -> Tensor:
        """Tensors of one shape of all replicas, ``[D, ...]``."""
        taken = own.new_empty(self.replicas.size(), *own.shape)
        all_gather(taken.flatten(0, 1), own.contiguous(), self.replicas)
        return taken

    def _swapped(
        self, own: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Tensor:
        """Parts of a tensor to their owners, and what the replicas have sent; equal parts unless said."""
        taken = own.new_empty(len(own) if received is None else sum(received), *own.shape[1:])
        dist.all_to_all_single(taken, own.contiguous(), received, sent, group=self.replicas)
        return taken

    # -- helpers: sums to owners

    def _to_owners(self, rows: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Send each row's sum to its owner; add up what comes for the rows that this rank owns."""
        touched = self._ends(rows, self.block).diff()
        counts = self._of_all(touched.flatten())
        if int(counts.sum(1).max()) > self.merge_whole_above * len(self.table):
            return self._sums_of_stretches(rows, sums)
        # The rows of a stretch are as many as can be exchanged at once, if they lie evenly. Few of many that
        # lie closely are more: at most the geometric mean of that and all.
        turns = -(-int(counts.max()) // self._at_once)
        if turns <= 1:
            return next(self._sums_of_rows(rows, sums, self.block))[1]
        room = min(int(counts[:, self.mesh.replica].sum()), self.rows)
        numbers, total, filled = rows.new_empty(room), sums.new_empty(room, sums.shape[1]), 0
        for start, (part, of_part) in self._sums_of_rows(rows, sums, -(-self.block // turns)):
            end = filled + len(part)
            numbers[filled:end], total[filled:end] = part + start, of_part
            filled = end
        return numbers[:filled], total[:filled]

    def _ends(self, rows: Tensor, size: int) -> Tensor:
        """Where stretches of so many rows of each block begin and end in a list, ``[D, turns + 1]``."""
        starts = torch.arange(0, self.block + size, size, device=rows.device).clamp_(max=self.block)
        blocks = torch.arange(self.replicas.size(), device=rows.device) * self.block
        # Rows ascend: those of a stretch lie together.
        return torch.searchsorted(rows.long(), (blocks[:, None] + starts).contiguous())

    def _sums_of_rows(
        self, rows: Tensor, sums: Tensor, size: int
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Stretch by stretch of this rank's block its start, the touched rows from there, and their sums."""
        ends = self._ends(rows, size)
        sent = ends.diff()
        received = self._swapped(sent).T.tolist()
        backend = select(sums.device, self.kernels)
        places, sizes = ends.tolist(), sent.T.tolist()
        for turn, (taken, given) in enumerate(zip(received, sizes, strict=True)):
            start = turn * size
            mine = [slice(of_block[turn], of_block[turn + 1]) for of_block in places]
            whole = len(sizes) == 1
            numbers = self._swapped(rows if whole else torch.cat([rows[part] for part in mine]), taken, given)
            parts = sums if whole else torch.cat([sums[part] for part in mine])
            values = self._swapped(self._on_the_wire(parts), taken, given)
            ones = torch.ones(len(numbers), dtype=sums.dtype, device=sums.device)
            numbers = numbers - (self.first + start)
            yield start, self._counted(backend.row_sums(numbers, ones, 1, values, size))

    def _sums_of_stretches(self, rows: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The touched rows of this rank's block, and their sums, where all rows are sent, touched or not."""
        size = min(self._at_once, self.block)
        places = self._ends(rows, size).tolist()
        given = self._on_the_wire(sums[:0]).new_empty(len(places), size, sums.shape[1])
        taken = torch.empty_like(given)
        flags = torch.empty(len(places), size, dtype=torch.uint8, device=sums.device)
        numbers, total, filled = rows.new_empty(self.rows), sums.new_empty(self.rows, sums.shape[1]), 0
        for turn in range(len(places[0]) - 1):
            start = turn * size
            flags.zero_()
            for owner, of_block in enumerate(places):
                mine = slice(of_block[turn], of_block[turn + 1])
                stretch = rows[mine].long() - (owner * self.block + start)
                flags[owner].index_fill_(0, stretch, 1)
                if len(stretch) < size:
                    given[owner].zero_()
                given[owner].index_copy_(0, stretch, self._on_the_wire(sums[mine]))
            dist.all_to_all_single(taken, given, group=self.replicas)
            touched = self._swapped(flags).amax(0).nonzero().flatten()
            end = filled + len(touched)
            numbers[filled:end] = touched + start
            self._add_up(taken, touched, total[filled:end])
            filled = end
        return numbers[:filled], total[:filled]

    @staticmethod
    def _add_up(parts: Tensor, rows: Tensor, out: Tensor) -> None:
        """Sums of those rows of each replica's part, in the order of the ranks, as the kernels add."""
        total, *others = parts
        total = total.to(out.dtype)
        for other in others:
            total += other
        torch.index_select(total, 0, rows, out=out)

    # -- helpers: rows to replicas

    def _share_blocks(self) -> None:
        """Whole stretches of all blocks."""
        size = min(self._at_once, self.block)
        own = self.table.new_zeros(size, self.table.shape[1])
        for start in range(0, self.block, size):
            mine = self.table[self.first + start : self.first + min(start + size, self.rows)]
            own[: len(mine)] = mine
            for replica, part in enumerate(self._of_all(own)):
                first = replica * self.block + start
                end = min(first + size, (replica + 1) * self.block, len(self.table))
                self.table[first:end] = part[: max(end - first, 0)]

    def _share_rows(self, rows: Tensor, updated: list[int]) -> None:
        """Rows and their numbers; as many of each replica as of the one that has most."""
        for start in range(0, max(updated), self._at_once):
            sizes = [min(max(other - start, 0), self._at_once) for other in updated]
            mine = rows[start : start + self._at_once]
            numbers = rows.new_zeros(max(sizes))
            numbers[: len(mine)] = mine
            values = self._of_all(self.table[numbers])
            for size, taken, new in zip(sizes, self._of_all(numbers), values, strict=True):
                self.table.index_copy_(0, taken[:size].long(), new[:size])
