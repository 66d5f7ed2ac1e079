"""``pretrain.py eval`` and ``pretrain.py generate``: a model that is there, and what it predicts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpipe.deepseek import Server
    from pretraining.corpus import Reader

PARAMS = "params/"


def eval_parser() -> argparse.ArgumentParser:
    """Flags of an evaluation."""
    parser = argparse.ArgumentParser("pretrain.py eval", description="Loss, perplexity and experts' loads.")
    _add_model(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", help="glob of text, .jsonl, .bin or .npy files; default, of models of bytes: the Python standard "
        "library's source"
    )  # fmt: skip
    _add_tokenizer(data)
    data.add_argument("--token-dtype", default="uint16", choices=["uint16", "uint32"], help="of .bin files")
    data.add_argument("--separator", type=int, help="token between documents, never a target; a tokenizer has one")
    data.add_argument("--document-mask", action="store_true", help="documents of a sequence do not see each other")
    data.add_argument("--part", default="held_out", choices=["held_out", "train"], help="of the data")
    data.add_argument("--batches", type=int, default=4)
    data.add_argument("--batch-size", type=int, default=8, help="sequences of a batch")
    data.add_argument("--sequence", type=int, help="tokens of a sequence; default: the configuration's")
    data.add_argument("--save-loads", type=pathlib.Path, metavar="FILE.npz", help="write experts' loads, for --loads")
    return parser


def generate_parser() -> argparse.ArgumentParser:
    """Flags of generation."""
    parser = argparse.ArgumentParser("pretrain.py generate", description="Continues prompts.")
    _add_model(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", default=[], help="text; several times: a batch")
    text.add_argument(
        "--chat", action="store_true", help="a prompt is what a user says: the chat template asks for an answer"
    )
    text.add_argument("--tokens", action="append", default=[], metavar="1,2,3", help="a prompt of token numbers")
    _add_tokenizer(text)
    text.add_argument("--copies", type=int, default=1, help="how many times each prompt is answered")
    text.add_argument("--new-tokens", type=int, default=64, help="of a prompt, at most")
    text.add_argument("--stop", type=int, action="append", default=[], help="a token that ends an answer; default, of "
                      "--prompt: the one that ends a text for the tokenizer")  # fmt: skip
    text.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token, always")
    text.add_argument("--top-p", type=float, default=1.0, help="choose from the likeliest tokens of this probability")
    return parser


def _add_tokenizer(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--tokenizer", type=pathlib.Path, metavar="FILE",
        help="tokenizer.json, or a folder with one; default: that of --from, or what the run of --run has read with; "
        "of random weights a token is a byte"
    )  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--from", dest="folder", type=pathlib.Path, metavar="FOLDER", help="a Hugging Face folder")
    which.add_argument("--run", type=pathlib.Path, help="the --out folder of a run, or its checkpoints")
    which.add_argument("--config", default="tiny", help="random weights of this configuration, to measure speed")
    model.add_argument("--layers", type=int, help="of random weights; default: the configuration's")
    model.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    model.add_argument("--seed", type=int, default=0, help="of random weights, of data and of choices")
    model.add_argument("--devices", type=int, default=1, help="that experts and sequences are spread over")
    model.add_argument("--loads", type=pathlib.Path, help="experts' loads, of eval --save-loads: copies are placed so")
    model.add_argument("--slots", type=int, help="of a layer's experts and copies of them, with --loads")


def evaluate(args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Prints loss, perplexity and experts' loads.

    Raises:
      ValueError: arguments that do not fit each other, the devices or the data.
      ImportError: a package is missing.
    """
    import numpy as np  # noqa: PLC0415

    from eplb_jax import save_loads  # noqa: PLC0415
    from jaxpipe.deepseek.model import SEGMENTS  # noqa: PLC0415
    from pretraining import data  # noqa: PLC0415
    from pretraining.corpus import open_corpus  # noqa: PLC0415
    from pretraining.tables import markdown_head, markdown_row  # noqa: PLC0415

    if min(args.batches, args.batch_size) < 1:
        raise ValueError(f"--batches {args.batches} --batch-size {args.batch_size}: both are at least 1")
    if args.sequence is not None and args.sequence < 1:
        raise ValueError(f"--sequence {args.sequence}: at least 1 token; without it the configuration's are taken")
    config, reader = _described(args)
    sequence = config.sequence if args.sequence is None else args.sequence
    # Before the weights, which take longer to read.
    corpus = open_corpus(args, reader, _origin(args), config.vocab, sequence)
    part = getattr(corpus, args.part)
    server = make_server(args, say)
    config = server.config
    losses, count, loads, seconds = 0.0, 0, np.zeros((config.moe_layers, config.experts), np.int64), []
    for step in range(args.batches):
        batch = data.make_batch(part, args.seed, step, args.batch_size, sequence)
        begin = time.perf_counter()
        scores = server.score(batch["tokens"], batch["targets"], batch["mask"], batch.get(SEGMENTS))
        seconds.append(time.perf_counter() - begin)
        losses, count, loads = losses + scores.losses.sum(), count + scores.counts.sum(), loads + scores.loads
    loss = float(losses / max(count, 1))
    # The first batch is compiled for.
    rest = seconds[1:] or seconds
    speed = args.batch_size * sequence * len(rest) / sum(rest)
    say(f"loss {loss:.4f} nats, perplexity {_perplexity(loss):.3f}, of {count} tokens in {corpus.source}")
    say(f"{speed:,.0f} tokens/s{'' if seconds[1:] else ', compilation included'}")
    say("tokens of each expert, of what an even spread gives it\n")
    say(markdown_head(("layer", "least", "most", "experts, as they are numbered")))
    for layer, row in enumerate(loads):
        shares = row / max(row.mean(), 1e-30)
        cells = " ".join(f"{share:.2f}" for share in shares)
        say(markdown_row((layer + config.dense_layers, f"{shares.min():.2f}", f"{shares.max():.2f}", cells)))
    if args.save_loads is not None:
        save_loads(args.save_loads, loads)
        say(f"\n{args.save_loads}: loads of {len(loads)} layers")


def generate(args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Prints answers, and tokens per second.

    Raises:
      ValueError: arguments that do not fit each other or the devices.
      ImportError: a package is missing.
    """
    from jaxpipe.deepseek import Sampling  # noqa: PLC0415

    if args.copies < 1:
        raise ValueError(f"--copies {args.copies}: at least 1")
    if not args.prompt and not args.tokens:
        raise ValueError("nothing to continue: give --prompt TEXT, or --tokens 1,2,3")
    if args.chat and not args.prompt:
        raise ValueError("--chat: that is for text, so give --prompt TEXT")
    encode, decode, ends = _text(args) if args.prompt else (None, None, [])
    prompts = [encode(text) for text in args.prompt if encode] + [_numbers(text) for text in args.tokens]
    prompts = [prompt for prompt in prompts for _ in range(args.copies)]
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    server = make_server(args, say)
    made = server.generate(prompts, args.new_tokens, sampling, stop=args.stop or ends)
    shown = [*args.prompt, *args.tokens]
    for place, tokens in enumerate(made.tokens):
        prompt = place // args.copies
        answer = decode(tokens.tolist()) if decode and prompt < len(args.prompt) else ",".join(map(str, tokens))
        say(f"[{place}] {shown[prompt]} -> {answer}")
    told = sum(map(len, prompts))
    say(f"prompts: {told} tokens in {made.prefill_seconds:.4f} s, {told / made.prefill_seconds:,.0f} tokens/s")
    if made.decoded:
        say(
            f"answers: {made.decoded} tokens of {len(prompts)} requests in {made.decode_seconds:.4f} s, "
            f"{made.tokens_per_second:,.1f} tokens/s"
        )


def check_model(args: argparse.Namespace) -> None:
    """Refuses flags of the model that do not fit each other, before anything is read.

    Raises:
      ValueError: see there.
    """
    if args.layers is not None and (args.folder or args.run):
        raise ValueError(
            f"--layers {args.layers}: {_origin(args)} has its own layers, all of which are used; it is for the random "
            "weights of --config"
        )
    if args.slots is not None and args.slots < 1:
        raise ValueError(f"--slots {args.slots}: at least one for each expert; without it there are the model's own")
    if args.slots is not None and args.loads is None:
        raise ValueError(f"--slots {args.slots}: which experts get copies is decided by --loads, so give that too")


def make_server(args: argparse.Namespace, say: Callable[[str], None] = print) -> Server:
    """The model that the flags name, on its devices.

    Raises:
      ValueError: no such model, or devices that it does not divide over.
      ImportError: a package is missing.
    """
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    from eplb_jax import read_loads, rebalance_experts  # noqa: PLC0415
    from jaxpipe.deepseek import Server, model_config, serve, serving_mesh  # noqa: PLC0415
    from jaxpipe.deepseek.folder import read_folder  # noqa: PLC0415
    from jaxpipe.deepseek.serving import serve_random  # noqa: PLC0415

    check_model(args)
    if not 1 <= args.devices <= jax.device_count():
        raise ValueError(f"--devices {args.devices}: this process has {jax.device_count()}")
    mesh = None if args.devices == 1 else serving_mesh(jax.make_mesh((args.devices,), ("ep",)))
    dtype, tree = jnp.dtype(args.dtype), None
    if args.folder is not None:
        config, tree = read_folder(args.folder)
    elif args.run is not None:
        config, tree = read_run(args.run)
    else:
        config = model_config(args.config)
        if args.layers is not None:
            config = dataclasses.replace(config, layers=args.layers)
    placements = None
    if args.loads is not None:
        slots = config.experts + config.redundant if args.slots is None else args.slots
        loads = read_loads(args.loads)[: config.moe_layers]
        placements = rebalance_experts(loads, slots, 1, 1, args.devices)
    if tree is None:
        model = serve_random(config, args.seed, dtype=dtype, placements=placements, mesh=mesh)
    else:
        model = serve(config, tree, dtype=dtype, placements=placements, mesh=mesh)
    say(
        f"{_origin(args)}: {config.layers} layers, {config.total / 1e6:.1f}M parameters, {args.dtype}, on "
        f"{args.devices} {jax.devices()[0].device_kind}"
    )
    return Server(config, model, mesh)


def read_run(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Config and parameters of a run's newest checkpoint, in the order of the model, on one device, adapters merged.

    Raises:
      ValueError: there is no checkpoint, or one that does not match its checksums.
      ImportError: orbax is not installed.
    """
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    from jaxpipe.deepseek import merge  # noqa: PLC0415
    from pretraining.checkpoint import orbax  # noqa: PLC0415
    from pretraining.export import lora_of  # noqa: PLC0415
    from pretraining.layout import fingerprint  # noqa: PLC0415

    ocp, here = orbax(), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _newest(folder) as (manager, step, body):
        wanted = {}
        for name, text in body["arrays"].items():
            if name.startswith(PARAMS):
                kind, _, shape = text.rstrip("]").partition("[")
                sizes = tuple(int(size) for size in shape.split(",") if size)
                wanted[name] = jax.ShapeDtypeStruct(sizes, jnp.dtype(kind), sharding=here)
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        restore = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        arrays = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        if int(fingerprint(array)) != body["fingerprints"][name]:
            raise ValueError(f"the checkpoint of step {step} in {folder} is damaged: {name} is not as it was written")
        *path, last = name.removeprefix(PARAMS).split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = array
    config = _run_config(body["facts"])
    if (lora := lora_of(body["facts"])) is not None:
        tree = merge(tree, lora)
    slots = tree["layers"]["moe"].get("phy2log")
    redundant = 0 if slots is None else slots.shape[1] - config.experts
    return dataclasses.replace(config, redundant=redundant), tree


@contextlib.contextmanager
def _newest(folder: pathlib.Path) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """Orbax's manager of a run's checkpoints, the newest step, and what its checkpoint says of itself."""
    from pretraining.checkpoint import open_body, orbax  # noqa: PLC0415

    folder = (folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder).absolute()
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: name the --out folder of a run, or its checkpoints")
    ocp = orbax()
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True, create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"there is no checkpoint in {folder}")
        yield (
            manager,
            step,
            open_body(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]),
        )


def _run_config(facts: Mapping[str, Any]) -> Any:
    """The model of a run, as its checkpoint describes it, without copies of experts."""
    from jaxpipe.deepseek import MODELS, from_hf_config, model_config  # noqa: PLC0415

    if facts["config"] in MODELS:
        return dataclasses.replace(model_config(facts["config"]), layers=facts["layers"])
    return from_hf_config(facts["hugging_face"]["config"])


def _described(args: argparse.Namespace) -> tuple[Any, Reader]:
    """Config of the model that the flags name and how it reads text, before its weights are read."""
    from jaxpipe.deepseek import from_hf_config, model_config  # noqa: PLC0415
    from jaxpipe.deepseek.hf_files import read_json  # noqa: PLC0415
    from pretraining import corpus  # noqa: PLC0415

    check_model(args)
    if args.folder is not None:
        config = from_hf_config(read_json(args.folder / "config.json"))
        reader = corpus.reader_of_folder(args.folder, config.vocab)
    elif args.run is not None:
        with _newest(args.run) as (_, _, body):
            config = _run_config(body["facts"])
            reader = corpus.reader_of_run(body["facts"], config.vocab)
    else:
        config, reader = model_config(args.config), corpus.BYTES
    return config, reader if args.tokenizer is None else args.tokenizer


def _origin(args: argparse.Namespace) -> str:
    """Where the model comes from, for people."""
    return str(args.folder or args.run or f"random weights of {args.config}")


def _text(args: argparse.Namespace) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str], list[int]]:
    """What makes tokens of text and text of tokens, as the model was taught, and the tokens that end a text."""
    from pretraining import chat, corpus, text  # noqa: PLC0415

    _, reader = _described(args)
    if reader is None:
        raise corpus.no_reader("--prompt is text", _origin(args), "--tokens 1,2,3")
    if reader == corpus.BYTES:
        if args.chat:
            raise ValueError(f"--chat: {_origin(args)} reads bytes, which have no chat template; give --tokenizer")
        return (
            lambda text: list(text.encode()),
            lambda tokens: bytes(token if token < 256 else 63 for token in tokens).decode(errors="replace"),
            [],
        )
    path, model = text.open_model(pathlib.Path(reader))
    ends = [] if (end := text.end_of(path, model)) is None else [end]
    if not args.chat:
        return lambda text: model.encode(text).ids, model.decode, ends
    # A template needs no end of documents.
    tokenizer = text.open_tokenizer(path, 0 if end is None else end)
    render = chat.make_render(tokenizer)

    def ask(said: str) -> list[int]:
        (tokens,) = tokenizer.encode([render([{"role": "user", "content": said}], True)])
        return tokens.tolist()

    return ask, model.decode, ends


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--tokens {text}: give whole numbers, as 1,2,3") from None


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
