"""Parameters of one model may lie on several meshes of ranks, which one call of torch cannot mix."""

from collections.abc import Hashable, Iterable

from torch import Tensor


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in lists, each of those on one mesh, or of those on none; in the order of their first."""
    found: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())
