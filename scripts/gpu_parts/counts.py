"""What a step asks of any device, counted on devices that have no values: copies, waits, bytes kept for backward.

In: the recipes. Out: uploads and readbacks a step; GB a patch of 4 x 128^3 and copied activations, in mixed precision.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain_brats.config import load
from raytrain_brats.data.patch import decode
from raytrain_brats.learn.model import build_network
from raytrain_brats.run.feed import Uploader, batch_of
from scripts.gpu_parts.setting import META, RECIPES, Setting, config, row, train_step

EDGE = 16
MOST_UPLOADS = 2


class Copies(TorchDispatchMode):
    """Counts what goes to the meta device, and who asks for a value of it."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads, self.readbacks = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and made.is_meta:
            self.uploads += any(isinstance(a, Tensor) and not a.is_meta for a in args)
        self.readbacks += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return made


def copies(setting: Setting) -> None:
    """A row of four patches and the step that trains them."""
    uploads, readbacks = [], []
    for recipe in RECIPES:
        for micro in (1, 4):
            step = train_step(config(recipe, EDGE, 4, f"train.micro_batch={micro}"), META)
            step.optimiser.step = lambda: None  # type: ignore[assignment, method-assign] # no such kernel on meta
            table = row(0, EDGE, 4)
            with Copies() as feed:
                _, mine = decode(table, Uploader(META))
            with Copies() as launch:
                step.launch(batch_of(mine, 0, META), 0)
            uploads.append(feed.uploads + launch.uploads)
            readbacks.append(launch.readbacks)
            facts = {"of_the_row": feed.uploads, "of_launch": launch.uploads, "readbacks": launch.readbacks}
            setting.findings.tell(f"copies in a step, {recipe}, micro_batch {micro}", "", **facts)
    setting.found |= {"uploads_per_step": max(uploads), "readbacks_in_launch": max(readbacks)}
    wrong = "a host that waits" if max(readbacks) else "more than 2 uploads" if max(uploads) > MOST_UPLOADS else ""
    setting.findings.tell("at most, in a step", wrong, uploads=max(uploads), readbacks=max(readbacks))


def kept_for_backward(setting: Setting) -> None:
    """The recipes' networks at full size, as shapes: no memory is used."""
    sizes, slices = {}, 0
    with as_on_gpus():
        for recipe in RECIPES:
            gigabytes, operations = kept(build_network(load(recipe)))
            sizes[recipe] = round(gigabytes, 2)
            slices += sum(count for name, count in operations.items() if "CopySlices" in name)
    setting.found |= {"saved_gb_per_patch": sizes, "copy_slices": slices}
    wrong = "activations are copied whole" if slices else ""
    setting.findings.tell("kept for backward, GB a patch of 128^3", wrong, **sizes, copy_slices=slices)


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Autocast on CPUs takes the two operations on which it differs from that on GPUs to float32, as theirs does."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")

    def in_float32(operation: Any) -> Any:
        def run(*arguments: Any) -> Any:
            taken = [a.float() if isinstance(a, Tensor) else a for a in arguments]
            with torch.autocast("cpu", enabled=False):
                return operation(*taken)

        return run

    library.impl("group_norm", in_float32(torch.ops.aten.group_norm.default))
    library.impl("upsample_trilinear3d.vec", in_float32(torch.ops.aten.upsample_trilinear3d.vec))
    try:
        yield
    finally:
        library._destroy()


def kept(network: nn.Module) -> tuple[float, Counter[str]]:
    """(GB that backward of one patch keeps beside the weights, operations in its graph)."""
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with FakeTensorMode():
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            outputs = network(torch.empty(1, 4, 128, 128, 128))
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
        seen: set[Any] = set()
        todo: list[Any] = [o.grad_fn for o in ([outputs] if isinstance(outputs, Tensor) else outputs)]
        while todo:
            if (node := todo.pop()) and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
    gigabytes = sum(size for key, size in storages.items() if key not in weights) / 1e9
    return gigabytes, Counter(node.name() for node in seen)
