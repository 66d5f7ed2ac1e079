"""Takes names of kernels apart, and makes short labels of them that differ.

A profiler gives the whole C++ name: return type, namespaces, template arguments, parameters. The name of the function
says what a kernel does; template arguments hold names of other things, such as "nccl" or "all_reduce".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class KernelName:
    """A kernel's name taken apart.

    Attributes:
      function: qualified name without return type, template arguments, parameters and unnamed namespaces; the whole
        name if it is not one of C++, such as Triton's and cuBLAS's.
      arguments: template arguments of the last part that has some, or the identifiers in them if the name is mangled;
        "" if there are none.
    """

    function: str
    arguments: str = ""

    @property
    def kernel(self) -> str:
        """The function, followed by its template arguments if it only runs them."""
        runs = self.arguments and (_NAMELESS.match(self.base) or self.base == "multi_tensor_apply_kernel")
        return f"{self.function}<{self.arguments}>" if runs else self.function

    @property
    def base(self) -> str:
        """The function without its namespaces."""
        return self.function.rpartition("::")[2]


_ANONYMOUS = re.compile(r"(\(anonymous namespace\)|\{anonymous\}|<unnamed>|`anonymous namespace')(::)?")
_CLONE = re.compile(r"( \[(clone|with) [^]]*\])+$|\.kd$")
# No demangler puts a space before the brackets of parameters, as "Memcpy PtoP (Device -> Device)" has.
_CPLUSPLUS = re.compile(r"^void |::|<|\w\(|^\(anonymous|^<unnamed>")
_OPERATOR = re.compile(r"\boperator\s*(\(\)|\[\]|<=>|<<=?|>>=?|->\*?|[<>=!+*/%^&|~-]=?)")
_CLOSES = {"<": ">", "(": ")", "{": "}", "[": "]"}


def parse_kernel(name: str) -> KernelName:
    """Takes a kernel's name apart, whether it is demangled, mangled or cut short.

    >>> parse_kernel("void at::native::reduce_kernel<512, 1, ReduceOp<float, Sum> >(ReduceOp<float, Sum>)")
    KernelName(function='at::native::reduce_kernel', arguments='512, 1, ReduceOp<float, Sum> ')
    >>> parse_kernel("_ZN5aiter12quant_kernelIDF16bLi64EEEvPT_")
    KernelName(function='aiter::quant_kernel', arguments='')
    >>> parse_kernel("Memcpy PtoP (Device -> Device)").function
    'Memcpy PtoP (Device -> Device)'
    """
    text = _CLONE.sub("", name.strip())
    if text.startswith("_Z"):
        return _Mangled(text).parsed() or KernelName(text)
    if not _CPLUSPLUS.search(text):
        return KernelName(text)
    text = _OPERATOR.sub("operator~", text)
    function, arguments, i = "", "", 0
    while i < len(text):
        if unnamed := _ANONYMOUS.match(text, i):
            i = unnamed.end()
        elif text[i] in "<{[":
            end = _matching(text, i)
            if text[i] == "<":
                arguments = text[i + 1 : end]
            elif text[i] == "{":
                function += "lambda"
            i = end + 1
        elif text[i] == "(":
            # Parameters end the name, unless they belong to a function around the kernel, or to decltype.
            inner = re.compile(r"( const)?(?=::)").match(text, _matching(text, i) + 1)
            if function.endswith("decltype"):
                i = _matching(text, i) + 1
            elif inner:
                i = inner.end()
            else:
                break
        elif text[i] == " ":
            function, arguments, i = "", "", i + 1  # what stood before was the return type
        else:
            function += text[i]
            i += 1
    return KernelName(function.lstrip("*&:"), arguments) if function.strip("*&:") else KernelName(text)


def _matching(text: str, start: int) -> int:
    """The position at which the bracket at the start closes; the length of the text if it was cut before."""
    around: list[str] = []
    expected = dict.fromkeys(_CLOSES.values(), 0)
    for i in range(start, len(text)):
        if text[i] in _CLOSES:
            around.append(_CLOSES[text[i]])
            expected[around[-1]] += 1
        elif expected.get(text[i]) and not (text[i] == ">" and (around[-1] != ">" or text[i - 1] == "-")):
            while around:
                closed = around.pop()
                expected[closed] -= 1
                if closed == text[i]:
                    break
            if not around:
                return i
    return len(text)


class _Mangled:
    """The names within a name mangled by the Itanium C++ ABI. What follows the function's own name is not read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.i = 2
        self.names: list[str] = []
        self.inside: list[str] = []

    def parsed(self) -> KernelName | None:
        try:
            if self.text[self.i] == "N":
                self.i += 1
                self._nested(self.names)
            else:
                if self.text.startswith("St", self.i):
                    self.i += 2
                self._unqualified(self.names)
                self._arguments()
        except (IndexError, ValueError, RecursionError):
            pass  # cut short, or a part of the grammar that kernels do not have: what was read until here stands
        function = "::".join(name for name in self.names if not name.startswith("_GLOBAL_"))
        return KernelName(function, ", ".join(self.inside)) if function else None

    def _unqualified(self, into: list[str]) -> None:
        """A name with its length before it, or a word for an operator or an unnamed type."""
        if self.text[self.i] == "L":
            self.i += 1
        if length := re.compile(r"\d+").match(self.text, self.i):
            self.i = length.end() + int(length[0])
            into.append(self.text[length.end() : self.i])
        elif self.text[self.i] == "U":
            self.i = self.text.index("_", self.i) + 1
            into.append("lambda")
        elif self.text[self.i] in "CD":
            self.i += 2
        elif re.compile(r"[a-z]{2}|[a-z][A-Z]").match(self.text, self.i):
            self.i += 2
            into.append("operator~")
        else:
            raise ValueError(self.text[self.i :])

    def _nested(self, into: list[str]) -> None:
        while self.text[self.i] in "KVrRO":
            self.i += 1
        while self.text[self.i] != "E":
            if self.text[self.i] in "ST":
                self._substitution()
            elif self.text[self.i] == "I":
                if into is self.names:
                    self.inside = []
                self._arguments()
            else:
                self._unqualified(into)
        self.i += 1

    def _arguments(self) -> None:
        if self.text[self.i] == "I":
            self.i += 1
            while self.text[self.i] != "E":
                self._argument()
            self.i += 1

    def _argument(self) -> None:
        if self.text[self.i] == "J":
            self.i += 1
            while self.text[self.i] != "E":
                self._argument()
            self.i += 1
        elif self.text[self.i] == "L":
            self.i += 1
            if self.text.startswith("_Z", self.i):
                self.i += 2
                self._type()
            else:
                self._type()
            self.i = self.text.index("E", self.i) + 1
        elif self.text[self.i] == "X":
            raise ValueError("expressions are not read")
        else:
            self._type()

    def _substitution(self) -> None:
        if found := re.compile(r"S[0-9A-Z]*_|T[0-9A-Z]*_|S[absiod]").match(self.text, self.i):
            self.i = found.end()
        elif self.text.startswith("St", self.i):
            self.i += 2
        else:
            raise ValueError(self.text[self.i :])

    def _type(self) -> None:
        start = self.text[self.i]
        if start.isdigit():
            self._unqualified(self.inside)
            self._arguments()
        elif start == "N":
            self.i += 1
            self._nested(self.inside)
        elif start in "PROKVr":
            self.i += 1
            self._type()
        elif start in "ST":
            is_std = self.text.startswith("St", self.i)
            self._substitution()
            if is_std:
                self._unqualified(self.inside)
            self._arguments()
        elif start == "F":
            self.i += 1
            while self.text[self.i] != "E":
                self._type()
            self.i += 1
        elif special := re.compile(r"D(F\d+[_bx]|v\d+_|.)|A\d*_|u(?=\d)").match(self.text, self.i):
            self.i = special.end()
            if special[0] == "u":
                self._unqualified(self.inside)
            elif special[0].startswith(("A", "Dv")) or special[0] == "Dp":
                self._type()
        elif start.islower():
            self.i += 1
        else:
            raise ValueError(self.text[self.i :])


_NAMELESS = re.compile(r"^(Kernel2?|device_kernel|kentry|_kernel_agent|trampoline_kernel)$")
"""Functions that only run their template arguments."""

_WRAPPER = re.compile(
    r"elementwise_kernel|^(reduce_kernel|multi_tensor_apply_kernel|parallel_for|for_each|static_kernel|index_kernel"
    r"|loops_kernel|transform_kernel|launch_kernel|unary_kernel|binary_kernel)"
)
"""Functions that say how elements are gone through, while their template arguments say what is done."""

_SAYS_NOTHING = re.compile(
    r"^(gpu_kernel_impl|gpu_kernel_impl_nocast|BinaryFunctor|AUnaryFunctor|BUnaryFunctor|ReduceOp|func_wrapper_t"
    r"|TensorListMetadata|TensorListScalarListMetadata|FusedOptimizerTensorListMetadata|DepthListMetadata|void"
    r"|float|double|int|long|short|char|signed|unsigned|bool|const|true|false|Half|BFloat16|complex"
    r"|Float8_e4m3fn|half|Float8_e5m2|__half|__nv_bfloat16|__hip_bfloat16|bf16_t|half_t|bfloat16_t"
    r"|float_e4m3_t|float_e5m2_t|nullptr|size_t|int8_t|uint8_t|int32_t|uint32_t|int64_t|uint64_t"
    r"|TensorIteratorBase|TensorIterator|OffsetCalculator|Array|array|lambda|anonymous|namespace|operator"
    r"|enable_sm90|enable_sm80_to_sm89|enable_sm90_or_later|enable_sm100|apply|type"
    r"|type_specialized_broadcast_kernel_launcher|ParallelForAgent|default_config|wrapped_kernel|typename"
    r"|value|integral_constant|bool_constant|tuple|decltype|this|auto|std|at|native|ck|cutlass|cute)$"
)
_MEMBER = re.compile(r"^(GemmKernel|[Kk]ernel|functor|Params|Policy|Op|operator~)$")
"""Names that mean something only with the class that they belong to."""

_QUALIFIED = re.compile(r"(?<![\w:'])[A-Za-z_]\w*(?:::[A-Za-z_]\w*)*")
_TILE = re.compile(r"tuple<(?:cute::)?C<(\d+)>, *(?:cute::)?C<(\d+)>, *(?:cute::)?C<(\d+)>")
_TENSILE = re.compile(r"^(Cijk(?:_[A-Z][a-z]+){2}(?:_[A-Z0-9]+)?)_.*?(?<=_)(MT\d+x\d+x\d+)")
_NOISE = re.compile(r"\(anonymous namespace\)::|\bat::native::|\bstd::(?=array|integral)|\bc10::|\bat::detail::")


def kernel_label(name: str, most: int = 60) -> str:
    """A short label for a kernel: its function, and what distinguishes it from others of that function.

    Args:
      name: name that the profiler gave.
      most: most characters of the label; an ellipsis shortens longer ones.

    Raises:
      ValueError: `most` is below 8.

    >>> kernel_label("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_128x64_nn>(cutlass_80_tensorop::Params)")
    'cutlass_80_tensorop_s16816gemm_128x64_nn'
    >>> kernel_label("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)")
    'vectorized_elementwise_kernel<CUDAFunctor_add>'
    >>> kernel_label("void deep_ep::intranode::combine<__nv_bfloat16, 8>(int4*)")
    'deep_ep::intranode::combine<__nv_bfloat16, 8>'
    """
    if most < 8:
        raise ValueError(f"kernel_label(most={most}): a label of fewer than 8 characters tells nothing")
    parsed = parse_kernel(name)
    telling = next(_telling(parsed.arguments), "")
    if tensile := _TENSILE.match(parsed.function):
        text = f"{tensile[1]} {tensile[2]}"
    elif telling and _NAMELESS.match(parsed.base):
        text = telling + _details(telling, parsed.arguments)
    elif telling and _WRAPPER.search(parsed.base):
        text = f"{parsed.base}<{telling}>"
    else:
        text = _NOISE.sub("", parsed.function + "::").removesuffix("::") or parsed.function
        arguments = _NOISE.sub("", parsed.arguments).strip()
        room = most - len(text) - 2
        if arguments and room >= min(len(arguments), 8):
            text += f"<{arguments}>" if len(arguments) <= room else f"<{arguments[: room - 1]}…>"
    return _cut(text, most)


def kernel_labels(names: Iterable[str], most: int = 60) -> dict[str, str]:
    """``{name: label}`` with a different label for each name. Equal short labels are extended by what differs.

    >>> copies = [f"void elementwise_kernel<128, copy_kernel_cuda<{kind}> >(int)" for kind in ("float", "c10::Half")]
    >>> list(kernel_labels(copies).values())
    ['elementwise_kernel<copy_kernel_cuda> float', 'elementwise_kernel<copy_kernel_cuda> c10 Half']
    """
    given = list(dict.fromkeys(names))
    same: dict[str, list[str]] = {}
    for name in given:
        same.setdefault(kernel_label(name, most), []).append(name)
    labels: dict[str, str] = {}
    for label, members in same.items():
        words = [list(dict.fromkeys(re.findall(r"\w+", parse_kernel(name).arguments))) for name in members]
        shared = set.intersection(*map(set, words))
        for number, (member, own) in enumerate(zip(members, words, strict=True), 1):
            told = " ".join(word for word in own if word not in shared)[: most // 3].rstrip()
            longer = f"{_cut(label, most - len(told) - 1)} {told}" if told and len(members) > 1 else label
            labels[member] = longer if longer not in labels.values() else f"{_cut(label, most - 6)} #{number}"
    return {name: labels[name] for name in given}


def _telling(arguments: str) -> Iterator[str]:
    """The names in template arguments that say what is done, in their order."""
    for found in _QUALIFIED.finditer(_ANONYMOUS.sub("", _OPERATOR.sub("operator~", arguments))):
        *above, last = found[0].split("::")
        if above and _MEMBER.match(last):
            yield f"{above[-1]}::{last}"
        elif not _SAYS_NOTHING.match(last) and not re.fullmatch(r"[A-Z]\d?|_\d+|Array\w*|\w+_t", last):
            yield last


def _details(telling: str, arguments: str) -> str:
    """The main loop and the tile of a product that CUTLASS builds from parts."""
    if not telling.startswith(("GemmUniversal", "ConvUniversal")):
        return ""
    loop = re.search(r"\b(Mainloop\w+)", arguments)
    tiles = [tuple(map(int, tile)) for tile in _TILE.findall(arguments)]
    tile = "x".join(map(str, max(tiles, key=lambda tile: tile[0] * tile[1] * tile[2]))) if tiles else ""
    parts = ", ".join(filter(None, (tile, loop[1] if loop else "")))
    return f"<{parts}>" if parts else ""


def _cut(text: str, most: int) -> str:
    """A text without its middle if it is too long. The end stays, as it often holds a number that differs."""
    if len(text) <= most:
        return text
    tail = min(16, (most - 1) // 3)
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"
