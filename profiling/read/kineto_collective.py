"""Reads a collective from the arguments of its kernel or of its `record_param_comms`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from profiling.event import Collective
from profiling.read.kineto_values import integer

NAME = "Collective name"
"""The argument that every description has."""

ANNOTATION = re.compile(r"(?:nccl|rccl|gloo|hccl|xccl|ucc|mpi):(\w+)")
"""Annotations that PyTorch's process groups put around collectives."""

_KINDS = (
    ("reducescatter", "reduce-scatter"),
    ("allreduce", "all-reduce"),
    ("allgather", "all-gather"),
    ("alltoall", "all-to-all"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("scatter", "scatter"),
    ("gather", "gather"),
    ("reduce", "reduce"),
    ("sendrecv", "send and receive"),
    ("send", "send"),
    ("recv", "receive"),
)
_NO_COLLECTIVE = ("wait", "init", "pgconfig")

_ARGUMENTS = (
    NAME,
    "dtype",
    "Process Group Name",
    "Process Group ID",
    "Process Group Ranks",
    "Group size",
    "Global rank start",
    "Global rank stride",
    "In msg nelems",
    "Out msg nelems",
    "Seq",
)

_BYTES = {
    1: "byte char bool uint8 int8 qint8 quint8 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    "float8_e8m0fnu float4_e2m1fn_x2",
    2: "half short bfloat16 float16 int16 uint16",
    4: "float int float32 int32 uint32 complexhalf complex32 qint32",
    8: "double long float64 int64 uint64 complexfloat complex64",
    16: "complexdouble complex128",
}
SIZES = {name: size for size, names in _BYTES.items() for name in names.split()}
"""Bytes of an element, by the names of c10::ScalarType and of torch, in small letters."""


def kind(name: str) -> str:
    """The collective that PyTorch's name stands for, or the name itself if it is unknown.

    >>> [kind(name) for name in ("allreduce", "_allgather_base", "reduce_scatter_tensor_coalesced", "all_to_allv")]
    ['all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all']
    >>> kind("recv 1<-0"), kind("nccl:all_reduce"), kind("a_new_one")
    ('receive', 'all-reduce', 'a_new_one')
    """
    letters = re.sub(r"[^a-z]", "", name.lower().rpartition(":")[2])
    return next((kind for part, kind in _KINDS if part in letters), name)


def described(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments that `collective` looks at.

    >>> described({"stream": 7, "Collective name": "allreduce"})
    {'Collective name': 'allreduce'}
    """
    return {name: args[name] for name in _ARGUMENTS if name in args}


def collective(args: Mapping[str, Any], groups: Mapping[str, tuple[int, ...]]) -> Collective | None:
    """The collective that arguments describe; None if they describe none.

    Args:
      args: arguments of a kernel or of a `record_param_comms`, with the names in PyTorch's torch/csrc/profiler/util.h.
      groups: ranks of each process group, from the head of the trace; used if the arguments cut the list short.

    >>> args = {"Collective name": "_allgather_base", "In msg nelems": 512, "Out msg nelems": 4096, "Group size": 8,
    ...     "dtype": "BFloat16", "Process Group Name": "3", "Process Group Ranks": "[0, 1, ..., 7]"}
    >>> found = collective(args, {})
    >>> found.kind, found.group, found.ranks, found.size, found.sent, found.received
    ('all-gather', '3', None, 8, 1024, 8192)
    >>> collective(args | {"Global rank start": 0, "Global rank stride": 2}, {}).ranks
    (0, 2, 4, 6, 8, 10, 12, 14)
    """
    name = args.get(NAME)
    if not isinstance(name, str) or name.lower() in ("", *_NO_COLLECTIVE):
        return None
    dtype = args.get("dtype")
    dtype = dtype if isinstance(dtype, str) else ""
    size = SIZES.get(dtype.lower().rpartition(".")[2])
    group = args.get("Process Group Name", args.get("Process Group ID", ""))
    group = "" if group is None else str(group)
    members = _natural(args.get("Group size"))
    ranks = _ranks(args, members) or groups.get(group)
    if ranks is not None and members not in (None, len(ranks)):
        ranks = None
    return Collective(
        kind=kind(name),
        group=group,
        ranks=ranks,
        size=members if members is not None else len(ranks) if ranks else None,
        sent=_bytes(args.get("In msg nelems"), size),
        received=_bytes(args.get("Out msg nelems"), size),
        dtype=dtype,
        sequence=_natural(args.get("Seq")),
    )


def process_groups(distributed: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The ranks of each process group that the head of a trace lists.

    >>> process_groups({"pg_config": [{"pg_name": "0", "pg_size": 2, "ranks": [0, 1]}, {"pg_name": "1"}]})
    {'0': (0, 1)}
    """
    listed = distributed.get("pg_config")
    found = {}
    for config in listed if isinstance(listed, list) else ():
        ranks = _listed(config.get("ranks")) if isinstance(config, dict) else None
        if ranks and "pg_name" in config and config.get("pg_size") in (None, len(ranks)):
            found[str(config["pg_name"])] = ranks
    return found


def _natural(value: Any) -> int | None:
    found = integer(value)
    return found if found is not None and found >= 0 else None


def _bytes(elements: Any, size: int | None) -> int | None:
    count = _natural(elements)
    return None if count is None or size is None else count * size


def _ranks(args: Mapping[str, Any], size: int | None) -> tuple[int, ...] | None:
    if ranks := _listed(args.get("Process Group Ranks")):
        return ranks
    start, stride = _natural(args.get("Global rank start")), _natural(args.get("Global rank stride"))
    if start is None or not stride or not size or size > 1 << 20:
        return None
    return tuple(range(start, start + stride * size, stride))


def _listed(value: Any) -> tuple[int, ...] | None:
    """A list of ranks, or its text, as numbers; None if it was cut short with dots."""
    if isinstance(value, str):
        if not re.fullmatch(r"\[\s*\d+(\s*,\s*\d+)*\s*\]", value.strip()):
            return None
        value = re.findall(r"\d+", value)
    if not isinstance(value, list):
        return None
    ranks = tuple(rank for rank in map(integer, value) if rank is not None)
    return ranks if ranks and len(ranks) == len(value) else None
