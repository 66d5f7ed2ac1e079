"""The rules for kernels that communicate, by the names of their functions, for every reader.

Names are those in the public sources of the libraries: NCCL, RCCL, MSCCL and MSCCL++, NVSHMEM and rocSHMEM, DeepEP,
pplx-kernels, Mori, FlashInfer, TensorRT-LLM, vLLM, SGLang, aiter, FBGEMM, PyTorch's symmetric memory, Transformer
Engine's userbuffers, Apex. A kernel is a transfer if it moves data between devices, a wait if it only notifies others
or waits for them, and compute if it only prepares or unpacks buffers of its own device. Only the function counts:
"nccl" in a template argument says nothing about what a kernel does.
"""

from __future__ import annotations

from profiling.classify.rules import Rule

_ALL_REDUCE = r"(?<!sm)all_?reduce"  # not "smallReduce"
_ALL_GATHER = r"((?<!sm)all_?gather|fcollect)"
_REDUCE_SCATTER = r"reduce_?scatter"
_ALL_TO_ALL = r"(all_?(to|2)_?all|(?<![a-z0-9])a2av?(?![a-z0-9]))"
_COLLECTIVE = rf"({_ALL_REDUCE}|{_ALL_GATHER}|{_REDUCE_SCATTER}|{_ALL_TO_ALL})"
_PRODUCT = r"(gemm|matmul|flash_?att)"
_LIBRARY = r"(?-i:(^|::)_*(nccl|rccl|msccl|hccl|hcom|oneccl|xccl|mccl|bkcl|cncl)(_|::|[A-Z]|pp\b)|(^|::)ccl::)"
_SHMEM = r"(nv|roc|i|open|mx|mori_?)shmem"
_EXPERT_PARALLEL = r"(^|::)((\w+_)?ep|uccl|pplx|mori|moe_all_?to_?all|internode(_ll)?|intranode|elastic)::"

_TABLE: tuple[tuple[str, str, str], ...] = (
    # Products that overlap a collective within one kernel, and kernels that prepare or unpack buffers of their device.
    (rf"{_PRODUCT}[^:]*({_COLLECTIVE}|_notify|_combine)[^:]*$"
     rf"|({_COLLECTIVE}|dispatch_|wait_signal|gather_rs)[^:]*{_PRODUCT}[^:]*$", "GEMM with communication",
     "compute"),
    (r"(^|[_:])(ag|a2a)_(\w+_)?gemm|gemm_(\w+_)?(rs|ar|a2a)(_|$)|mega_?moe", "GEMM with communication", "compute"),
    (r"dispatch_layout|convert_topk_to_routing|(sparse|dense)_to_(sparse|dense)_prob", "dispatch layout", "compute"),
    (r"dispatch_copy_epilogue|combine_reduce_epilogue|dispatch_postprocess|combine_group_build|combine_preprocess"
     r"|convert(dispatch|combine)"
     r"|a2a(prepare|sanitize)|a2a_(un)?pack|alltoall::(\w+::)*(\w*sendrecv|moelocal)|local_?expert_?count",
     "permute", "compute"),
    (r"lamport_init|nvshmemi_(init|team)|(query|update|clean)_mask_buffer|^oneRankReduce", "memory", "compute"),
    # Notifications and waits, in which nothing but flags and counts travels.
    (r"clean_?low_?latency_?buffer|notify|exchange_?split", "barrier", "wait"),
    (r"(put|wait|send|recv)_?signal|signal_?(op|wait)|wait_(until|acks|flag|prefix|combine|lse)|fetch_wait|async_?wait"
     r"|a2av?_wait|combine_wait|increment_epoch|fence_?(flag)?_?wait|(^|::)(ack|bump_tag|publish_abort)_kernel"
     r"|(write|wait)_value(32|64)"
     r"|kuserbuffers_(inc|dummy|pullsend|pushrecv)\b",
     "notification", "wait"),
    # Expert parallelism.
    (rf"{_EXPERT_PARALLEL}(\w+::)*\w*combine|a2a_?combine|(^|[:_])EpCombine(?!Sync)|(^|::)ubx_\w*combine"
     r"|kernel_combine_(token|intra|inter)|combine_publish|(^|::)combine_kernel_v\d|dis_scatter_backward_(?!build)"
     r"|(?-i:(^|::)combine(Send|Recv)?Kernel$)", "combine", "transfer"),
    (rf"{_EXPERT_PARALLEL}(\w+::)*\w*dispatch|a2a_?dispatch|(^|[:_])EpDispatch|kernel_dispatch_(token|intra|inter)"
     r"|dis_scatter_forward_(?!build)|(^|::)(reserve|store)_publish|(^|::)dispatch_kernel_v\d|(?-i:(^"
     r"|::)dispatch(Send|Recv)?Kernel$)", "dispatch", "transfer"),
    # Userbuffers of Transformer Engine: the end says which half of the all-reduce it is.
    (r"userbuffers_\w*_ag\b", "all-gather", "transfer"),
    (r"userbuffers_\w*_rs(_|\b)", "reduce-scatter", "transfer"),
    (r"kuserbuffers_", "send and receive", "transfer"),
    (r"userbuffers_", "all-reduce", "transfer"),
    # Kernels of any library whose names say what they do.
    (rf"{_ALL_TO_ALL}[^:]*$|computeCountAndIndice", "all-to-all", "transfer"),
    (rf"{_REDUCE_SCATTER}[^:]*$|gather_rs_", "reduce-scatter", "transfer"),
    (rf"{_ALL_GATHER}[^:]*$|gather_multimem|^_forward_(push|pull)_|ring\w*gather[^:]*$|(^"
     rf"|::)ag_gfx", "all-gather", "transfer"),
    (rf"{_ALL_REDUCE}[^:]*$|cross_device_reduce|lamport[^:]*$|(^|::)ar_(gfx|ll_gfx)|quick_?reduce::|pcie_ipc::|rdxn"
     r"|(one|two)_?shot\w*(reduce|sum)|multimem\w*reduce", "all-reduce", "transfer"),
    (r"multimem", "multimem", "transfer"),
    (r"push_pull_halos|(^|[_:])(pp|p2p)_(send|recv)|engram_fetch|send_?recv", "send and receive", "transfer"),
    (r"ccl\w*(broadcast|bcast)|shmem\w*(::\w+)*broadcast|broadcast_on_stream", "broadcast", "transfer"),
    (r"(^|_|::)\w*barrier\w*$|rendezvous|(device|peer)_sync_kernel|symm_mem_sync|sync_on_stream"
     r"|EpCombineSync", "barrier", "wait"),
    (rf"{_SHMEM}\w*(::\w+)*(sync|quiet|fence|wait)", "barrier", "wait"),
    (r"(?-i:nccl\w*Reduce)|nvshmemi_reduce", "reduce", "transfer"),
    (rf"{_LIBRARY}|(^|::)ubx_kernel|reshardkernel|(^|::)mscclpp::", "collective", "transfer"),
    (_SHMEM, "put and get", "transfer"),
    (r"^Memcpy ?(P2P|PtoP|Peer)|^(cuda|hip)?(Memcpy|Copy)_?Peer", "peer copy", "transfer"),
)  # fmt: skip

COMMUNICATION: tuple[Rule, ...] = tuple(
    Rule(f"(?i){pattern}", kind, group, "function") for pattern, kind, group in _TABLE
)
"""Rules for transfers and waits, after rules for kernels whose names only look like these."""
