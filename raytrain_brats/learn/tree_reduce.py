"""Sum the samples' gradients in an order that does not depend on the number of ranks. Runs in a worker.

In: one vector per sample of this rank, named by the sample's place in the global step.
Out: their sum over the global step, bit-equal at any world size.

Why: float addition is not associative ((a + b) + c rounds differently from a + (b + c)), so an all-reduce over ranks
gives other last bits at every world size, and a resumed run would drift from the uninterrupted one. It is commutative
in IEEE 754, so it is enough to fix which partial sums are added; who adds them, and when, does not matter.

Why a tree: with a fixed chain (0 + 1) + 2 + ... no rank could add its own samples before those of the others. The tree
over the places 0 .. n-1 folds halves: at width w, place j + w/2 is added to place j, then w halves, down to one. A rank
has every W-th place, so when W is a power of two its places are one complete subtree and it sends one vector, as an
all-reduce would: each rank completes the tree for one W-th of the vector, then all gather the parts. At other world
sizes ranks send more, up to a vector per sample.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, distributed

Node = tuple[int, int]
"""(width, j): the sum of the places j, j + width, j + 2 width, ..."""


def order(places: Iterable[int], total: int) -> list[int]:
    """The places in the order in which to compute their vectors, so that few partial sums exist at a time.

    By reversed bits: siblings at the widest level differ in the highest bit, so they come next to each other.
    """
    width = _width(total)
    bits = width.bit_length() - 1
    return sorted(places, key=lambda place: int(f"{place:0{bits}b}"[::-1], 2) if bits else 0)


def fold(vectors: Iterable[tuple[Node, Tensor]], total: int) -> dict[Node, Tensor]:
    """Add siblings as soon as both are there, in place; the nodes that are left wait for vectors of other ranks."""
    waiting: dict[Node, Tensor] = {}
    for node, vector in vectors:
        summed = vector
        for upper, sibling in _path_to_root(node, total):
            if sibling is not None:
                if sibling not in waiting:
                    break
                summed = waiting.pop(sibling).add_(summed)
            node = upper
        waiting[node] = summed
    return waiting


def held(places: Iterable[int], total: int) -> list[Node]:
    """The nodes that `fold` leaves of these places, sorted: what a rank sends. Any rank can compute any rank's."""
    nothing = torch.empty(0)
    return sorted(fold(((leaf(place, total), nothing) for place in places), total))


def leaf(place: int, total: int) -> Node:
    return _width(total), place


def _width(total: int) -> int:
    return 1 << (total - 1).bit_length()


def _path_to_root(node: Node, total: int) -> Iterator[tuple[Node, Node | None]]:
    """(parent, sibling) of each node up to the root; the sibling is None where no place of the step is below it."""
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
    # All-to-all, not all-reduce: the library's reduction would choose the order of its additions itself. Each rank
    # receives one W-th of every node's vector, adds along the tree, and so does one W-th of the work.
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
