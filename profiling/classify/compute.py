"""The rules for kernels that compute, by their names, for every reader; they come after those for communication.

Names are those of CUTLASS, cuBLAS, cuDNN, Tensile and hipBLASLt, rocBLAS, MIOpen, Composable Kernel, aiter, Triton and
Inductor, FlashAttention, FlashInfer, TensorRT-LLM, Transformer Engine, Apex, FBGEMM, cub, thrust and rocprim, ATen,
vLLM and SGLang. Copies and fills within a device count as compute. Template arguments are searched only for functions
that just run them, such as ``cutlass::Kernel2``.
"""

from __future__ import annotations

from profiling.classify.rules import Rule

_WORD = r"(?<![a-z])"
_ATEN = r"^at(_cuda_detail)?::"

INDUCTOR: tuple[Rule, ...] = tuple(
    Rule(pattern, kind, "compute", "function")
    for pattern, kind in (
        (r"^triton_(tem|mm|bmm)_\w*(flex|attention|sdpa)", "attention"),
        (r"^triton_(tem|mm|bmm)_\w*conv", "convolution"),
        (r"^triton_(tem|mm|bmm)_", "GEMM"),
        (r"^triton_poi_", "fused elementwise"),
        (r"^triton_(red|per|split_scan)_", "fused reduction"),
        (r"^triton_(for|unk|mix|helion|cooperative)?_*(fused_|\d)", "fusion"),
    )
)
"""Kernels that Inductor generates. They are named after the operators that were fused, such as "all_reduce" if a kernel
works on the result of one, so these rules come before those for communication."""

# (pattern, kind); all are searched in "kernel", in letters of any case.
_TABLE: tuple[tuple[str, str], ...] = (
    (r"^Mem(cpy|set)|^Copy(Device|Host|Buffer)|^FillBuffer|__amd_rocclr_|^(hip|cuda)Mem(cpy|set)|^[HD]to[HD]\b",
     "memory"),
    # ATen says what it does in the names of its functions.
    (rf"elementwise_kernel|{_ATEN}.*elementwise", "elementwise"),
    (r"multi_tensor_apply\w*<.*(adam|lamb|sgd|adagrad|lion|novograd|radam|adamax|rprop|asgd)|optimizer|adam(w)?_"
     r"|adagrad"
     r"(?!_unweighted|_weighted)|(^|[:_])(lamb|lars|sgd)_", "optimizer"),
    (r"multi_tensor_apply|l2norm_?(kernel|cleanup)?$|multi_tensor", "multi-tensor update"),
    # Caches, tables and indices of serving; before attention, as their names hold that word.
    (r"reshape_and_cache|concat_and_cache|^(?!.*(fmha|prefill|decode|attention)).*(kv|k|mla|indexer)_?(quant_)?cache"
     r"|store_?kv|append_?paged|(copy|swap)_blocks|UpdateKVCache", "KV cache"),
    (r"kv_indices|page_(indices|table)|block_table|slot_mapping|(compute|clamp)_position|position_kernel|future_token"
     r"|seq_?lens?_|req_to_token|token_to_kv|prepare_\w*(input|spec|pos|index)|get_mla_metadata|attn\w*metadata"
     r"|metadata_kernel|buildDecoderInfo|PaddingOffset|indptr|advance_step|increment", "indices and positions"),
    (r"rotary|(?<![a-z])rope|mrope|kn_entry_\dc_(sbhd|thd|2d)", "rope"),
    (r"flash(?!infer)|fmha|sdpa|attention|(?<!h)attn|(?<![a-z])m[hql]a_|mmha|xqa|kn_mla|(^|[_:])(fwd|bwd)_hd\d|(^"
     r"|[_:])(gqa|pa)_|kernel_mha|PrefillWith|thd_(lse|out|grad|read)|sage_?(fwd|quant|attn)|paged_kv"
     r"|(Batch|Single)_?(Prefill|Decode)|PagedKV|splitkv|Merge_?States?|ComputeLSE|lse_combine|cudnn::fusion|nsa_"
     r"|^_(fwd|bwd)(_grouped)?_?(kernel(?!_ep)|preprocess|dq|dkdv)|^(fwd|bwd)_kernel|(?<![a-z])(la|pod)_persistent"
     r"|(mla|kv)_?decode|split_kv|tree_verify|decode_softmax_reducev|dot_do_o", "attention"),
    # Grouped products of mixtures of experts, their routing and permutations.
    (r"grouped_?conv|conv(?!ert)(?!ex)|winograd|xmma_(w|d)grad|xmma_fprop|s\d+(w|d)grad|s\d+fprop|(w|d)grad_(alg"
     r"|engine)"
     r"|implicit_(gemm|convolve)|im(\dd)?2col|im2d2col|col2im|igemm_(fwd|bwd|wrw)|scudnn|cudnn::cnn|cask_cudnn\w*::compute|naive_"
     r"conv|Sp3Asm|gridwise_convolution|cudnn_(infer|train)\w*|fft2d_", "convolution"),
    (r"group(ed)?_?gemm|m_grouped|moe_?gemm|gemm_?moe|fused_?moe(?!\w*(rout|sort|align|quant|topk))|matmul_ogs"
     r"|(?<![a-z])t?gmm|e2e_moe|ragged_?dot"
     r"|moe\w*(stage|mfma|wna16|marlin|_fwd|ck2|kernel_gptq)|mfma_moe|(?<![a-z])fmoe|opus_moe_stage|bmm_\w*dynB"
     r"|w8a8_moe|flatmm_moe"
     r"|Moe(FlatMm|Gemm)|cutlass_moe", "grouped GEMM"),
    (r"moe\w*(rout|sort|align)|rout(er|ing)|expert\w*(count|offset|sort|bias)|grouped_topk|biased_topk|topk_?(softmax"
     r"|sigmoid|gating|forward|idx)|gating|bitmatrix|moe_?sort|count_and_sort|sum_and_topk|topk_sum|aux_loss"
     r"|tokens_per_"
     r"|_topk_forward", "router"),
    (r"permut|expandInput|expand_to|finalize(Moe|Kernel|_matmul)|moe_?(sum|reduce|finalize|combine)|finalizeMoe"
     r"|moe::dev::(finalize|permute)|scatter_rows|gather_rows|token_?(dispatch|combine)|row_map|pack_seq|ep_scatter"
     r"|ep_gather|(pre|post)_reorder|(row|token|weight)_?shuffle|(?<![a-z])shuffle_?(row|token|weight)"
     r"|reorder", "permute"),
    (r"bitonic|radix_?sort|merge_?sort|(?<![a-z])sort|onesweep|block_?sort|DeviceSegmentedSort", "sort"),
    (r"split_embedding|embedding|(?<![a-z])tbe_|EmbeddingBag|linearize_index|bounds_check_indices|recat_copy|bucketize"
     r"|offsets_range|complete_cumsum|jagged|pooled_embs|krn_partial|sum_and_scatter|compute_grad_weight|lookup|prune_"
     r"|pruning|lxu_|lru_|lfu_|uvm_", "embedding"),
    (r"batch_?norm|(?<![a-z])bn_(fw|bw|fwd|bwd)|layer_?norm|(?<![a-z])ln_|rms_?norm|group_?norm|instance_?norm"
     r"|norm_?fwd"
     r"|norm_?bwd|RowwiseMoments|GammaBeta|ComputeInternalGradients|GradInput|welford|qk_?norm|renorm|(?<![a-z])norm_"
     r"|_norm(_|$)|bnorm|bn(Fwd|Bwd)|(gemma|fused)\w*norm|NormFwd|NormBwd", "normalization"),
    # Products; after kernels that are named after a product.
    (r"gemm|gemv|gevm|matmul|(?<![a-z])b?mm_|_mm_|nvjet|cublas|xmma|Cijk_|tensorop|split_?k(?!v)|wv_?split|splitKreduce"
     r"|marlin|machete|wgmma|hipblas|rocblas|wmma|tinygemm|gptq|(?<![a-z])awq|exllama|mul_mat|matvec|scaled_mm"
     r"|dot_kernel"
     r"|scal_kernel|epilogue::impl|reduce_1Block|(?<![a-z])ger_|trsm|fpA_intB|gemmk1|w4a16|w8a8|w8a16|a8w8|a4w4|a16w"
     r"|llmm1"
     r"|magma_|dequant_mm|outer_prod|bgmv|sgmv|lora_(shrink|expand)|_lora|streamk|persistent_dense|hgemm|tgemm|bf16gemm"
     r"|flatmm|fp8_mqa_logits|mqa_logits|axpy_kernel|nrm2|asum|copy_kernel<.*cublas", "GEMM"),
    (r"potrf|getrf|geqrf|syev|gesvd|cusolver|rocsolver|(?<![a-z])lu_|cholesky|householder|triangular|orgqr|larf"
     r"|jacobi|tridiagonal|sytd2",
     "linear algebra"),
    (r"selective_scan|chunk_(scan|state|fwd|bwd|kda|gated|kkt|o_)|(?<![a-z])ssd_|mamba|selective_state|gated_delta"
     r"|delta_rule|linear_attn|retention|rwkv|wkv|recurrent|(?<![a-z])kda|_gla_|bmm_chunk|state_passing|causal_scan"
     r"|(?<![a-z])ssu_", "state-space model"),
    (r"softmax|log_?sum_?exp|softcap", "softmax"),
    (r"cross_?entropy|nll_?loss|(?<![a-z])loss|_loss|kl_div|ctc_|mse_|focal", "loss"),
    (r"quant|(?<![a-z])fp[48]_|_fp[48](_|$)|FP8|nvfp4|mxfp|hfp8|amax|(?<![a-z])cast|_cast|cast_kernel|cvt_|convert_fp"
     r"|compute_scale|swizzle|hadamard|scale_(inv|from)|e4m3|e5m2|int8_", "quantization"),
    (r"swiglu|silu|gelu|geglu|relu|act_and_mul|and_mul|activation|(?<![a-z])act_|sigmoid|softplus|(?<![a-z])tanh"
     r"|swish|mish|glu_"
     r"|_glu", "activation"),
    (r"pool|upsampl|interp|resize|grid_?sampl|bilinear|bicubic|roi_?align|(?<![a-z])nms|col_?pad|reflection_pad"
     r"|replication_pad|pixel_?shuffle", "pooling and resampling"),
    (r"sampl(e|ing)|multinomial|top_?[kp]|gatherTopK|radixFindKth|radixSelect|kthvalue|bincount|argmax|argmin|rejection"
     r"|penalt|radix_kernel|last_filter|logits?_|logprob|beam_?search|spec(ulative)?_|eagle|verify|ngram|vocab_mask"
     r"|bitmask", "top-k and sampling"),
    (r"random|distribution|philox|dropout|bernoulli|curand|rocrand|hiprand|normal_and|uniform_and|(?<![a-z])rng|seed",
     "random numbers"),
    (r"(?<![a-z])fft|r2c|c2r|bluestein|vector_fft|stft|(?<![a-z])dft", "FFT"),
    (r"lstm|(?<![a-z])gru_|(?<![a-z])rnn|transducer", "recurrent network"),
    (r"spmm|spmv|sddmm|cusparse|(?<![a-z])csr|(?<![a-z])coo_|to_dense|sparse|bsr", "sparse"),
    (r"scan|cumsum|cumprod|prefix_?sum|CompactInit", "scan"),
    (r"nchw|nhwc|transpos|(?<![a-z])tensor_?transform|layout_?transform|NCHW2|CNHW", "transpose"),
    (r"gather|scatter|index|(?<![a-z])take|masked|nonzero|unique|where|select|segment|repeat_interleave"
     r"|compute_cuda_kernel"
     r"|partition|compact|lookback|bag", "gather and scatter"),
    (r"reduc|(?<![a-z])sum_|_sum(_|$)|sum_kernel|(?<![a-z])mean|histogram|count|(?<![a-z])dot_|norm|variance|_max(_|$)"
     r"|minmax|argm", "reduction"),
    (rf"copy|CatArray|concat|(?<![a-z])cat_|split|stack|{_WORD}fill|memset|{_WORD}zero|{_WORD}init|clear|{_WORD}pad|unpack"
     r"|pack_|_pack|slice|flip|roll_|triu|tril|arange|linspace|range_kernel|tile_kernel|broadcast|expand|contiguous",
     "copy"),
    (r"fusion|^wrapped_|^fused_|_fused|fused_", "fusion"),
    (rf"elementwise|element_wise|pointwise|{_WORD}add|_add|{_WORD}mul|_mul|{_WORD}sub|{_WORD}div|scale|clamp|bias|residual"
     r"|Op\dd?Tensor|OpTensor|SubTensorOp|TensorOp|(?<![a-z])exp|bcast|unary|binary|compare|convert|round|mask|multiply"
     r"|parallel_for|transform_kernel|for_each|operator_|loops|(?<![a-z])mhc_|finite", "elementwise"),
    (r"^(at|c10|thrust|cub|hipcub|rocprim|at_cuda_detail|internal|cudnn|miopen|MIOpen)\w*(::|$)|^MIOpen|^miopen",
     "library kernel"),
)  # fmt: skip

COMPUTE: tuple[Rule, ...] = tuple(Rule(f"(?i){pattern}", kind, "compute", "kernel") for pattern, kind in _TABLE)
"""Rules for what a device computes, its own copies included, in any library."""
