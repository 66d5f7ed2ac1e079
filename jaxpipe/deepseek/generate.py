"""Text from a model: prompts of different lengths at once, one program for the prompts and one for all new tokens.

Shapes: B requests, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.mla import Core
from jaxpipe.deepseek.serving import AXIS, ServedModel, decode, head_logits, prefill, served_specs, token_features

STEP = 16
"""Prompts and caches have a multiple of so many places, so that few sizes are compiled. The kernel that attends to
caches wants a multiple of 8."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: logits are divided by it, in float32; 0: the likeliest token, always.
      top_p: tokens are chosen from the fewest likeliest ones that have this probability together; 1: from all.
      seed: of the choices, of 32 bits. A request's depend on it, on the request's place in the batch and on nothing
        else.

    Raises:
      ValueError: values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.temperature != 0 and not 1e-6 <= self.temperature < 3e38:
            raise ValueError(
                f"temperature={self.temperature}: 0 takes the likeliest token, 1 the model's own odds; others are "
                "between 1e-6 and 3e38"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability above 0, 1 for all tokens")
        if not isinstance(self.seed, int | np.integer) or not -(2**31) <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed!r}: a whole number from {-(2**31)} to {2**31 - 1}")


class Generated(NamedTuple):
    """New tokens, and what they took.

    Attributes:
      tokens: of each request, one that ends it included; int32.
      prefill_seconds, decode_seconds: of the prompts with each request's first new token, and of all others; without
        compilation.
      decoded: tokens that the latter made.
      loads: tokens, of prompts and new, that chose each expert.
    """

    tokens: list[np.ndarray]
    prefill_seconds: float
    decode_seconds: float
    decoded: int
    loads: Int[np.ndarray, "layers experts"]

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, all requests together; 0 where there was nothing to decode.

        >>> Generated([], 0.5, 2.0, 64, np.zeros((1, 4), np.int64)).tokens_per_second
        32.0
        """
        return self.decoded / self.decode_seconds if self.decoded else 0.0


class Scores(NamedTuple):
    """How well a model predicts text.

    Attributes:
      losses: sum of each sequence's, over the targets that count; in nats.
      counts: of these.
      loads: tokens that chose each expert.
    """

    losses: Float[np.ndarray, " B"]
    counts: Int[np.ndarray, " B"]
    loads: Int[np.ndarray, "layers experts"]

    @property
    def loss(self) -> float:
        """Mean over the targets, in nats.

        >>> Scores(np.array([3.0, 1.0]), np.array([3, 1]), np.zeros((1, 4), np.int64)).loss
        1.0
        """
        return float(self.losses.sum() / max(self.counts.sum(), 1))


class SamplingArrays(NamedTuple):
    """`Sampling` as arrays, which compiled programs take: no value of it makes another program.

    Attributes:
      seed: of the choices.
      temperature, top_p: as there.
    """

    seed: Int[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, rows: Int[Array, " B"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """The next token of each request.

    Args:
      logits: float32 or float64.
      sampling: how.
      rows: each request's place among all.
      step: how many tokens it has got.

    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), jnp.array([0]), jnp.int32(0)).tolist()
    [1]
    """
    return _choose(logits, _kind(sampling), _choice(sampling), rows, step)


def _kind(sampling: Sampling) -> str:
    """What a program is compiled for."""
    return "likeliest" if sampling.temperature == 0 else "all" if sampling.top_p == 1 else "top_p"


def _choice(sampling: Sampling) -> SamplingArrays:
    return SamplingArrays(jnp.int32(sampling.seed), jnp.float32(sampling.temperature), jnp.float32(sampling.top_p))


def _choose(logits: jax.Array, kind: str, choice: SamplingArrays, rows: jax.Array, step: jax.Array) -> jax.Array:
    if kind == "likeliest":
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / choice.temperature.astype(logits.dtype)
    root = jax.random.fold_in(jax.random.key(choice.seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, root))(rows)
    if kind == "all":
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    order = jnp.argsort(-logits, -1, stable=True)
    ranked = jnp.take_along_axis(logits, order, -1)
    odds = jax.nn.softmax(ranked, -1)
    kept = jnp.cumsum(odds, -1) - odds < choice.top_p.astype(odds.dtype)
    chosen = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ranked, -jnp.inf))
    return jnp.take_along_axis(order, chosen[:, None], -1)[:, 0].astype(jnp.int32)


class Server:
    """A model that answers prompts and scores text, on one device or the one axis of a mesh.

    Args:
      config: of the model.
      model: from `jaxpipe.deepseek.serve`.
      mesh: the one that it was made with; None: one device. Requests are spread over it.
      core: attention of prompts.

    >>> import jaxpipe
    >>> from jaxpipe.deepseek import MODELS, build_model, serve
    >>> built = build_model(MODELS["tiny"], jaxpipe.schedule.build("1f1b", 1, 1), 0)
    >>> server = Server(built.config, serve(built.config, built.to_layers(built.params)))
    >>> made = server.generate([[1, 2, 3], [4]], 5)
    >>> [len(tokens) for tokens in made.tokens], made.loads.sum().item()
    ([5, 5], 192)
    """

    def __init__(
        self, config: ModelConfig, model: ServedModel, mesh: Mesh | None = None, core: Core = causal_attention
    ) -> None:
        if mesh is not None and mesh.axis_names != (AXIS,):
            raise ValueError(f"the mesh has axes {mesh.axis_names}: take jaxpipe.deepseek.serving_mesh(mesh)")
        self.config, self.model, self.mesh, self.core = config, model, mesh, core
        self._axis = None if mesh is None or mesh.size == 1 else AXIS
        self._programs: dict[Any, Any] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        new_tokens: int,
        sampling: Sampling | None = None,
        *,
        stop: Collection[int] = (),
    ) -> Generated:
        """Continues prompts.

        Args:
          prompts: tokens of each request, one or more.
          new_tokens: of each request, at most.
          sampling: how tokens are chosen; None: always the likeliest.
          stop: tokens that end a request.

        Raises:
          ValueError: no prompts, an empty one, tokens that the vocabulary has not, fewer than one new token.
        """
        given = [self._checked(prompt, f"prompt {place}") for place, prompt in enumerate(prompts)]
        if not given or min(map(len, given)) < 1:
            raise ValueError(f"prompts of {[len(prompt) for prompt in given]} tokens: give at least one, none empty")
        if new_tokens < 1:
            raise ValueError(f"new_tokens={new_tokens}: at least 1")
        ends = tuple(sorted({int(token) for token in stop}))
        places = -(-max(map(len, given)) // STEP) * STEP
        space = -(-(places + new_tokens - 1) // STEP) * STEP
        batch, lengths, rows = self._batch(given, places)
        sampling = Sampling() if sampling is None else sampling
        kind, choice = _kind(sampling), _choice(sampling)
        arguments = batch, lengths, rows
        start = self._program(
            ("start", batch.shape, space, kind), functools.partial(self._start, space, kind), choice, arguments
        )
        begin = time.perf_counter()
        token, caches, loads = jax.block_until_ready(start(self.model, choice, *arguments))
        prefill_seconds = time.perf_counter() - begin
        if new_tokens == 1:
            made = np.asarray(token)[:, None]
            return _collect(made, len(given), ends, prefill_seconds, 0.0, loads)
        state = token, caches, lengths, rows, loads
        key = ("go_on", batch.shape, space, new_tokens, kind, ends)
        body = functools.partial(self._go_on, new_tokens, kind, ends)
        go_on = self._program(key, body, choice, state, donate=(3,))
        begin = time.perf_counter()
        made, loads, _ = jax.block_until_ready(go_on(self.model, choice, *state))
        return _collect(np.asarray(made), len(given), ends, prefill_seconds, time.perf_counter() - begin, loads)

    def logits(self, tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
        """Of every token of sequences of one length, ``float32[B, T, V]``; float64 for float64.

        Raises:
          ValueError: tokens of another shape, or that the vocabulary has not.
        """
        batch, lengths, count = self._sequences(tokens)
        run = self._program(("logits", batch.shape), self._logits, (), (batch, lengths))
        return np.asarray(run(self.model, (), batch, lengths))[:count]

    def score(
        self,
        tokens: Int[np.ndarray, "B T"],
        targets: Int[np.ndarray, "B T"],
        mask: np.ndarray,
        segments: Int[np.ndarray, "B T"] | None = None,
    ) -> Scores:
        """Losses of sequences of one length.

        Args:
          tokens, targets: of each place, and what follows it.
          mask: 1 where the target counts, otherwise 0.
          segments: which document of its sequence each token is of, and sees alone; None: all are one.

        Raises:
          ValueError: shapes that differ, tokens that the vocabulary has not.
        """
        batch, lengths, count = self._sequences(tokens)
        apart = np.zeros(np.shape(tokens), np.int32) if segments is None else np.asarray(segments, np.int32)
        if not np.shape(targets) == np.shape(mask) == np.shape(apart) == np.shape(tokens):
            raise ValueError(
                f"tokens {np.shape(tokens)}, targets {np.shape(targets)}, mask {np.shape(mask)}, segments "
                f"{np.shape(apart)}: one shape for all"
            )
        counts = np.zeros(batch.shape, bool)
        counts[:count] = np.asarray(mask) > 0
        follow = np.zeros(batch.shape, np.int32)
        follow[:count] = np.where(np.asarray(mask) > 0, targets, 0)
        self._checked(follow.reshape(-1), "targets")
        arrays = batch, lengths, self._placed(follow), self._placed(counts)
        if segments is not None:
            documents = np.zeros(batch.shape, np.int32)
            documents[:count] = apart
            arrays = *arrays, self._placed(documents)
        run = self._program(("score", batch.shape, len(arrays)), self._score, (), arrays)
        losses, loads = run(self.model, (), *arrays)
        return Scores(np.asarray(losses)[:count], counts[:count].sum(1), _summed(loads))

    def _start(
        self, space: int, kind: str, model: ServedModel, choice: SamplingArrays, tokens: Any, lengths: Any, rows: Any
    ) -> Any:
        found = prefill(model, tokens, lengths, space, self.config, axis=self._axis, core=self.core)
        token = _choose(head_logits(model, found.features, self.config), kind, choice, rows, jnp.int32(0))
        return token, found.caches, found.loads[None]

    def _go_on(
        self,
        new_tokens: int,
        kind: str,
        ends: tuple[int, ...],
        model: ServedModel,
        choice: SamplingArrays,
        token: jax.Array,
        caches: Any,
        lengths: jax.Array,
        rows: jax.Array,
        loads: jax.Array,
    ) -> Any:
        def goes_on(token: jax.Array, alive: jax.Array) -> jax.Array:
            return alive & ~jnp.isin(token, jnp.asarray(ends, jnp.int32)) if ends else alive

        def any_left(alive: jax.Array) -> jax.Array:
            # All devices of the axis go on together, because experts are spread over them.
            left = alive.any().astype(jnp.int32)
            return left if self._axis is None else jax.lax.psum(left, self._axis)

        def body(state: Any) -> Any:
            step, token, caches, lengths, alive, _, made, loads = state
            found = decode(model, token, caches, lengths, alive, self.config, axis=self._axis)
            new = _choose(head_logits(model, found.features, self.config), kind, choice, rows, step)
            made = jax.lax.dynamic_update_slice(made, new[:, None], (jnp.int32(0), step))
            lengths = lengths + alive.astype(jnp.int32)
            alive = goes_on(new, alive)
            return step + 1, new, found.caches, lengths, alive, any_left(alive), made, loads + found.loads[None]

        def unfinished(state: Any) -> jax.Array:
            return (state[0] < new_tokens) & (state[5] > 0)

        made = jnp.zeros((token.shape[0], new_tokens), jnp.int32)
        if self._axis is not None:
            made = jax.lax.pcast(made, self._axis, to="varying")
        made = made.at[:, 0].set(token)
        alive = goes_on(token, lengths > 0)
        first = jnp.int32(1), token, caches, lengths, alive, any_left(alive), made, loads
        _, _, caches, *_, made, loads = jax.lax.while_loop(unfinished, body, first)
        return made, loads, caches  # given back, so that the loop has them in place

    def _logits(self, model: ServedModel, _: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        real = jnp.broadcast_to(lengths[:, None] > 0, tokens.shape)
        features, _ = token_features(model, tokens, real, self.config, axis=self._axis, core=self.core)
        return head_logits(model, features, self.config)

    def _score(
        self, model: ServedModel, _: Any, tokens: Any, lengths: Any, targets: Any, counts: Any, segments: Any = None
    ) -> Any:
        real = jnp.broadcast_to(lengths[:, None] > 0, tokens.shape)
        core = self.core if segments is None else functools.partial(self.core, segments=segments)
        features, loads = token_features(model, tokens, real, self.config, axis=self._axis, core=core)

        def loss(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            features, targets, counts = row
            logits = head_logits(model, features, self.config)
            picked = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
            return jnp.where(counts, jax.nn.logsumexp(logits, -1) - picked, 0).sum()

        # One sequence after the other: logits of all are larger than anything else.
        return jax.lax.map(loss, (features, targets, counts)), loads[None]

    def _checked(self, tokens: Any, name: str) -> np.ndarray:
        found = np.asarray(tokens)
        if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
            raise ValueError(f"{name} is {found.dtype} of shape {found.shape}: give a row of token numbers")
        if found.size and not 0 <= found.min() <= found.max() < self.config.vocab:
            raise ValueError(
                f"{name} has tokens from {found.min()} to {found.max()}: the vocabulary has {self.config.vocab}"
            )
        return found.astype(np.int32)

    def _sequences(self, tokens: Any) -> tuple[jax.Array, jax.Array, int]:
        found = np.asarray(tokens)
        if found.ndim != 2 or not found.size:
            raise ValueError(f"tokens have shape {found.shape}: give [sequences, tokens], both at least 1")
        rows = [self._checked(row, f"sequence {place}") for place, row in enumerate(found)]
        batch, lengths, _ = self._batch(rows, found.shape[1])
        return batch, lengths, len(rows)

    def _batch(self, rows: list[np.ndarray], places: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens, lengths and numbers of requests, with empty ones up to a multiple of the devices."""
        devices = 1 if self.mesh is None else self.mesh.size
        count = -(-len(rows) // devices) * devices
        batch, lengths = np.zeros((count, places), np.int32), np.zeros(count, np.int32)
        for place, row in enumerate(rows):
            batch[place, : len(row)], lengths[place] = row, len(row)
        return self._placed(batch), self._placed(lengths), self._placed(np.arange(count, dtype=np.int32))

    def _placed(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array) if self.mesh is None else jax.device_put(array, NamedSharding(self.mesh, P(AXIS)))

    def _program(
        self,
        key: Any,
        function: Callable[..., Any],
        whole: Any,
        arguments: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> Any:
        """A function of the model, what all devices know, and arrays of requests; compiled, and kept for its key."""
        if key not in self._programs:
            if self._axis is not None:
                assert self.mesh is not None
                specs = served_specs(self.model), P(), *(P(AXIS) for _ in arguments)
                function = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=P(AXIS))
            run = jax.jit(function, donate_argnums=donate)
            self._programs[key] = run.lower(self.model, whole, *arguments).compile()
        return self._programs[key]


def _collect(
    made: np.ndarray, count: int, ends: tuple[int, ...], prefill_seconds: float, decode_seconds: float, loads: Any
) -> Generated:
    """Each request's tokens up to the one that ends it."""
    tokens = []
    for row in made[:count]:
        found = np.flatnonzero(np.isin(row, ends))
        tokens.append(row[: found[0] + 1] if found.size else row)
    decoded = sum(map(len, tokens)) - count
    return Generated(tokens, prefill_seconds, decode_seconds, decoded, _summed(loads))


def _summed(loads: jax.Array) -> np.ndarray:
    """Of all devices."""
    return np.asarray(loads).astype(np.int64).sum(0)
