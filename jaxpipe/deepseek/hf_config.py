"""Hugging Face's ``config.json`` of DeepSeek's models, to a `ModelConfig` and back.

A field that a `ModelConfig` says is translated; one that must have a certain value is checked; one that changes neither
parameters nor results is let through by name (`IGNORED`); any other is refused, because nobody knows what it changes.

Facts are those of transformers' and DeepSeek's own configuration and modelling files of the same names:
github.com/huggingface/transformers, models/deepseek_v3, models/deepseek_v2 and modeling_rope_utils.py;
huggingface.co/deepseek-ai/DeepSeek-V3 and DeepSeek-V2-Lite, configuration_deepseek.py. Where the two would compute
different things, the value is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from eplb_jax import MoEConfig, RouterConfig
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.hf_fp8 import BLOCK
from jaxpipe.deepseek.rope import Rope, Yarn

V2, V3 = "deepseek_v2", "deepseek_v3"

IGNORED = frozenset(
    {
        *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "transformers_version"),
        *("dtype", "torch_dtype", "initializer_range", "pretraining_tp", "ep_size"),
        *(
            "use_cache",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "chunk_size_feed_forward",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"),
        *("aux_loss_alpha", "seq_aux", "max_position_embeddings", "quantization_config"),
    }
)
"""Fields that change no result of the model: files' dtypes and scales are the reader's concern, tokens that begin and
end a text the tokenizer's, losses of training ours."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "moe_layer_freq": (1,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
"""Fields that the model has one way only, and the values that say it."""

ROUTERS = {V2: "softmax", V3: "sigmoid"}
METHODS = {V2: ("greedy", "group_limited_greedy"), V3: ("noaux_tc",)}

_SIZES = {
    "heads": "num_attention_heads",
    "query_rank": "q_lora_rank",
    "latent": "kv_lora_rank",
    "content": "qk_nope_head_dim",
    "rotary": "qk_rope_head_dim",
    "value": "v_head_dim",
    "norm_eps": "rms_norm_eps",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "dense_hidden": "intermediate_size",
    "tied": "tie_word_embeddings",
}
"""Fields of a `ModelConfig` that are one of a ``config.json``."""


def _fixed(of: type) -> list[str]:
    return [name for name, right in FIXED.items() if type(right[0]) is of]


_WHOLE, _NUMBER, _FLAG, _TEXT, _OBJECT = "a whole number", "a finite number", "true or false", "a text", "an object"

_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts"), _WHOLE),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "num_nextn_predict_layers"), _WHOLE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "qk_head_dim", "max_position_embeddings"), _WHOLE),
    **dict.fromkeys((*_SIZES.values(), *_fixed(int)), _WHOLE),
    **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor", "rope_theta", *_fixed(float)), _NUMBER),
    **dict.fromkeys(("norm_topk_prob", "rope_interleave", "tie_word_embeddings", *_fixed(bool)), _FLAG),
    **dict.fromkeys(("model_type", "topk_method", "scoring_func", *_fixed(str)), _TEXT),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), _OBJECT),
}
"""What fields hold that are read here."""

_ROPE_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(("rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _NUMBER),
    **{"original_max_position_embeddings": _WHOLE, "attention_factor": _NUMBER, "truncate": _FLAG},
}
"""The same of ``rope_scaling`` and ``rope_parameters``."""


def from_hf_config(values: Mapping[str, Any], *, sequence: int | None = None, mtp: bool | None = None) -> ModelConfig:
    """The model that a ``config.json`` describes.

    What such a file does not say has the defaults of `ModelConfig`; nothing is dropped for lack of capacity.

    Args:
      values: of the file.
      sequence: tokens of a training sequence; None: the longest that the model takes, at most 4096.
      mtp: whether the model has multi-token prediction's layer; None: as the file says. transformers keeps
        ``num_nextn_predict_layers`` in the file and leaves that layer's tensors out.

    Raises:
      ValueError: a field that is missing, or that is not known, or whose value cannot be expressed: with its name, the
        value and what to do.

    >>> hf = to_hf_config(ModelConfig(moe=MoEConfig(width=64, hidden=32, router=RouterConfig(8, 2, 1, 1)), heads=4,
    ...     query_rank=None, latent=16, content=16, rotary=8, value=16, vocab=128, layers=3, dense_layers=1,
    ...     dense_hidden=96, sequence=64))
    >>> from_hf_config(hf).moe.router.top_k, from_hf_config(hf).rope.interleaved
    (2, False)
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ROUTERS:
        raise ValueError(
            f"model_type={kind!r}: it must be one of {', '.join(ROUTERS)}; other models are built otherwise"
        )
    values = _meant(kind) | _checked(values)
    _check_fixed(values)
    router = _router(values, kind)
    heads, content, rotary = (_need(values, _SIZES[name]) for name in ("heads", "content", "rotary"))
    for name, right in _derived(heads, content, rotary).items():
        if values.get(name) not in (None, right):
            raise ValueError(
                f"{name}={values[name]!r}: latent attention has {right} here, as num_attention_heads={heads}, "
                f"qk_nope_head_dim={content} and qk_rope_head_dim={rotary} say; leave the field out"
            )
    predicted = values["num_nextn_predict_layers"]
    if predicted not in (0, 1):
        raise ValueError(f"num_nextn_predict_layers={predicted!r}: 0 or 1 such layer can be had; set it to 1")
    longest = values.get("max_position_embeddings", 4096)
    if "q_lora_rank" not in values:
        raise ValueError("q_lora_rank is missing: add it to config.json, with null for a query of full rank")
    sizes: dict[str, Any] = {name: _need(values, field) for name, field in _SIZES.items() if name != "query_rank"}
    sizes["query_rank"] = values["q_lora_rank"]
    if kind == V2:
        sizes["bias_update_speed"] = 0.0
    return ModelConfig(
        moe=MoEConfig(
            width=_need(values, "hidden_size"),
            hidden=_need(values, "moe_intermediate_size"),
            router=router,
            num_shared=values["n_shared_experts"],
        ),
        **sizes,
        rope=_rope(values, kind),
        sequence=min(longest, 4096) if sequence is None else sequence,
        mtp=bool(predicted) if mtp is None else mtp,
        selection_bias=kind == V3,
    )


def to_hf_config(config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
      config: of the model.
      base: another ``config.json``, usually that of the files that the model began with: what a `ModelConfig` does not
        say is taken from it, and what says the same already stays as it is written there.

    Raises:
      ValueError: what no such file can say, with the remedy.

    >>> from jaxpipe.deepseek.config import MODELS
    >>> hf = to_hf_config(MODELS["dsv3-671b"])
    >>> hf["model_type"], hf["n_routed_experts"], hf["num_nextn_predict_layers"], hf["rope_theta"]
    ('deepseek_v3', 256, 1, 10000.0)
    """
    router = config.moe.router
    if router.scoring == "softmax" and config.selection_bias:
        raise ValueError(
            "scoring='softmax' with selection_bias=True: no published model has both, so no file can say it; take "
            "selection_bias=False and bias_update_speed=0.0"
        )
    if router.scoring == "sigmoid" and not config.selection_bias:
        raise ValueError("scoring='sigmoid' with selection_bias=False: such files always hold biases; take True")
    kind = V2 if router.scoring == "softmax" else V3
    if kind == V2 and router.normalise:
        raise ValueError("scoring='softmax' with normalise=True: readers of such files disagree; take normalise=False")
    grouped = router.num_groups > 1
    best = 1 if kind == V2 else 2
    if router.top_groups < router.num_groups and router.group_best != best:
        raise ValueError(f"group_best={router.group_best} with scoring={router.scoring!r}: files mean {best}")
    if kind == V2 and not config.rope.interleaved:
        raise ValueError("scoring='softmax' with a Rope of interleaved=False: such files mean pairs side by side")
    method = ("group_limited_greedy" if grouped else "greedy") if kind == V2 else "noaux_tc"
    yarn = config.rope.yarn
    made: dict[str, Any] = {
        "model_type": kind,
        **{field: getattr(config, name) for name, field in _SIZES.items()},
        "hidden_size": config.width,
        "moe_intermediate_size": config.moe.hidden,
        "n_routed_experts": config.experts,
        "n_shared_experts": config.moe.num_shared,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "norm_topk_prob": router.normalise,
        "routed_scaling_factor": router.scale,
        "topk_method": method,
        "scoring_func": router.scoring,
        "num_nextn_predict_layers": int(config.mtp),
    }
    if kind == V3:
        made["rope_interleave"] = config.rope.interleaved
    longest = int(yarn.original * yarn.factor) if yarn else config.sequence
    architectures = ["DeepseekV2ForCausalLM" if kind == V2 else "DeepseekV3ForCausalLM"]
    if base is None:
        fixed = {"hidden_act": "silu", "attention_bias": False, "num_key_value_heads": config.heads}
        made |= fixed | {"max_position_embeddings": longest} | _rope_values(config)
        return {"architectures": architectures, **made}
    told = _meant(kind) | _checked(base)
    result = dict(base) | {name: value for name, value in made.items() if name not in told or told[name] != value}
    derived = _derived(config.heads, config.content, config.rotary)
    result |= {name: value for name, value in derived.items() if told.get(name, value) != value}
    before = _rope(told, kind)
    if base.get("model_type") != kind:
        # Code that makes the other model is none for this one.
        result.pop("auto_map", None)
        result["architectures"] = architectures
    if base.get("model_type") != kind or before != config.rope:
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            result.pop(name, None)
        result |= _rope_values(config)
    if before.yarn != yarn:
        result["max_position_embeddings"] = longest
    return result


def _derived(heads: int, content: int, rotary: int) -> dict[str, int]:
    """Fields that follow from others, which files may have too."""
    return {"num_key_value_heads": heads, "head_dim": rotary, "qk_head_dim": content + rotary}


def _meant(kind: str) -> dict[str, Any]:
    """What files mean that leave these fields out."""
    ours = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1} if kind == V2 else {}
    return ours | {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "n_shared_experts": 0,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "rope_theta": 10_000.0,
        "topk_method": METHODS[kind][0],
        "scoring_func": ROUTERS[kind],
        "norm_topk_prob": kind == V3,
        "routed_scaling_factor": 1.0 if kind == V2 else 2.5,
    }


def _need(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"{name} is missing: without it the model's sizes are not known; add it to config.json")
    return values[name]


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: all are known, and of the types that they should be."""
    known = IGNORED | FIXED.keys() | _TYPES.keys()
    # A field that says nothing changes nothing.
    unknown = [name for name, value in values.items() if name not in known and value not in (None, {}, [])]
    if unknown:
        shown = ", ".join(f"{name}={values[name]!r}" for name in unknown)
        raise ValueError(
            f"{shown}: not known here, so that nobody can say whether the model computes the same without; remove what "
            "changes nothing from config.json"
        )
    # None says that a query has full rank.
    told = {name: value for name, value in values.items() if value is not None or name == "q_lora_rank"}
    _check_types({name: value for name, value in told.items() if value is not None}, _TYPES)
    return told


def _check_types(values: Mapping[str, Any], types: Mapping[str, str], within: str = "") -> None:
    for name, wanted in types.items():
        if name in values and not _is(values[name], wanted):
            raise ValueError(f"{within}{name}={values[name]!r}: it must be {wanted}; correct config.json")


def _is(value: Any, wanted: str) -> bool:
    if wanted in (_WHOLE, _NUMBER):
        number = type(value) is int or (wanted == _NUMBER and type(value) is float)
        return number and abs(value) <= sys.float_info.max
    return isinstance(value, {_FLAG: bool, _TEXT: str, _OBJECT: Mapping}[wanted])


def _check_fixed(values: Mapping[str, Any]) -> None:
    for name, right in FIXED.items():
        if name in values and values[name] not in right:
            raise ValueError(
                f"{name}={values[name]!r}: the model here has {right[0]!r} alone; another cannot be loaded"
            )
    quantised = values.get("quantization_config", {})
    method = quantised.get("quant_method")
    if quantised and method != "fp8":
        raise ValueError(f"quantization_config.quant_method={method!r}: only 'fp8', DeepSeek's own, can be read")
    size = quantised.get("weight_block_size", [BLOCK, BLOCK])
    if size != [BLOCK, BLOCK]:
        raise ValueError(
            f"quantization_config.weight_block_size={size!r}: only blocks of {BLOCK} x {BLOCK} can be read"
        )


def _router(values: Mapping[str, Any], kind: str) -> RouterConfig:
    scoring, method = values["scoring_func"], values["topk_method"]
    if scoring != ROUTERS[kind]:
        raise ValueError(f"scoring_func={scoring!r}: {kind} scores by {ROUTERS[kind]!r}; set it so, or leave it out")
    if method not in METHODS[kind]:
        raise ValueError(
            f"topk_method={method!r}: {kind} knows {' and '.join(METHODS[kind])}; take one, or leave it out"
        )
    groups, allowed = _need(values, "n_group"), _need(values, "topk_group")
    if method == "greedy":
        groups = allowed = 1
    normalise = values["norm_topk_prob"]
    if kind == V2 and normalise:
        raise ValueError(
            f"norm_topk_prob={normalise!r}: transformers ignores it in {V2}, DeepSeek's own code does not, so results "
            "would differ; set it to false"
        )
    return RouterConfig(
        num_experts=_need(values, "n_routed_experts"),
        top_k=_need(values, "num_experts_per_tok"),
        num_groups=groups,
        top_groups=allowed,
        scoring=scoring,
        normalise=normalise,
        scale=float(values["routed_scaling_factor"]),
        group_best=1 if kind == V2 else 2,
    )


def _rope(values: Mapping[str, Any], kind: str) -> Rope:
    """Of either form: ``rope_theta`` and ``rope_scaling``, or both in ``rope_parameters``."""
    if values.get("rope_parameters") and values.get("rope_scaling"):
        raise ValueError("rope_parameters and rope_scaling are both given: leave one of them out")
    field = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = {name: value for name, value in values.get(field, {}).items() if value is not None}
    _check_types(given, _ROPE_TYPES, f"{field}.")
    interleaved = kind == V2 or values["rope_interleave"]
    theta = float(given.get("rope_theta", values["rope_theta"]))
    form = given.get("rope_type", given.get("type", "default"))
    if form != given.get("type", form):
        raise ValueError(f"{field} with rope_type={form!r} and type={given['type']!r}: leave one of them out")
    if form == "default":
        if more := {name: value for name, value in given.items() if name not in ("rope_type", "type", "rope_theta")}:
            raise ValueError(
                f"{field} with {more}, and with {'rope_type=' + repr(form) if len(given) > len(more) else 'no type'}: "
                "plain rotations have nothing of the kind; give rope_type='yarn', or leave these out"
            )
        return Rope(theta=theta, interleaved=interleaved)
    if form != "yarn":
        raise ValueError(f"rope_type={form!r}: 'default' and 'yarn' are known; another cannot be loaded")
    if unknown := {name: value for name, value in given.items() if name not in _ROPE_TYPES}:
        raise ValueError(f"YaRN with {unknown}: not known here; remove what changes nothing from config.json")
    if given.get("attention_factor") is not None or not given.get("truncate", True):
        told = {name: given[name] for name in ("attention_factor", "truncate") if name in given}
        raise ValueError(f"YaRN with {told}: cannot be expressed; DeepSeek's models leave both out")
    mscale, every = given.get("mscale"), given.get("mscale_all_dim")
    if bool(mscale) != bool(every) and not (mscale in (None, 1) and not every):
        raise ValueError(
            f"YaRN with mscale={mscale!r} and mscale_all_dim={every!r}: transformers and DeepSeek's own code read that "
            "in different ways; give both, or neither"
        )
    longest = values.get("max_position_embeddings")
    original = given.get("original_max_position_embeddings", longest)
    if original is None or given.get("factor") is None:
        raise ValueError(
            f"YaRN with factor={given.get('factor')!r} and original_max_position_embeddings={original!r}: give both"
        )
    stretched = given["factor"] * original
    if "original_max_position_embeddings" in given and longest is not None and abs(longest - stretched) >= 1:
        raise ValueError(
            f"max_position_embeddings={longest} with YaRN of factor={given['factor']!r} and "
            f"original_max_position_embeddings={original}: some versions of transformers take the factor from the two "
            f"lengths; set max_position_embeddings to {stretched:.0f}, or correct the factor"
        )
    yarn = Yarn(
        factor=float(given["factor"]),
        original=original,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        mscale=float(mscale or 1.0),
        mscale_all_dim=float(every or 0.0),
    )
    return Rope(theta=theta, interleaved=interleaved, yarn=yarn)


def _rope_values(config: ModelConfig) -> dict[str, Any]:
    """The form that readers of all versions know."""
    yarn = config.rope.yarn
    scaling = None
    if yarn is not None:
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return {"rope_theta": config.rope.theta, "rope_scaling": scaling}
