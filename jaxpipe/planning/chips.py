"""Chips by their data sheets, and how much of a data sheet a program really gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at best.

    Attributes:
      name: as it is usually called.
      bf16, fp8, tf32, f32: FLOP/s of dense matrix products of these operands (no sparsity). Where a chip has no unit
        for FP8, `fp8` is what it does in bfloat16.
      hbm: bytes/s between the chip and its memory.
      interconnect: bytes/s that the device sends to, and at the same time receives from, the others of its node.
      internode: bytes/s, likewise, to devices of other nodes.
      latency_us: microseconds that a collective takes however little it moves.
      sms: number of streaming multiprocessors.
      memory: bytes.
      host: bytes/s that the device sends to its host's memory, and at the same time receives from there.

    >>> CHIPS["H200"].hbm / CHIPS["H100"].hbm > 1.4
    True
    """

    name: str
    bf16: float
    fp8: float
    tf32: float
    f32: float
    hbm: float
    interconnect: float
    internode: float
    latency_us: float
    sms: int
    memory: float
    host: float = 64e9

    def __post_init__(self):
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        for name, value in numbers.items():
            if not value > 0 and not (name == "latency_us" and value == 0):
                raise ValueError(f"{self.name}: {name}={value} must be positive")

    def flops(self, dtype: str) -> float:
        """FLOP/s at best of a product in one of "fp8", "bf16", "tf32", "f32", "f64"; f64 counts as half of f32."""
        rates = {"fp8": self.fp8, "bf16": self.bf16, "tf32": self.tf32, "f32": self.f32, "f64": self.f32 / 2}
        if dtype not in rates:
            raise ValueError(f"flops({dtype!r}): a product is one of {', '.join(rates)}")
        return rates[dtype]


class KernelShare(NamedTuple):
    """What one kernel reaches of a chip's best.

    Attributes:
      matmul: share of the FLOP/s; None: as all others.
      memory: share of the memory's bytes/s; None: as all others.
      fill: by how much the sum that each tile of results is made of is longer in time than it is, since nothing is
        multiplied while a tile's operands arrive and its results leave. A kernel whose tiles overlap has 0.
    """

    matmul: float | None = None
    memory: float | None = None
    fill: float = 0.0


@dataclasses.dataclass(frozen=True)
class Achieved:
    """The share of a chip's best that programs reach, and what every kernel costs besides.

    The defaults: dense bf16 products reached 700 to 750 of the 989 TFLOP/s of an H200, grouped products 560 to 630, and
    an all-reduce over eight H100s 361 of 450 GB/s. Of the 64 GB/s of PCIe's fifth generation copies reach 50 to 55,
    which has not been measured here. A measured time always beats them (`times` of `hlo_overlap`).

    Attributes:
      matmul: of the FLOP/s, where nothing but products runs.
      memory: of the memory's bytes/s.
      interconnect: of the bytes/s within a node, for collectives.
      internode: of the bytes/s between nodes.
      kernel_us: microseconds that a kernel takes beside its products and bytes: the gap before it, its start and end.
      product_us: microseconds that a kernel of products takes besides, until all multiprocessors multiply and while
        the last ones do.
      relief: by what share products are faster where they take half of the time: a chip that multiplies without a pause
        lowers its clock to hold its power, and the less the more often it does something else; see `clock`.
      most_clock: of the clock in products without a pause, the most that the chip has.
      narrow: of the memory's bytes/s, where numbers have less than four bytes; None: as of others.
      step_us: microseconds of a step before its first kernel and after its last one, if the host waits for each.
      read_us: microseconds that the chip waits while the host reads the condition of a loop.
      host: of the bytes/s to and from the host's memory.
      occupied: the share of a chip's multiprocessors that a collective takes from the kernels that run beside it.
      kernels: shares of single kernels, by name.

    >>> Achieved(matmul=0.6).matmul
    0.6
    """

    matmul: float = 0.75
    memory: float = 0.8
    interconnect: float = 0.8
    internode: float = 0.8
    kernel_us: float = 2.0
    product_us: float = 0.0
    relief: float = 0.0
    most_clock: float = 1.0
    narrow: float | None = None
    step_us: float = 0.0
    read_us: float = 0.0
    host: float = 0.85
    occupied: float = 0.0
    kernels: Mapping[str, KernelShare] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        shares = {
            name: getattr(self, name) for name in ("matmul", "memory", "narrow", "interconnect", "internode", "host")
        }
        for kernel, (matmul, memory, fill) in self.kernels.items():
            shares |= {f"matmul of kernel {kernel}": matmul, f"memory of kernel {kernel}": memory}
            if fill < 0:
                raise ValueError(f"fill of kernel {kernel} is {fill}: it must not be negative")
        for name, share in shares.items():
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share} must be a share above 0, at most 1")
        if self.relief < 0 or self.most_clock < 1:
            raise ValueError(f"relief={self.relief} must be at least 0, most_clock={self.most_clock} at least 1")
        if not 0 <= self.occupied < 1:
            raise ValueError(f"occupied={self.occupied} must be a share of at least 0, below 1")
        for name in ("kernel_us", "product_us", "step_us", "read_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def clock(self, multiplying: float, others: float) -> float:
        """The clock over that of products without a pause, which products in a mix run at.

        Linear in the share of the time that they take, up to the chip's highest.

        Args:
          multiplying: seconds of products, at the clock of products without a pause.
          others: seconds of all else.

        >>> Achieved(relief=0.3, most_clock=1.25).clock(1.0, 0.0)
        1.0
        """
        clock = 1.0
        for _ in range(20):  # a product that runs faster takes less of the time
            share = multiplying / clock / (multiplying / clock + others) if multiplying else 0.0
            clock = min(1 + 2 * self.relief * (1 - share), self.most_clock)
        return clock


# Dense figures are half of the data sheets' "with sparsity", NVLink's and PCIe's half of their sum of both directions:
# PCIe has 16 lanes of its fifth generation, of the fourth on an A100.
# No data sheet states a latency: 15 us is what small NCCL collectives take within a node.
_HOPPER = Chip(
    "H100",  # NVIDIA H100 data sheet, SXM; DGX H100: one 400 Gb/s ConnectX-7 a GPU
    bf16=989.4e12,
    fp8=1978.9e12,
    tf32=494.7e12,
    f32=66.9e12,
    hbm=3.35e12,
    interconnect=450e9,
    internode=50e9,
    latency_us=15.0,
    sms=132,
    memory=80e9,
)
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "H100": _HOPPER,
        "H200": dataclasses.replace(_HOPPER, name="H200", hbm=4.8e12, memory=141e9),  # NVIDIA H200 data sheet, SXM
        # NVLink of 400 GB/s in both directions together: DeepSeek, "Insights into DeepSeek-V3" (2025), section 2.
        "H800": dataclasses.replace(_HOPPER, name="H800", interconnect=200e9),
        "A100": Chip(
            "A100",  # NVIDIA A100 80GB data sheet, SXM; DGX A100: one 200 Gb/s ConnectX-6 a GPU
            bf16=312e12,
            fp8=312e12,
            tf32=156e12,
            f32=19.5e12,
            hbm=2.039e12,
            interconnect=300e9,
            internode=25e9,
            latency_us=15.0,
            sms=108,
            memory=80e9,
            host=32e9,
        ),
        "B200": Chip(
            "B200",  # NVIDIA HGX B200 and DGX B200 data sheets, an eighth of each
            bf16=2250e12,
            fp8=4500e12,
            tf32=1125e12,
            f32=75e12,
            hbm=8e12,
            interconnect=900e9,
            internode=50e9,
            latency_us=15.0,
            sms=148,
            memory=180e9,
        ),
    }
)
"""Chips by name: H100 and H200 and H800 (SXM), A100 (80 GB, SXM), B200."""


def chip(name: str) -> Chip:
    """The chip of that name.

    >>> chip("h800").interconnect
    200000000000.0
    """
    if name.upper() not in CHIPS:
        raise ValueError(f"no chip {name!r}: known are {', '.join(CHIPS)}; make others with Chip(...)")
    return CHIPS[name.upper()]


def chip_of(kind: str) -> Chip | None:
    """The chip of a device whose `device_kind` names it; None: it is another.

    >>> chip_of("NVIDIA H100 80GB HBM3").name, chip_of("cpu")
    ('H100', None)
    """
    return next((chip for name, chip in CHIPS.items() if name in kind), None)
