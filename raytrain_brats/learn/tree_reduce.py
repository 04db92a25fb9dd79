"""Sum the samples' gradients in an order that does not depend on the number of ranks.

In: one vector per sample of this rank, named by the sample's place in the global step.
Out: their sum over the global step, bit-equal at any world size.

The order is a tree over the places 0 .. n-1 that folds halves: of a width w, place j is added to place j + w/2, and so
on down to one. A rank deals with every W-th place, so when W is a power of two its places are a whole subtree and it
sends one vector, as an all-reduce would: each rank finishes the tree for one W-th of the vector, then all gather the
parts. At other world sizes ranks send more, up to a vector per sample. IEEE addition commutes, so only the tree counts.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, distributed

Node = tuple[int, int]
"""(width, j): the sum of the places j, j + width, j + 2 width, ..."""


def order(places: Iterable[int], total: int) -> list[int]:
    """The places in the order in which their vectors are best made: few partial sums wait at a time."""
    width = _width(total)
    bits = width.bit_length() - 1
    return sorted(places, key=lambda place: int(f"{place:0{bits}b}"[::-1], 2) if bits else 0)


def fold(vectors: Iterable[tuple[Node, Tensor]], total: int) -> dict[Node, Tensor]:
    """Add up what belongs together, in place; what waits for another rank's part stays as it is."""
    waiting: dict[Node, Tensor] = {}
    for node, vector in vectors:
        summed = vector
        for upper, sibling in _way_up(node, total):
            if sibling is not None:
                if sibling not in waiting:
                    break
                summed = waiting.pop(sibling).add_(summed)
            node = upper
        waiting[node] = summed
    return waiting


def held(places: Iterable[int], total: int) -> list[Node]:
    """The nodes that `fold` leaves of these places, sorted: what a rank sends."""
    nothing = torch.empty(0)
    return sorted(fold(((leaf(place, total), nothing) for place in places), total))


def leaf(place: int, total: int) -> Node:
    return _width(total), place


def _width(total: int) -> int:
    return 1 << (total - 1).bit_length()


def _way_up(node: Node, total: int) -> Iterator[tuple[Node, Node | None]]:
    """(the node above, the other node it is the sum with or None) up to the root."""
    width, j = node
    while width > 1:
        half = width // 2
        other = j ^ half
        yield (half, j % half), (width, other) if other < total else None
        width, j = half, j % half


def sum_over_ranks(mine: dict[Node, Tensor], places: list[list[int]], total: int) -> Tensor:
    """The root of the tree, on every rank. `mine` is this rank's `fold`; `places` are those of each rank."""
    world_size = len(places)
    if world_size == 1:
        (root,) = mine.values()
        return root
    nodes = [held(own, total) for own in places]
    here = nodes[distributed.get_rank()]
    length = mine[here[0]].numel()
    share = -(-length // world_size)
    sent = mine[here[0]].new_zeros(world_size, len(here), share)
    for row, node in enumerate(here):
        for rank, part in enumerate(mine.pop(node).split(share)):
            sent[rank, row, : part.numel()] = part
    arriving = [len(of_rank) for of_rank in nodes]
    received = sent.new_empty(sum(arriving), share)
    distributed.all_to_all_single(
        received.view(-1), sent.view(-1), [n * share for n in arriving], [len(here) * share] * world_size
    )
    names = [node for of_rank in nodes for node in of_rank]
    (part,) = fold(zip(names, received.unbind(), strict=True), total).values()
    whole = part.new_empty(world_size * share)
    distributed.all_gather_into_tensor(whole, part.contiguous())
    return whole[:length]
