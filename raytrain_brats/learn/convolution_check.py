"""Is a GPU's 3D convolution right, and by cuDNN? Runs in a worker of `check_gpus`; not yet run on a GPU.

In: a device, the edge of a patch.
Out: time and memory in each precision that training may use, against float32; one line for each thing that is wrong.

In half precision torch 2.9 and later leave cuDNN 9.8 to 9.14 aside for most 3D convolutions: several times slower, and
with a copy of the image for each of the kernel's 27 places (pytorch#163581, #166122, #166643).
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

TOLERANCE = 0.05
"""Of half precision's results, as a share of the largest value; rounding makes less than 0.01."""
SLOWER, LARGER = 1.2, 3.0
"""Times float32's time, and memory, from which on it cannot be cuDNN: that halves the time, and needs at most one more
copy of image and result. The way without it took 4 times the time and 3 to 17 times the memory in reports."""
CHANNELS, SMALL_EDGE = 32, 24
PARTS = ("result", "gradient of the image", "gradient of the weights")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class Card:
    """A device and what torch makes of it."""

    name: str
    capability: tuple[int, int] | None
    """Compute capability; None for CPUs, whose time and memory are not judged."""
    built: tuple[str, ...]
    """What this torch has code for, such as sm_90."""
    torch: str
    cudnn: int
    """As torch.backends.cudnn.version(): 91002 is 9.10.2."""

    def __str__(self) -> str:
        if self.capability is None:
            return f"{self.name}, torch {self.torch}"
        major, minor = self.capability
        cudnn = f"{self.cudnn // 10000}.{self.cudnn // 100 % 100}.{self.cudnn % 100}"
        return f"{self.name}, sm_{major}{minor}, torch {self.torch}, cuDNN {cudnn}"


@dataclass(frozen=True)
class Measured:
    """A convolution forwards and backwards in one precision."""

    precision: str
    milliseconds: float
    peak_bytes: int
    """Beyond image, weights and what comes back from the layers behind; 0 where it cannot be told."""
    off: dict[str, float] = field(default_factory=dict)
    """Largest error of each part, as a share of its largest value."""

    def __str__(self) -> str:
        memory = f" {self.peak_bytes / 1e9:.2f} GB" if self.peak_bytes else ""
        return f"{self.precision} {self.milliseconds:.1f} ms{memory}"


def card_of(device: torch.device) -> Card:
    if device.type != "cuda":
        return Card("CPU", None, (), torch.__version__, 0)
    built, cudnn = tuple(torch.cuda.get_arch_list()), torch.backends.cudnn.version() or 0
    capability = torch.cuda.get_device_capability(device)
    return Card(torch.cuda.get_device_name(device), capability, built, torch.__version__, cudnn)


def not_built(card: Card) -> str:
    """One line when torch has no code for the card; code for an older one of the same generation runs on it."""
    if card.capability is None:
        return ""
    major, minor = card.capability
    if any(f"sm_{major}{older}" in card.built for older in range(minor + 1)):
        return ""
    return f"{card}: this torch was built for {', '.join(card.built)} only; {_remedy(card)}"


def precisions(card: Card) -> tuple[torch.dtype, ...]:
    """The reference, and then those that training may use."""
    if card.capability is None:
        return torch.float64, torch.float32
    half = (torch.bfloat16, torch.float16) if card.capability >= (8, 0) else (torch.float16,)
    return torch.float32, *half


def measure(device: torch.device, edge: int, tried: tuple[torch.dtype, ...]) -> list[Measured]:
    """A layer of a patch of `edge`^3 voxels in each precision: timed, and compared with the first without TF32; a small
    one also with the CPU in float64, as the first may be wrong too."""
    measured = []
    on_cpu, on_device = _Layer(torch.device("cpu"), SMALL_EDGE, 4), _Layer(device, edge, CHANNELS)
    small = _Layer(device, SMALL_EDGE, 4)
    with torch.backends.cudnn.flags(allow_tf32=False):
        wanted = on_cpu.run(torch.float64), on_device.run(tried[0])
    for dtype in tried:
        made = small.run(dtype), on_device.run(dtype)  # the second warms up, too
        pairs = list(zip(wanted, made, strict=True))
        off = {part: max(_off(right[n], found[n]) for right, found in pairs) for n, part in enumerate(PARTS)}
        del made, pairs
        measured.append(Measured(NAMES[dtype], *on_device.cost(dtype), off))
    return measured


class _Layer:
    """A convolution with its image and the gradient of its result, the same on every device."""

    def __init__(self, device: torch.device, edge: int, channels: int) -> None:
        draws = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws).to(device)

        self.device = device
        self.image, self.gradient = draw(1, channels, edge, edge, edge), draw(1, CHANNELS, edge, edge, edge) / 100
        self.weight = draw(CHANNELS, channels, 3, 3, 3) / (27 * channels) ** 0.5

    def run(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The parts, as in PARTS."""
        image, weight = (t.to(dtype, copy=True).requires_grad_() for t in (self.image, self.weight))
        result = nn.functional.conv3d(image, weight, padding=1)
        of_image, of_weight = torch.autograd.grad(result, (image, weight), self.gradient.to(dtype))
        return result.detach(), of_image, of_weight

    def cost(self, dtype: torch.dtype, rounds: int = 3) -> tuple[float, int]:
        """(milliseconds of the best round, peak bytes)."""
        image, weight = (t.to(dtype, copy=True).requires_grad_() for t in (self.image, self.weight))
        gradient, on_gpu = self.gradient.to(dtype), self.device.type == "cuda"
        held, best = 0, float("inf")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        for _ in range(rounds):
            began = now(self.device)
            torch.autograd.grad(nn.functional.conv3d(image, weight, padding=1), (image, weight), gradient)
            best = min(best, now(self.device) - began)
        return 1e3 * best, torch.cuda.max_memory_allocated(self.device) - held if on_gpu else 0


def _off(right: Tensor, found: Tensor) -> float:
    right, found = right.double(), found.to(right.device).double()
    share = float((found - right).abs().max() / right.abs().max())
    return share if share == share else float("inf")  # NaN is no small error


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def findings(card: Card, measured: list[Measured]) -> list[str]:
    """What is wrong, each in one line with what to do. `measured`: the reference first."""
    reference, found = measured[0], []
    for one in measured:
        wrong = [f"{part} off by {share:.1%}" for part, share in one.off.items() if not share < TOLERANCE]
        if wrong:
            found.append(f"{card}: a 3D convolution in {one.precision} is wrong: {', '.join(wrong)}; {_remedy(card)}")
    for one in measured[1:] if card.capability else []:
        longer = one.milliseconds / reference.milliseconds
        larger = one.peak_bytes / reference.peak_bytes if reference.peak_bytes else 0.0
        if longer > SLOWER or larger > LARGER:
            found.append(
                f"{card}: a 3D convolution in {one.precision} is not cuDNN's: {longer:.1f} times the time and "
                f"{larger:.1f} times the memory of {reference.precision}; {_remedy(card)}"
            )
    return found


def _remedy(card: Card) -> str:
    """Which torch is right for a card (docs/ec2.md)."""
    if card.capability and card.capability < (7, 5):
        return "install torch 2.8.0 of the index for CUDA 12.6: cuDNN 9.10 is the last one for cards before Turing"
    if card.capability and 90800 <= card.cudnn < 91500:
        return (
            "install a torch with cuDNN 9.15 or later (2.13 of PyPI has it), and let no other cuDNN stand in "
            "LD_LIBRARY_PATH"
        )
    return "try another build of torch, with another cuDNN, and let no other cuDNN stand in LD_LIBRARY_PATH"
