"""config.json of published models, and the names, shapes and dtypes of their tensors, written from public lists.

DeepSeek-V3's list is that of a report on its files' headers (163 files, 91,991 tensors), with layers and experts of the
same shape in one line; README of github.com/simpx/model-inspect has the same number, and 688,574,839,360 bytes.
DeepSeek-V2-Lite's and Moonlight's lists are those of the modules in github.com/huggingface/transformers,
models/deepseek_v2 and models/deepseek_v3. Configs: huggingface.co/deepseek-ai/DeepSeek-V3 and DeepSeek-V2-Lite,
huggingface.co/moonshotai/Moonlight-16B-A3B.
"""

import itertools
import re

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}


def of_deepseek(version):
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    files = {name: "configuration" if name == "AutoConfig" else "modeling" for name in names}
    return {
        "architectures": [f"Deepseek{version}ForCausalLM"],
        "auto_map": {name: f"{files[name]}_deepseek.Deepseek{version}{end}" for name, end in names.items()},
        "model_type": f"deepseek_{version.lower()}",
    }


def yarn(mscale):
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


SIXTEEN = {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "topk_group": 1,
}
CONFIGS = {
    "DeepSeek-V3": {
        **COMMON,
        **of_deepseek("V3"),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": yarn(1.0),
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "transformers_version": "4.33.1",
        "vocab_size": 129280,
    },
    "DeepSeek-V2-Lite": {
        **COMMON,
        **of_deepseek("V2"),
        **SIXTEEN,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "intermediate_size": 10944,
        "max_position_embeddings": 163840,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": yarn(0.707),
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "transformers_version": "4.33.1",
        "vocab_size": 102400,
    },
    "Moonlight-16B": {
        **COMMON,
        **of_deepseek("V3"),
        **SIXTEEN,
        "bos_token_id": 163584,
        "eos_token_id": 163586,
        "ep_size": 1,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "transformers_version": "4.46.3",
        "vocab_size": 163840,
    },
}

LISTS = {
    "DeepSeek-V3": """
lm_head.weight 129280x7168 bf16
model.embed_tokens.weight 129280x7168 bf16
model.layers.0-2.mlp.down_proj.weight 7168x18432 fp8
model.layers.0-2.mlp.down_proj.weight_scale_inv 56x144 f32
model.layers.0-2.mlp.gate_proj.weight 18432x7168 fp8
model.layers.0-2.mlp.gate_proj.weight_scale_inv 144x56 f32
model.layers.0-2.mlp.up_proj.weight 18432x7168 fp8
model.layers.0-2.mlp.up_proj.weight_scale_inv 144x56 f32
model.layers.0-61.input_layernorm.weight 7168 bf16
model.layers.0-61.post_attention_layernorm.weight 7168 bf16
model.layers.0-61.self_attn.kv_a_layernorm.weight 512 bf16
model.layers.0-61.self_attn.kv_a_proj_with_mqa.weight 576x7168 fp8
model.layers.0-61.self_attn.kv_a_proj_with_mqa.weight_scale_inv 5x56 f32
model.layers.0-61.self_attn.kv_b_proj.weight 32768x512 fp8
model.layers.0-61.self_attn.kv_b_proj.weight_scale_inv 256x4 f32
model.layers.0-61.self_attn.o_proj.weight 7168x16384 fp8
model.layers.0-61.self_attn.o_proj.weight_scale_inv 56x128 f32
model.layers.0-61.self_attn.q_a_layernorm.weight 1536 bf16
model.layers.0-61.self_attn.q_a_proj.weight 1536x7168 fp8
model.layers.0-61.self_attn.q_a_proj.weight_scale_inv 12x56 f32
model.layers.0-61.self_attn.q_b_proj.weight 24576x1536 fp8
model.layers.0-61.self_attn.q_b_proj.weight_scale_inv 192x12 f32
model.layers.3-61.mlp.experts.0-255.down_proj.weight 7168x2048 fp8
model.layers.3-61.mlp.experts.0-255.down_proj.weight_scale_inv 56x16 f32
model.layers.3-61.mlp.experts.0-255.gate_proj.weight 2048x7168 fp8
model.layers.3-61.mlp.experts.0-255.gate_proj.weight_scale_inv 16x56 f32
model.layers.3-61.mlp.experts.0-255.up_proj.weight 2048x7168 fp8
model.layers.3-61.mlp.experts.0-255.up_proj.weight_scale_inv 16x56 f32
model.layers.3-61.mlp.gate.e_score_correction_bias 256 f32
model.layers.3-61.mlp.gate.weight 256x7168 bf16
model.layers.3-61.mlp.shared_experts.down_proj.weight 7168x2048 fp8
model.layers.3-61.mlp.shared_experts.down_proj.weight_scale_inv 56x16 f32
model.layers.3-61.mlp.shared_experts.gate_proj.weight 2048x7168 fp8
model.layers.3-61.mlp.shared_experts.gate_proj.weight_scale_inv 16x56 f32
model.layers.3-61.mlp.shared_experts.up_proj.weight 2048x7168 fp8
model.layers.3-61.mlp.shared_experts.up_proj.weight_scale_inv 16x56 f32
model.layers.61.eh_proj.weight 7168x14336 bf16
model.layers.61.embed_tokens.weight 129280x7168 bf16
model.layers.61.enorm.weight 7168 bf16
model.layers.61.hnorm.weight 7168 bf16
model.layers.61.shared_head.head.weight 129280x7168 bf16
model.layers.61.shared_head.norm.weight 7168 bf16
model.norm.weight 7168 bf16
""",
    "DeepSeek-V2-Lite": """
lm_head.weight 102400x2048 bf16
model.embed_tokens.weight 102400x2048 bf16
model.layers.0.mlp.down_proj.weight 2048x10944 bf16
model.layers.0.mlp.gate_proj.weight 10944x2048 bf16
model.layers.0.mlp.up_proj.weight 10944x2048 bf16
model.layers.0-26.input_layernorm.weight 2048 bf16
model.layers.0-26.post_attention_layernorm.weight 2048 bf16
model.layers.0-26.self_attn.kv_a_layernorm.weight 512 bf16
model.layers.0-26.self_attn.kv_a_proj_with_mqa.weight 576x2048 bf16
model.layers.0-26.self_attn.kv_b_proj.weight 4096x512 bf16
model.layers.0-26.self_attn.o_proj.weight 2048x2048 bf16
model.layers.0-26.self_attn.q_proj.weight 3072x2048 bf16
model.layers.1-26.mlp.experts.0-63.down_proj.weight 2048x1408 bf16
model.layers.1-26.mlp.experts.0-63.gate_proj.weight 1408x2048 bf16
model.layers.1-26.mlp.experts.0-63.up_proj.weight 1408x2048 bf16
model.layers.1-26.mlp.gate.weight 64x2048 bf16
model.layers.1-26.mlp.shared_experts.down_proj.weight 2048x2816 bf16
model.layers.1-26.mlp.shared_experts.gate_proj.weight 2816x2048 bf16
model.layers.1-26.mlp.shared_experts.up_proj.weight 2816x2048 bf16
model.norm.weight 2048 bf16
""",
}
LISTS["Moonlight-16B"] = (
    LISTS["DeepSeek-V2-Lite"].replace("102400", "163840").replace("10944", "11264")
    + "model.layers.1-26.mlp.gate.e_score_correction_bias 64 f32\n"
)


def published(name):
    """``{tensor: (shape, dtype)}`` of a model's files."""
    found = {}
    for line in LISTS[name].split("\n"):
        if line:
            pattern, shape, dtype = line.split()
            parts = re.split(r"(\d+)-(\d+)", pattern)
            ranges = [range(int(a), int(b) + 1) for a, b in zip(parts[1::3], parts[2::3], strict=True)]
            for numbers in itertools.product(*ranges):
                words = itertools.zip_longest(parts[::3], map(str, numbers), fillvalue="")
                full = "".join(itertools.chain.from_iterable(words))
                found[full] = tuple(map(int, shape.split("x"))), dtype
    return found
