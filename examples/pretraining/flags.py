"""The command line of ``examples/pretrain.py``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpipe.deepseek import LayerCosts, LoRA, ModelConfig
    from jaxpipe.schedule import Schedule

AXES = ("pp", "ep", "dp")
COMMANDS = ("train", "plan", "export", "eval", "generate")
DEFAULT = "tiny"
"""The configuration of a run that names none and begins with no weights."""

ENDS = {"together": True, "apart": False}
"""Whether all ranks share the ends, by what ``--ends`` calls it."""

AUTO_STASH = "auto"
"""Stands for the largest stash that the memory has room for."""

ALL = "all"
"""Stands for all bytes that there are."""

AUTO_COSTS = "auto"
"""Stands for what layers take on the chip, as it is planned."""

AUTO_FETCHED = "auto"
"""Stands for as many fetched experts as pay."""

MAX_FILE = 5.0
"""GB of a file of an exported folder."""


def parse_mesh(text: str) -> dict[str, int]:
    """``"pp=4,ep=2"`` as a dict.

    >>> parse_mesh("pp=4,ep=2")
    {'pp': 4, 'ep': 2}
    """
    from jaxpipe.planning.mesh import mesh_sizes  # noqa: PLC0415

    try:
        sizes = mesh_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if "pp" not in sizes or not set(sizes) <= set(AXES):
        raise argparse.ArgumentTypeError(f"{text!r}: a mesh needs axis pp, may have ep and dp, and no other")
    return sizes


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The subcommand, "train" where none is given, and its arguments.

    >>> split_command(["--steps", "4"])
    ('train', ['--steps', '4'])
    >>> split_command(["export", "runs/a"])
    ('export', ['runs/a'])
    """
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], list(arguments[1:])
    return "train", list(arguments)


def capacity(text: str) -> float | str:
    """A factor of the capacity, or "none".

    >>> capacity("1.1"), capacity("none")
    (1.1, 'none')
    """
    try:
        return text if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a capacity is a factor of at least 1, or none") from None


def parse_fetched(text: str) -> int | str:
    """A number of experts, "all" or "auto".

    >>> parse_fetched("2"), parse_fetched("all")
    (2, 'all')
    """
    if text in ("all", AUTO_FETCHED):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give experts, at least 1, or all or {AUTO_FETCHED}")
    return int(text)


def parse_stash(text: str) -> int | str:
    """Bytes, or "auto".

    >>> parse_stash("1.5e9"), parse_stash("auto")
    (1500000000, 'auto')
    """
    if text == AUTO_STASH:
        return text
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give bytes, as in 1.5e9, or {AUTO_STASH}")
    return int(number)


def parse_bytes(text: str) -> int:
    """Bytes, or "all".

    >>> parse_bytes("1.5e9"), parse_bytes("all") > 1e15
    (1500000000, True)
    """
    if text == ALL:
        return 1 << 60
    found = parse_stash(text)
    if isinstance(found, str):
        raise argparse.ArgumentTypeError(f"{text!r}: give bytes, as in 1.5e9, or {ALL}")
    return found


def parse_costs(text: str) -> LayerCosts | str:
    """Costs by kind of layer, or "auto".

    >>> parse_costs("dense=1.5,moe=2,head=3"), parse_costs("auto")
    (LayerCosts(dense=1.5, moe=2.0, mtp=None, head=3.0, embedding=0.0), 'auto')
    """
    from jaxpipe.deepseek import LayerCosts  # noqa: PLC0415

    if text == AUTO_COSTS:
        return text
    try:
        return LayerCosts.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; or {AUTO_COSTS}") from None


def add_sizes(parser: argparse._ActionsContainer, config: str | None) -> None:
    """Flags of the model's sizes, which a run and its plan share; `sized_config` reads them."""
    parser.add_argument(
        "--config", default=config,
        help="tiny, tiny-128, moe-1b, moe-16b or dsv3-671b; or config.json as Hugging Face has it, or a folder with one"
    )  # fmt: skip
    parser.add_argument("--layers", type=int, help="of the whole model; default: the configuration's")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence; default: the configuration's")
    parser.add_argument("--remat", choices=["none", "attention", "layer"], help="what the backward pass computes again")
    parser.add_argument(
        "--stash", type=parse_stash, metavar="BYTES", help="that a stage may keep of a microbatch, as in 1.5e9; the "
        "backward pass computes the rest again, in place of --remat. auto: as many as the chip has memory for"
    )  # fmt: skip
    parser.add_argument(
        "--offload", type=parse_bytes, metavar="BYTES", default=0, help="of what a stage keeps of a microbatch that "
        "are in the host's memory until the backward pass, as in 1e9, or all; default: 0"
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=["bf16", "fp8"], help="of Linears and experts: fp8 multiplies numbers of 8 bits, for "
        "widths that are multiples of 128 (not tiny's); default: the configuration's"
    )  # fmt: skip
    parser.add_argument(
        "--moments", choices=["float32", "bfloat16"], help="what the optimizer keeps; default: the configuration's"
    )
    parser.add_argument(
        "--grad-dtype", default="float32", choices=["float32", "bfloat16"],
        help="what gradients are summed in; bfloat16 takes half the memory and keeps 8 bits"
    )  # fmt: skip
    parser.add_argument(
        "--deferred", type=int, metavar="COUNT", help="most weight gradients that a rank puts off at once, for each of "
        "which it keeps what it needs; default: as many as the schedule does"
    )  # fmt: skip
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank beside attention's "
                        "matrices, and nothing else; what is frozen is kept in --dtype")  # fmt: skip
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="adapters count ALPHA / RANK; default: 2 RANK"
    )
    parser.add_argument(
        "--lora-targets", metavar="NAMES", help="matrices with adapters, of query, query_down, query_up, latent_down, "
        "key_up, value_up and out, with commas; default: all that the model has"
    )  # fmt: skip
    parser.add_argument("--zero1", action="store_true", help="devices that have the same parameters keep a part of "
                        "them and of their moments each, and gather them once a step")  # fmt: skip
    parser.add_argument(
        "--ends", choices=list(ENDS), help="who runs embedding and head: all pipeline ranks together, each with a "
        "part of the vocabulary, or apart: the ranks with the first and the last stage; default: what leaves the "
        "busiest rank fewer operations"
    )  # fmt: skip
    parser.add_argument(
        "--layer-costs", type=parse_costs, metavar="COSTS", help="by which stages get their layers, as in "
        "dense=1.5,moe=2,mtp=2.5,head=3.25,embedding=0.1, in any unit. auto: the milliseconds that each is planned to "
        "take on the chip, as plan prints them; default: their operations"
    )  # fmt: skip
    parser.add_argument(
        "--gather-head", choices=["microbatch", "step"], help="how often an output matrix in parts is gathered, with "
        "--ends apart; once a step it stays whole on all devices; default: the configuration's, microbatch"
    )  # fmt: skip
    parser.add_argument("--slots", type=int, help="of a layer's experts and copies of them; default: the model's")
    parser.add_argument(
        "--capacity", type=capacity, help="rows for tokens, as a factor of what evenly spread choices need, such as "
        "eplb_jax.capacity_from gives; none: for the worst case; default: the configuration's"
    )  # fmt: skip
    parser.add_argument(
        "--exchange", choices=["dense", "nodes", "ragged"], help="how tokens reach experts: nodes sends each at most "
        "once to a node, and within it from there; default: the configuration's, dense"
    )  # fmt: skip
    parser.add_argument("--devices-per-node", type=int, default=8, help="devices with fast links to each other")


def sized_config(args: argparse.Namespace, devices: int, *, auto_costs: bool = False) -> ModelConfig:
    """The configuration that the flags name, with their sizes, its experts over ``devices``.

    Args:
      args: what was parsed.
      devices: of the experts' axis.
      auto_costs: whether the caller works out ``--layer-costs auto``, which depend on schedule and chip.

    Raises:
      ValueError: no such configuration, or sizes that do not fit each other; costs to be worked out where that is not
        done.
    """
    if args.layer_costs == AUTO_COSTS and not auto_costs:
        raise ValueError(f"--layer-costs {AUTO_COSTS} is not known here: give the costs that plan prints")
    given = {name: getattr(args, name) for name in ("layers", "sequence", "remat", "moments", "gather_head")}
    given["zero1"] = args.zero1 or None
    given["layer_costs"] = None if args.layer_costs == AUTO_COSTS else args.layer_costs
    given["shared_ends"] = None if args.ends is None else ENDS[args.ends]
    if getattr(args, "stash", None) is not None:
        if args.remat not in (None, "none"):
            raise ValueError(
                f"--stash {args.stash} --remat {args.remat}: a stash decides what is computed again, leave out --remat"
            )
        given["remat"] = "none"
    given["lora"] = _adapters(args)
    config = dataclasses.replace(
        base_config(args), **{name: value for name, value in given.items() if value is not None}
    )
    if args.precision is not None:
        try:
            config = config.in_precision(args.precision)
        except ValueError as error:
            raise ValueError(f"--config {args.config or DEFAULT} --precision {args.precision}: {error}") from None
    if args.gather_head == "step" and (not config.shard_outer or config.tied or config.shared_ends):
        raise ValueError(
            f"--gather-head step of a model with shard_outer={config.shard_outer}, tied={config.tied}, "
            f"shared_ends={config.shared_ends}, which keeps no output matrix in parts over the experts' axis: leave it "
            "out, or take a configuration with shard_outer=True that is not tied, and --ends apart"
        )
    return with_exchange(config, args).over_devices(devices, args.slots)


def _adapters(args: argparse.Namespace) -> LoRA | None:
    """The adapters that the flags name.

    Raises:
      ValueError: see `jaxpipe.deepseek.LoRA`; flags of adapters without any.
    """
    from jaxpipe.deepseek import LoRA  # noqa: PLC0415

    rank, alpha, targets = (getattr(args, name, None) for name in ("lora", "lora_alpha", "lora_targets"))
    if rank is None:
        if alpha is not None or targets is not None:
            raise ValueError("--lora-alpha and --lora-targets are of adapters: give their --lora RANK too")
        return None
    chosen = {} if targets is None else {"targets": tuple(name.strip() for name in targets.split(",") if name.strip())}
    try:
        return LoRA(rank, alpha, **chosen)
    except ValueError as error:
        raise ValueError(f"--lora {rank}: {error}") from None


def with_exchange(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """The configuration with the exchange and the room for tokens that the flags name.

    Raises:
      ValueError: a factor below 1.
    """
    changes: dict[str, Any] = {}
    if args.capacity is not None:
        changes["capacity_factor"] = None if args.capacity == "none" else args.capacity
    if args.exchange is not None:
        changes["exchange"] = args.exchange
    if args.exchange == "nodes":
        changes["devices_per_node"] = args.devices_per_node
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes)) if changes else config


def built_schedule(name: str, ranks: int, microbatches: int, deferred: int | None) -> Schedule:
    """The schedule of a name, with at most so many weight gradients put off at once; None: as it is.

    Raises:
      ValueError: there is no such schedule, or a negative bound.
    """
    from jaxpipe.schedule import bound_deferred, build  # noqa: PLC0415

    schedule = build(name, ranks, microbatches)
    return schedule if deferred is None else bound_deferred(schedule, deferred)


def base_config(args: argparse.Namespace) -> ModelConfig:
    """The configuration that ``--config`` names, or ``--from``'s own where there is none.

    Raises:
      ValueError: no such configuration, or one that is not understood.
    """
    from jaxpipe.deepseek import MODELS, model_config  # noqa: PLC0415
    from jaxpipe.deepseek.hf_config import from_hf_config  # noqa: PLC0415
    from jaxpipe.deepseek.hf_files import read_json  # noqa: PLC0415
    from jaxpipe.deepseek.hf_load import folder_config  # noqa: PLC0415

    weights = getattr(args, "weights", None)
    if weights is not None and args.config is None:
        return folder_config(weights)
    name = args.config or DEFAULT
    path = pathlib.Path(name)
    if name in MODELS or not path.exists():
        config = model_config(name)
    else:
        config = from_hf_config(read_json(path / "config.json" if path.is_dir() else path))
    return config if weights is None else folder_config(weights, config)


def train_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Flags of a run."""
    parser = argparse.ArgumentParser(
        "pretrain.py train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    add_sizes(model, None)
    model.add_argument(
        "--from", dest="weights", type=pathlib.Path, metavar="FOLDER",
        help="begin with the weights of a Hugging Face folder, whose config.json is the default of --config"
    )  # fmt: skip
    model.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    model.add_argument("--seed", type=int, default=0)

    plan = parser.add_argument_group("pipeline")
    plan.add_argument("--schedule", default="dualpipev", help="a name that jaxpipe.schedule.build knows; auto: "
                      "the fastest that fits, by times measured on the devices, which the run keeps")  # fmt: skip
    plan.add_argument("--mesh", type=parse_mesh, default="pp=4,ep=2", help="sizes of pp, ep (experts) and dp (data)")
    plan.add_argument("--microbatches", type=int, help="default: twice the pipeline ranks; with --schedule auto "
                      "as many sequences as that, in any number of microbatches")  # fmt: skip
    plan.add_argument("--microbatch-size", type=int, default=4, help="sequences of a microbatch, over all data shards")
    plan.add_argument("--rebalance-every", type=int, default=10, help="steps between placements of experts; 0: never")
    plan.add_argument(
        "--rebalance-if", default="better", choices=["better", "pays"], help="placements that are taken: 5%% better; "
        "or of them those where moving takes less than it saves, by times that are measured and differ from run to run"
    )  # fmt: skip
    plan.add_argument(
        "--fetched", type=parse_fetched, default=AUTO_FETCHED, metavar="COUNT", help="experts that a device gets of "
        "another at most for its copies; layers that need more gather all. all: always gather; auto: twice what the "
        "first placement needs, where that is at most half of all"
    )  # fmt: skip

    data = parser.add_argument_group("data")
    data.add_argument("--data", help="glob of text, .bin or .npy files; default: the Python standard library's source")
    data.add_argument("--token-dtype", default="uint16", choices=["uint16", "uint32"], help="of .bin files")
    data.add_argument(
        "--tokenizer", type=pathlib.Path, metavar="FILE",
        help="tokenizer.json, or a folder with one, for text and .jsonl files, of documents or conversations; default: "
        "that of --from; otherwise text is read byte by byte"
    )  # fmt: skip
    data.add_argument("--separator", type=int, help="token between documents, never a target; a tokenizer has one")
    data.add_argument(
        "--document-mask", action="store_true", help="documents of a sequence do not see each other: attention ends "
        "where they do"
    )  # fmt: skip

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=70)
    training.add_argument("--learning-rate", type=float, default=3e-3)
    training.add_argument("--warmup", type=int, default=10, help="steps")
    training.add_argument(
        "--rates", default="cosine", choices=["cosine", "wsd"],
        help="the learning rate after its warm-up: cosine, or wsd: the highest until a decay in a straight line"
    )  # fmt: skip
    training.add_argument("--decay", type=float, default=0.2, help="the share of the steps for which wsd decays")
    training.add_argument(
        "--optimizer", default="adamw", choices=["adamw", "muon"], help="muon: for matrices, and AdamW for the rest"
    )
    training.add_argument("--weight-decay", type=float, default=0.1, help="of matrices")
    training.add_argument("--max-skipped", type=int, default=10, help="steps without finite gradients in a row")
    training.add_argument("--eval-every", type=int, default=70, help="steps between evaluations; 0: none")
    training.add_argument("--eval-batches", type=int, default=4)

    keeping = parser.add_argument_group("checkpoints and reports")
    keeping.add_argument("--out", type=pathlib.Path, help="folder of the run; default: a new one in runs/")
    keeping.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    keeping.add_argument("--keep", type=int, default=3, help="checkpoints that stay")
    keeping.add_argument("--resume", default="auto", help="auto: from --out; never; or another run's folder")
    keeping.add_argument("--profile", type=int, default=0, metavar="STEPS", help="profile so many steps")
    keeping.add_argument("--check", type=int, default=0, metavar="STEPS", help="compare with a run without a pipeline")

    hosts = parser.add_argument_group("processes; Slurm and Open MPI need none of these")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    hosts.add_argument("--num-processes", type=int)
    hosts.add_argument("--process-id", type=int)
    hosts.add_argument("--heartbeat", type=int, default=30, help="seconds after which a silent machine counts as dead")
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Flags of the export."""
    parser = argparse.ArgumentParser("pretrain.py export", description="Writes parameters for other programs.")
    parser.add_argument("run", type=pathlib.Path, help="the --out folder of a run, or its checkpoints")
    parser.add_argument(
        "--to", type=pathlib.Path, required=True,
        help="a new folder, written as Hugging Face has it; or a .safetensors file with plain arrays by layer"
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "fp8"], help="fp8: of a folder's")
    parser.add_argument(
        "--like", type=pathlib.Path, metavar="FOLDER",
        help="a Hugging Face folder whose tokenizer and other texts the new one gets; default: that of --from"
    )  # fmt: skip
    parser.add_argument("--max-file", type=float, metavar="GB", help=f"of a folder's files; default: {MAX_FILE}")
    return parser
