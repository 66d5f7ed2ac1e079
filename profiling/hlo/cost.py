"""Estimates what one instruction of a compiled program costs on a chip: products, bytes, microseconds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from jaxpipe import flops as formulas
from jaxpipe.planning.chips import Achieved, Chip
from profiling.hlo.text import Array, Computation, Instruction, Module

Times = Sequence[tuple[str, float | Callable[[Instruction], float]]]
"""Measured times: a regular expression for names or op_names, with microseconds or a function of the instruction."""

_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
     "opt-barrier", "add-dependency", "domain")
)  # fmt: skip
_WAITS = ("-done", "-update")  # ends of what was started before, which has been counted there
_STARTED = ("fusion-start", "custom-call-start")  # asynchronous forms, written short
_BY_BYTES = ("__cub$", "__cu$", "TopK")  # sorts and the like: no products hide in these custom calls
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode: which operand holds what is written


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of an instruction.

    Attributes:
      us: microseconds.
      flops: FLOPs of matrix products and convolutions; nothing else is counted.
      bytes: bytes read and written.
      is_known: False for a kernel of which only the operands are known; its time is that of its bytes.
    """

    us: float
    flops: float
    bytes: float
    is_known: bool


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products of one precision.

    Attributes:
      dtype: type that the chip multiplies, a name that `Chip.flops` takes.
      flops: two for each multiplication and addition.
      passes: how often the chip multiplies to get the precision that was asked for.
    """

    dtype: str
    flops: float
    passes: int = 1


def cost(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    chip: Chip,
    achieved: Achieved,
    times: Times = (),
) -> Cost:
    """The cost of an instruction: the longer of its products and its bytes, plus a launch; or its measured time.

    The insides of loops, branches, calls and collectives do not count.
    """
    found = products(module, computation, instruction)
    flops = sum(product.flops for product in found)
    moved = bytes_moved(module, computation, instruction)
    measured = measured_us(instruction, times)
    if measured is not None:
        return Cost(measured, flops, moved, True)
    if not moved:
        return Cost(0.0, flops, moved, True)
    multiplying = sum(one.passes * one.flops / (chip.flops(one.dtype) * achieved.matmul) for one in found)
    us = achieved.kernel_us + 1e6 * max(multiplying, moved / (chip.hbm * achieved.memory))
    is_opaque = _opcode(instruction) == "custom-call" and not instruction.target.startswith(_BY_BYTES)
    return Cost(us, flops, moved, bool(found) or not is_opaque)


def measured_us(instruction: Instruction, times: Times) -> float | None:
    """The first measured time that fits an instruction; None if there is none.

    >>> measured_us(Instruction("fusion.3", "fusion", ()), [("^fusion", 12.0)])
    12.0
    """
    for pattern, us in times:
        if re.search(pattern, instruction.name) or re.search(pattern, instruction.op_name):
            return us(instruction) if callable(us) else us
    return None


def products(module: Module, computation: Computation, instruction: Instruction) -> tuple[Product, ...]:
    """The matrix products within an instruction, those of the computations that it fuses included."""
    operands = [operand.arrays[0] for operand in computation.operands(instruction) if operand.arrays]
    opcode, target = _opcode(instruction), instruction.target
    if opcode == "dot":
        contracted = _ints(instruction.attributes.get("lhs_contracting_dims", ""))
        return (_dot(operands, instruction.arrays[0], contracted, _precision(instruction)),)
    if opcode == "convolution" or target == "__cudnn$convForward":
        return (_convolution(operands, instruction),)
    if opcode in ("fusion", "async-start"):
        return tuple(
            product
            for called in module.called(instruction)
            for inner in called.instructions
            for product in products(module, called, inner)
        )
    if opcode != "custom-call":
        return ()
    if target.startswith("__cublas$") and "gemm_backend_config" in instruction.config:
        config = instruction.config["gemm_backend_config"]
        contracted = [int(d) for d in config["dot_dimension_numbers"].get("lhs_contracting_dimensions", ())]
        precision = config.get("precision_config", {})
        text = f"{precision.get('algorithm', '')} {precision.get('operand_precision', '')}".lower()
        return (_dot(operands, instruction.arrays[0], contracted, text.replace("alg_", "")),)
    if target.startswith("__cudnn$fmha"):
        return _attention(operands, instruction)
    return _grouped(operands, instruction)


def _opcode(instruction: Instruction) -> str:
    opcode = instruction.opcode
    return opcode.removesuffix("-start") if opcode in _STARTED else opcode


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _precision(instruction: Instruction) -> str:
    return f"{instruction.attributes.get('algorithm', '')} {instruction.attributes.get('operand_precision', '')}"


def _unit(operands: Sequence[Array], precision: str) -> tuple[str, int]:
    """The type in which the chip multiplies operands of these types, and the number of passes."""
    passes = re.search(r"_x(\d)", precision)
    if "tf32_tf32" in precision:
        return "tf32", int(passes[1]) if passes else 1
    if "bf16_bf16" in precision:
        return "bf16", int(passes[1]) if passes else 1
    widest = max(array.bytes / array.elements for array in operands if array.elements)
    return formulas.multiplying_unit(widest, highest="highest" in precision or "f32_f32" in precision), 1


def _dot(operands: Sequence[Array], result: Array, contracted: Sequence[int], precision: str) -> Product:
    unit, passes = _unit(operands[:2], precision)
    return Product(unit, float(formulas.dot_flops(operands[0].dims, contracted, result.dims)), passes)


def _convolution(operands: Sequence[Array], instruction: Instruction) -> Product:
    kernel = instruction.attributes.get("dim_labels", "").partition("_")[2].partition("-")[0]
    flops = formulas.convolution_flops(operands[1].dims, kernel.index("o"), instruction.arrays[0].dims)
    unit, passes = _unit(operands[:2], _precision(instruction))
    return Product(unit, float(flops), passes)


def _attention(operands: Sequence[Array], instruction: Instruction) -> tuple[Product, ...]:
    config = instruction.config.get("cudnn_fmha_backend_config", {})
    scores = [int(size) for size in config.get("intermediate_tensor_shape", {}).get("dimensions", ())]
    if len(scores) != 4:
        return ()
    head = operands[0].elements / (scores[0] * scores[1] * scores[2])
    count = 5 if "Backward" in instruction.target else 2
    causal = "CAUSAL" in config.get("mask_type", "")
    flops = formulas.score_flops(math.prod(scores), head, head, products=count, causal=causal)
    return (Product(_unit(operands[:1], "")[0], flops),)


def _grouped(operands: Sequence[Array], instruction: Instruction) -> tuple[Product, ...]:
    """A grouped product, known by its shapes in any order; floating arrays of other ranks may stand beside them."""
    floats = [array for array in (*operands, *instruction.arrays) if array.dtype[0] in "bf" and len(array.dims) > 1]
    flops = formulas.grouped_flops(array.dims for array in floats if len(array.dims) < 4)
    return () if flops is None else (Product(_unit([a for a in operands if a in floats], "")[0], flops),)


def bytes_moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """The bytes that an instruction reads and writes, each once; of a slice or an update in place, only that part."""
    opcode = _opcode(instruction)
    if opcode in _FREE or opcode.endswith(_WAITS):
        return 0.0
    results = sum(array.bytes for array in instruction.arrays)
    operands = computation.operands(instruction)
    if opcode in _SLICES:
        return 2.0 * results
    if opcode in _UPDATES:
        return 2.0 * sum(array.bytes for array in operands[_UPDATES[opcode]].arrays)
    if opcode == "fusion":
        (body,) = module.called(instruction)
        reads = sum(_read(body, inner) for inner in body.instructions if inner.opcode == "parameter")
        return reads + _written(body, body.root)
    return results + sum(array.bytes for operand in operands for array in operand.arrays)


def _read(body: Computation, value: Instruction) -> float:
    """The bytes of a fusion's parameter that the fusion reads."""
    whole = float(sum(array.bytes for array in value.arrays))
    parts = 0.0
    for user in body.users[value.name]:
        if user.opcode in _SLICES and user.operands[0] == value.name:
            parts += sum(array.bytes for array in user.arrays)
        elif user.opcode == "bitcast":
            parts += _read(body, user)
        elif user.opcode in _UPDATES and user.operands[0] == value.name:
            continue  # the part that is written is not read before
        else:
            return whole
    return min(parts, whole)


def _written(body: Computation, value: Instruction) -> float:
    """The bytes of a result that a fusion writes."""
    if value.opcode == "tuple":
        return sum(_written(body, operand) for operand in body.operands(value))
    if value.opcode == "bitcast":
        return _written(body, body.operands(value)[0])
    if value.opcode in _UPDATES:
        return float(sum(array.bytes for array in body[value.operands[_UPDATES[value.opcode]]].arrays))
    return float(sum(array.bytes for array in value.arrays))
