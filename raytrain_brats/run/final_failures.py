"""Failures of workers that come again at every start, and what to do about them. Runs in Ray Train's controller.

In: the exceptions of a group's workers, the run's config.
Out: one line for a person, or nothing where another start may help.

They are told by their names and messages: the controller does not import torch.
"""

from raytrain_brats.config import Config

_OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NOT_BUILT = ("no kernel image is available", "CUDNN_STATUS_ARCH_MISMATCH", "CUBLAS_STATUS_ARCH_MISMATCH")


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was too small (that of a machine is another matter: Ray ends a process for it)."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(names & {"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}) or _any(_OUT_OF_MEMORY, error)


def not_built(error: BaseException) -> bool:
    """Whether torch, or a library of it, has no code for a GPU of this generation."""
    return _any(_NOT_BUILT, error)


def _any(phrases: tuple[str, ...], error: BaseException) -> bool:
    return any(phrase in str(error) for phrase in phrases)


def advice(error: BaseException, config: Config, trained_before: bool) -> str:
    """What was wrong and what to do, in one line; "" when the group may start again.

    `trained_before`: this run has come this far with the same settings, and it is the first failure since. Then memory
    may have been short because a process that was just killed still held its own.
    """
    cause = " ".join(str(error).split())[:200]
    if not_built(error):
        return (
            f"this torch has no code for the GPU ({cause}): install the build for its generation (docs/ec2.md: V100 "
            "needs another than A100), and see that `python -m raytrain_brats.check_gpus --workers N` is content"
        )
    if out_of_memory(error) and not trained_before:
        return f"the GPU's memory is too small ({cause}): {'; or '.join(_smaller(config))}"
    return ""


def _smaller(config: Config) -> list[str]:
    """What makes a step smaller, the best first. The last three are another training, so they need another run."""
    found, train = [], config.train
    if train.micro_batch != 1 and train.reduction == "fast":
        now = "auto; 1 is the least" if train.micro_batch == "auto" else train.micro_batch
        found.append(f"lower train.micro_batch (now {now}), which changes no result")
    if not train.amp:
        found.append("set train.amp: true")
    width, patch = config.network.width, "x".join(map(str, config.data.patch_xyz))
    found.append(f"with a new --run-dir a smaller data.patch_xyz (now {patch}) or network.{width} in the recipe")
    return [*found, "use GPUs with more memory"]
