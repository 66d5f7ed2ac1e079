"""config.json to a ModelConfig and back; names and shapes of published models."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe.deepseek import MODELS, build_model, from_hf_config, to_hf_config
from jaxpipe.deepseek.hf_names import made_here, scale_name, tensors
from tests.jaxpipe.deepseek.goldens import NAMES, unpack
from tests.jaxpipe.deepseek.models import SMALL, small
from tests.jaxpipe.deepseek.published import CONFIGS, published

BYTES = {"bf16": 2, "fp8": 1, "f32": 4}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_exactly_these_tensors(name):
    config = from_hf_config(CONFIGS[name])
    scaled, made = "quantization_config" in CONFIGS[name], {}
    for tensor_name, tensor in tensors(config).items():
        dtype = "f32" if tensor.exact else "fp8" if scaled and tensor.quantised else "bf16"
        made[tensor_name] = tensor.shape, dtype
        if dtype == "fp8":
            made[scale_name(tensor_name)] = tensor.scale_shape, "f32"
    assert made == published(name)
    own = [tensor for tensor in tensors(config).values() if tensor.copy_of is None]
    assert sum(math.prod(tensor.shape) for tensor in own) == config.total + config.mtp_parameters - (
        0 if config.selection_bias else config.moe_layers * config.experts
    )


def test_published_sizes():
    found = published("DeepSeek-V3")
    assert len(found) == 91_991
    assert sum(math.prod(shape) * BYTES[dtype] for shape, dtype in found.values()) == 688_574_839_360
    found = published("DeepSeek-V2-Lite")  # as DeepSeek-V2-Lite's model card counts them
    assert sum(math.prod(shape) for shape, _ in found.values()) == 15_706_484_224


@pytest.mark.parametrize("name", [*CONFIGS, *NAMES])
def test_a_config_goes_there_and_back(name, tmp_path):
    values = CONFIGS[name] if name in CONFIGS else json.loads((unpack(name, tmp_path) / "config.json").read_text())
    config = from_hf_config(values)
    assert to_hf_config(config, values) == values
    assert from_hf_config(to_hf_config(config), sequence=config.sequence) == config
    other = dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=7.0), tied=True, layers=5)
    assert from_hf_config(to_hf_config(other, values)) == other


def test_what_a_published_config_says():
    config = from_hf_config(CONFIGS["Moonlight-16B"])
    router = config.moe.router
    assert (router.scoring, router.normalise, router.scale, router.num_groups) == ("sigmoid", True, 2.446, 1)
    assert (config.rope.theta, config.rope.interleaved, config.rope.yarn) == (50_000.0, True, None)
    assert (config.norm_eps, config.query_rank, config.mtp, config.moe.capacity_factor) == (1e-5, None, False, None)
    lite = from_hf_config(CONFIGS["DeepSeek-V2-Lite"])
    assert (lite.moe.router.scoring, lite.moe.router.normalise, lite.selection_bias) == ("softmax", False, False)
    assert lite.total == MODELS["moe-16b"].total
    large, ours = from_hf_config(CONFIGS["DeepSeek-V3"]), MODELS["dsv3-671b"]
    assert (large.total, large.active, large.mtp_parameters) == (ours.total, ours.active, ours.mtp_parameters)
    grouped = CONFIGS["DeepSeek-V2-Lite"] | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    router = from_hf_config(grouped).moe.router
    assert (router.num_groups, router.top_groups, router.group_best) == (8, 3, 1)
    assert to_hf_config(from_hf_config(grouped), grouped) == grouped


V3, V2 = "DeepSeek-V3", "DeepSeek-V2-Lite"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (V3, {"model_type": "llama"}, r"model_type='llama': it must be one of deepseek_v2, deepseek_v3"),
        (V3, {"sliding_window": 128}, r"sliding_window=128: not known here"),
        (V3, {"attention_bias": True}, r"attention_bias=True: the model here has False"),
        (V3, {"hidden_act": "gelu"}, r"hidden_act='gelu': the model here has 'silu'"),
        (V3, {"attention_dropout": 0.1}, r"attention_dropout=0.1"),
        (V3, {"moe_layer_freq": 2}, r"moe_layer_freq=2"),
        (V3, {"num_key_value_heads": 8}, r"num_key_value_heads=8: latent attention has 128 here"),
        (V3, {"head_dim": 128}, r"head_dim=128: latent attention has 64"),
        (V3, {"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers=2: 0 or 1"),
        (V3, {"scoring_func": "softmax"}, r"scoring_func='softmax': deepseek_v3 scores by 'sigmoid'"),
        (V3, {"topk_method": "greedy"}, r"topk_method='greedy': deepseek_v3 knows noaux_tc"),
        (V3, {"n_group": None}, r"n_group is missing"),
        (V3, {"hidden_size": None}, r"hidden_size is missing"),
        (V3, {"quantization_config": {"quant_method": "awq"}}, r"quant_method='awq': only 'fp8'"),
        (
            V3,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size=\[64, 64\]: only blocks of 128 x 128 can be read",
        ),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_type='linear': 'default' and 'yarn' are known"),
        (V3, {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.5}}, r"mscale=0.5 and mscale_all_dim=None"),
        (V3, {"rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}}, r"factor=None"),
        (V3, {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}}, r"attention_factor"),
        (V3, {"rope_scaling": {"type": "yarn", "factor": 2, "wave": 1}}, r"YaRN with \{'wave': 1\}: not known"),
        (V3, {"rope_parameters": {"rope_type": "default"}}, r"rope_parameters and rope_scaling are both given"),
        (V3, {"hidden_size": "61"}, r"hidden_size='61': it must be a whole number; correct config.json"),
        (V3, {"num_hidden_layers": 61.0}, r"num_hidden_layers=61.0: it must be a whole number"),
        (V3, {"vocab_size": True}, r"vocab_size=True: it must be a whole number"),
        (V3, {"moe_layer_freq": True}, r"moe_layer_freq=True: it must be a whole number"),
        (V3, {"num_nextn_predict_layers": False}, r"num_nextn_predict_layers=False: it must be a whole number"),
        (V3, {"rms_norm_eps": math.nan}, r"rms_norm_eps=nan: it must be a finite number"),
        (V3, {"rms_norm_eps": "1e-6"}, r"rms_norm_eps='1e-6': it must be a finite number"),
        (V3, {"routed_scaling_factor": 10**400}, r"routed_scaling_factor=10+: it must be a finite number"),
        (V3, {"rope_theta": math.inf}, r"rope_theta=inf: it must be a finite number"),
        (V3, {"norm_topk_prob": "false"}, r"norm_topk_prob='false': it must be true or false"),
        (V3, {"rope_interleave": 0}, r"rope_interleave=0: it must be true or false"),
        (V3, {"attention_bias": 0}, r"attention_bias=0: it must be true or false"),
        (V3, {"scoring_func": ["sigmoid"]}, r"scoring_func=\['sigmoid'\]: it must be a text"),
        (V3, {"model_type": ["deepseek_v3"]}, r"model_type=\['deepseek_v3'\]: it must be one of"),
        (V3, {"quantization_config": "fp8"}, r"quantization_config='fp8': it must be an object"),
        (V3, {"rope_scaling": "yarn"}, r"rope_scaling='yarn': it must be an object"),
        (V3, {"rope_scaling": {"type": "yarn", "factor": "2"}}, r"rope_scaling.factor='2': it must be a finite number"),
        (
            V3,
            {"rope_scaling": {"factor": 40}},
            r"rope_scaling with \{'factor': 40\}, and with no type: plain rotations",
        ),
        (
            V3,
            {"rope_scaling": {"type": "default", "factor": 2}},
            r"\{'factor': 2\}, and with rope_type='default': plain",
        ),
        (V3, {"rope_scaling": {"type": "yarn", "rope_type": "default"}}, r"rope_type='default' and type='yarn'"),
        (V3, {"max_position_embeddings": 4096}, r"max_position_embeddings=4096 with YaRN .*=4096: .* to 163840, or"),
        (V2, {"norm_topk_prob": True}, r"norm_topk_prob=True: transformers ignores it"),
        (V2, {"topk_method": "noaux_tc"}, r"topk_method='noaux_tc': deepseek_v2 knows greedy and group_limited"),
        (V2, {"n_group": 7, "topk_method": "group_limited_greedy"}, r"num_experts=64 do not divide"),
    ],
)
def test_what_cannot_be_expressed_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(CONFIGS[name] | changes)


def test_fields_of_null_say_nothing():
    for name, fields in (
        (V3, ("norm_topk_prob", "rms_norm_eps", "routed_scaling_factor", "rope_theta", "quantization_config")),
        (V2, ("norm_topk_prob", "rms_norm_eps", "routed_scaling_factor", "n_group", "first_k_dense_replace")),
    ):
        values = CONFIGS[name] | {"first_k_dense_replace": 0} if name == V2 else CONFIGS[name]
        nulls = values | dict.fromkeys(fields)
        assert from_hf_config(nulls) == from_hf_config(values)
        assert to_hf_config(from_hf_config(nulls), nulls) == nulls
        # As newer versions of transformers write it.
        newer = values | {"output_router_logits": False}
        assert to_hf_config(from_hf_config(newer), newer) == newer
    # What would mean something else is written.
    config = from_hf_config(CONFIGS[V3])
    other = dataclasses.replace(config, rope=dataclasses.replace(config.rope, interleaved=False))
    assert from_hf_config(to_hf_config(other, CONFIGS[V3] | {"rope_interleave": None})) == other
    bare = {field: value for field, value in CONFIGS[V3].items() if field not in ("n_group", "topk_group")}
    moe = from_hf_config(CONFIGS["Moonlight-16B"]).moe
    other = dataclasses.replace(config, moe=moe)
    assert from_hf_config(to_hf_config(other, bare)) == other


def test_a_base_of_another_model_or_length_is_made_to_fit():
    """What readers would take for the other model, or for its longest sequence, does not stay."""
    lite = from_hf_config(CONFIGS[V2])
    made = to_hf_config(lite, CONFIGS[V3])
    assert (made["model_type"], made["architectures"]) == ("deepseek_v2", ["DeepseekV2ForCausalLM"])
    assert "auto_map" not in made and made["max_position_embeddings"] == 163_840
    assert from_hf_config(made) == lite
    plain = dataclasses.replace(lite, rope=dataclasses.replace(lite.rope, yarn=None), sequence=2048)
    made = to_hf_config(plain, CONFIGS[V2])
    assert made["max_position_embeddings"] == 2048 and made["architectures"] == CONFIGS[V2]["architectures"]
    yarn = dataclasses.replace(lite.rope.yarn, factor=10.0)
    made = to_hf_config(dataclasses.replace(lite, rope=dataclasses.replace(lite.rope, yarn=yarn)), CONFIGS[V2])
    assert made["max_position_embeddings"] == 40_960


def test_a_file_that_leaves_sizes_out_is_refused():
    for name in ("q_lora_rank", "first_k_dense_replace", "n_routed_experts"):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            from_hf_config({field: value for field, value in CONFIGS[V3].items() if field != name})


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        ({"scoring": "softmax"}, {}, r"scoring='softmax' with selection_bias=True"),
        ({}, {"selection_bias": False, "bias_update_speed": 0.0}, r"scoring='sigmoid' with selection_bias=False"),
        ({"scoring": "softmax"}, {"selection_bias": False, "bias_update_speed": 0.0}, r"with normalise=True"),
        ({"num_groups": 2, "group_best": 1}, {}, r"group_best=1 with scoring='sigmoid': files mean 2"),
    ],
)
def test_a_model_that_no_file_can_say_is_refused(router, changes, message):
    moe = dataclasses.replace(SMALL.moe, router=dataclasses.replace(SMALL.moe.router, **router))
    with pytest.raises(ValueError, match=message):
        to_hf_config(small(moe=moe, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"mtp": True},
        {"query_rank": None, "dense_layers": 2, "redundant": 0},
        {"tied": True, "mtp": True, "dense_layers": 0},
        {"selection_bias": False, "bias_update_speed": 0.0},
    ],
)
def test_tensors_fill_every_parameter_once_and_read_back_what_they_wrote(changes):
    config = small(**changes)
    model = build_model(config, jaxpipe.schedule.build("1f1b", 1, 1), 0, abstract=True)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(model.to_layers, model.params))
    rng, files = np.random.default_rng(0), {}

    def leaf_of(part):
        leaf = tree
        for key in part.path:
            leaf = leaf[key]
        return leaf

    for name, tensor in tensors(config).items():
        files[name] = rng.uniform(1, 2, tensor.shape)
        for part in tensor.parts:
            assert leaf_of(part)[part.index].shape == part.shape
            leaf_of(part)[part.index] += part.from_file(files[name])
    filled = [(path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for key, leaf in filled:
        if key in made_here(config):
            assert not leaf.any()
        else:
            assert (leaf >= 1).all() and (leaf < 2).all()
    for name, tensor in tensors(config).items():
        written = np.full(tensor.shape, np.nan)
        for part in tensor.parts:
            part.to_file(leaf_of(part)[part.index], written)
        if tensor.copy_of is None:
            np.testing.assert_array_equal(written, files[name])
        else:
            assert not tensor.parts and tensors(config)[tensor.copy_of].shape == tensor.shape


def test_multi_token_predictions_projection_reads_the_embedding_first_in_files():
    """``eh_proj(cat([enorm(embedding), hnorm(features)]))``, vLLM's deepseek_mtp.py; here features come first."""
    table = tensors(small(mtp=True))
    found = {
        (part.take[1].start, part.take[1].stop): part.index for part in table["model.layers.5.eh_proj.weight"].parts
    }
    assert found == {(0, 16): (slice(16, 32),), (16, 32): (slice(0, 16),)}
    assert table["model.layers.5.enorm.weight"].parts[0].path == ("outer", "mtp", "embedding_norm", "scale")
    assert table["model.layers.5.hnorm.weight"].parts[0].path == ("outer", "mtp", "hidden_norm", "scale")
