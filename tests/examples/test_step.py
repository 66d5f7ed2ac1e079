"""The pretraining example's step: equal to the plain program under every schedule, skipping, rebalancing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tests.examples.sizes import SMALL, make_batch, small  # first: it makes the example importable

from pretraining import flags, trainer  # isort: skip
import jaxpipe
from jaxpipe.deepseek import MODELS, build_model
from jaxpipe.schedule.registry import BUILDERS

KEY = jax.random.key(0)
ROWS = 16
CONFIG = trainer.TrainConfig(steps=20, warmup=5)


def setup(name, pp, ep, *, config=SMALL, microbatches=8, train=CONFIG, dtype=jnp.float32):
    """(model, optimizer, state, step, mesh, schedule); name None: the plain program."""
    if name is None:
        schedule, mesh = jaxpipe.schedule.build("gpipe", 1, 1), None
        model = build_model(config, schedule, 0, dtype=dtype, abstract=True)
        value_and_grad = trainer.plain_value_and_grad(model, parts=microbatches * ep)
    else:
        schedule, mesh = jaxpipe.schedule.build(name, pp, microbatches), jaxpipe.make_mesh(pp=pp, ep=ep)
        model = build_model(config, schedule, 0, axis="ep", dtype=dtype, abstract=True)
        value_and_grad = trainer.pipelined(model, schedule, mesh)
    optimizer = trainer.make_optimizer(train, model)
    state = trainer.init_state(model, optimizer, mesh)
    return model, optimizer, state, trainer.make_step(value_and_grad, model, optimizer, mesh), mesh, schedule


def run(step, state, steps, config=SMALL):
    every = []
    for index in range(steps):
        state, metrics = step(state, make_batch(index, ROWS, config), KEY)
        every.append(jax.device_get(metrics))
    return state, every


def needs_devices(count):
    if jax.device_count() < count:
        pytest.skip(f"{count} devices are needed, there are {jax.device_count()}")


@pytest.mark.slow  # `make train` compares the first steps too
@pytest.mark.parametrize("shared", [False, True])
def test_first_steps_equal_the_plain_program(shared):
    """DualPipeV on pp=2 x ep=2, dense layers, multi-token prediction, matrices in parts: losses, loads, state."""
    needs_devices(4)
    config = small(mtp=True, shard_outer=True, shared_ends=shared)
    model, _, state, step, _, _ = setup("dualpipev", 2, 2, config=config)
    outer, stages = state.params.outer, state.params.stages
    assert outer["embedding"].sharding.spec == P("pp" if shared else "ep")
    assert outer["norm"]["scale"].sharding.spec == P()
    assert stages["layer_0"]["mlp"]["w_in"].sharding.spec == P("pp", "ep")
    assert stages["mtp"]["project"].sharding.spec == P("pp", "ep")
    moe = stages["layer_0"]["moe"]
    assert moe["w_in"].sharding.spec == P("pp", "ep") and moe["router"].sharding.spec == P("pp")
    state, metrics = run(step, state, 3, config)
    plain_model, _, plain, plain_step, _, _ = setup(None, 1, 2, config=config)
    plain, expected = run(plain_step, plain, 3, config)
    for found, wanted in zip(metrics, expected, strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(found["loads"], wanted["loads"])
        assert found["loads"].sum() == 5 * ROWS * 8 * 2 and found["dropped"] == 0 and found["finite"]
    assert step._cache_size() == 1

    mine, theirs = model.to_layers(state.params), plain_model.to_layers(plain.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), mine, theirs)
    moments = [node for node in jax.tree.leaves(state.opt_state, is_leaf=_is_params) if _is_params(node)]
    assert len(moments) == 2
    for tree in moments:
        assert tree.stages["layer_0"]["moe"]["w_in"].sharding.spec == P("pp", "ep")
        assert isinstance(tree.stages["layer_0"]["moe"]["bias"], optax.MaskedNode)


@pytest.mark.slow
def test_filled_sequences_give_the_plain_programs_step():
    """As conversations are, filled by different amounts on different devices; without balance's part of the loss."""
    needs_devices(4)
    config = small(mtp=True, balance_factor=0.0)
    batch = make_batch(0, ROWS, config)
    real = np.arange(8) < np.random.default_rng(0).integers(2, 9, (ROWS, 1))
    batch |= {"real": real, "mask": batch["mask"] * real.astype(np.float32)}
    results = []
    for name, pp in (("dualpipev", 2), (None, 1)):
        model, _, state, step, _, _ = setup(name, pp, 2, config=config)
        state, metrics = step(state, batch, KEY)
        results.append((metrics, model.to_layers(state.params)))
    (found, mine), (wanted, theirs) = jax.device_get(results)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-5)
    np.testing.assert_array_equal(found["loads"], wanted["loads"])
    assert found["loads"].sum() == 5 * real.sum() * 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), mine, theirs)


@pytest.mark.slow
def test_all_schedules_give_the_same_curve():
    """Twenty steps in float32, to 1e-5 of the plain program's losses.

    Choices of experts are discrete: where two are almost equal, rounding decides, and Adam makes large differences of
    small ones where gradients are nothing else. A small learning rate, and biases that stay, keep the choices the same;
    at three times this one the plain program chooses otherwise for a token in two of the steps.
    """
    needs_devices(4)
    options = {"config": small(bias_update_speed=0.0), "train": trainer.TrainConfig(20, learning_rate=1e-4, warmup=5)}
    _, _, state, step, _, _ = setup(None, 1, 2, **options)
    expected = [float(metrics["loss"]) for metrics in run(step, state, 20)[1]]
    assert expected[-1] < expected[0]
    for name in BUILDERS:
        _, _, state, step, _, _ = setup(name, 2, 2, **options)
        found = [float(metrics["loss"]) for metrics in run(step, state, 20)[1]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


def test_steps_that_are_not_finite_change_nothing_and_are_counted():
    _, _, state, step, _, _ = setup(None, 1, 1, config=small(layers=2), microbatches=1)
    state, _ = step(state, make_batch(0, 2), KEY)
    before = jax.device_get(state)
    bad = make_batch(1, 2)
    bad["mask"][0, 0] = np.nan
    for count in (1, 2):
        state, metrics = step(state, bad, KEY)
        assert not metrics["finite"] and int(metrics["skipped_in_a_row"]) == int(metrics["skipped"]) == count
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    state, metrics = step(state, make_batch(2, 2), KEY)
    assert metrics["finite"] and (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (2, 0, 4)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_rebalancing_moves_copies_and_nothing_else():
    """Other placements, the same losses, nothing compiled again; the balance of the loads seen gets better."""
    needs_devices(4)
    model, _, start, step, _, _ = setup("1f1b", 2, 2, config=small(layers=3), microbatches=2)
    losses = []
    for rebalance in (False, True):
        state = jax.tree.map(jnp.copy, start)  # a step takes the memory of its state
        rebalancer = trainer.Rebalancer(model, 2, interval=2, min_gain=0.0, lag=0)
        mine, changed = [], 0
        for index in range(4):
            state, metrics = step(state, make_batch(index, ROWS), KEY)
            mine.append(float(metrics["loss"]))
            np.testing.assert_array_equal(metrics["microbatch_loads"].sum(0), metrics["loads"])
            choices = metrics["microbatch_loads"].sum(2)  # every microbatch has as many tokens
            assert len(choices) == 2 and (choices == choices[0, 0]).all()
            rebalancer.observe(metrics["loads"], index + 1)
            if rebalance:
                old = state
                state = rebalancer.maybe_rebalance(state, index + 1)
                if rebalancer.last is None:
                    assert state is old and (index + 1) % 2
                else:
                    changed += rebalancer.last.decision.changed
                    assert rebalancer.last.decision.after >= rebalancer.last.decision.before
        losses.append(mine)
        assert step._cache_size() == 1
        assert bool(changed) == rebalance
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)

    # A plan that is begun and not yet used when the state is saved is used at its step by the run that goes on.
    ends = []
    for saves in (False, True):
        state, rebalancer = jax.tree.map(jnp.copy, start), trainer.Rebalancer(model, 2, interval=2, min_gain=0.0, lag=2)
        metrics = None
        for index in range(4):
            if saves and index == 3:
                saved = rebalancer.state_dict()
                assert saved["planned_step"] == 2
                rebalancer = trainer.Rebalancer(model, 2, interval=2, min_gain=0.0, lag=2)
                rebalancer.load_state_dict(saved)
            before, (state, metrics) = metrics, step(state, make_batch(index, ROWS), KEY)
            if before is not None:  # a step's loads are seen when the next one has begun
                rebalancer.observe(before["loads"], index)
            state = rebalancer.maybe_rebalance(state, index + 1)
            assert bool(rebalancer.metrics()) == (index == 3)
        assert rebalancer.metrics()["plan_of_step"] == 2 and rebalancer.described() is not None
        ends.append(jax.device_get(model.placements(state.params)))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert not np.array_equal(ends[0].phy2log, model.placements(start.params).phy2log)

    again = trainer.Rebalancer(model, 2, interval=2)
    again.load_state_dict(rebalancer.state_dict())
    np.testing.assert_array_equal(again.average.loads(), rebalancer.average.loads())
    with pytest.raises(ValueError, match="do not fit a model"):
        again.load_state_dict({"average": np.zeros((1, 4)), "steps": 1})
    with pytest.raises(ValueError, match=r"redundant=2 slots on 4 devices"):
        trainer.Rebalancer(model, 4)


@pytest.mark.slow
def test_evaluation_is_the_loss_of_the_next_token():
    needs_devices(4)
    config = small(layers=3, shared_ends=True)
    model, _, state, step, mesh, schedule = setup("1f1b", 2, 2, config=config, microbatches=2)
    batch = make_batch(5, ROWS)
    found = trainer.make_evaluate(model, schedule, mesh)(state.params, batch)
    _, metrics = step(state, batch, KEY)
    np.testing.assert_allclose(found, metrics["loss"] - metrics["aux_loss"], rtol=1e-5)


@pytest.mark.slow
def test_moments_in_bfloat16():
    config = small(layers=2, moments="bfloat16")
    _, _, state, step, _, _ = setup(None, 1, 1, config=config, microbatches=1)
    state, first = step(state, make_batch(0, 4), KEY)
    for _ in range(8):
        state, last = step(state, make_batch(0, 4), KEY)
    moments = [node for node in jax.tree.leaves(state.opt_state, is_leaf=_is_params) if _is_params(node)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments)} == {"bfloat16"}
    assert last["loss"] < first["loss"]


def test_learning_rate_and_bad_configurations():
    config = trainer.TrainConfig(steps=100, learning_rate=1.0, warmup=10)
    rates = [float(config.rate(step)) for step in (0, 10, 100)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 0.1], rtol=1e-5)
    with pytest.raises(ValueError, match="steps=0"):
        trainer.TrainConfig(steps=0)


def _is_params(node):
    return isinstance(node, jaxpipe.Params)


def test_moments_in_bfloat16_change_with_every_step():
    """Against float32 moments: near, computed with in float32; a b2 whose changes would be rounded away is refused."""
    gradients = [jax.random.normal(jax.random.key(i), (64,)) for i in range(20)]
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        adam = trainer.stored_as(optax.scale_by_adam(0.9, 0.95), dtype)
        state = adam.init(gradients[0])
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            for gradient in gradients:
                updates, state = adam.update(gradient, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype(dtype)}
        assert updates.dtype == jnp.float32
        found[dtype] = updates
    np.testing.assert_allclose(found[jnp.bfloat16], found[jnp.float32], rtol=0.05, atol=0.02)
    model = build_model(small(moments="bfloat16"), jaxpipe.schedule.build("gpipe", 1, 1), 0, abstract=True)
    with pytest.raises(ValueError, match=r"b2=0\.999 with moments in bfloat16.*take b2=0\.98 or less"):
        trainer.make_optimizer(trainer.TrainConfig(steps=1, b2=0.999), model)


def test_flags_of_precision_and_moments():
    parse = flags.train_parser().parse_args
    given = parse(["--config", "tiny-128", "--precision", "fp8", "--moments", "bfloat16"])
    config = flags.sized_config(given, 2)
    assert (config.precision, config.moe.precision, config.moments) == ("fp8", "fp8", "bfloat16")
    assert flags.sized_config(parse([]), 2).precision == "bf16"
    with pytest.raises(ValueError, match=r"--config tiny --precision fp8: fp8 needs width to be a multiple of 128"):
        flags.sized_config(parse(["--precision", "fp8"]), 2)


def test_a_head_is_gathered_once_a_step_only_where_it_is_in_parts():
    parse = flags.train_parser().parse_args
    apart = ["--ends", "apart", "--gather-head", "step"]
    assert flags.sized_config(parse(["--config", "dsv3-671b", *apart]), 8).gather_head == "step"
    for arguments in (apart, ["--config", "dsv3-671b", "--ends", "together", *apart[2:]]):
        with pytest.raises(ValueError, match=r"--gather-head step of a model with shard_outer=.*leave it out"):
            flags.sized_config(parse(arguments), 8)


def test_a_stash_takes_the_place_of_remat():
    parse = flags.train_parser().parse_args
    given = parse(["--config", "dsv3-671b", "--stash", "1.5e9"])
    assert given.stash == 1_500_000_000
    assert flags.sized_config(given, 2).remat == "none" != flags.sized_config(parse(["--config", "dsv3-671b"]), 2).remat
    with pytest.raises(ValueError, match="--stash auto --remat layer: a stash decides what is computed again"):
        flags.sized_config(parse(["--stash", "auto", "--remat", "layer"]), 2)
    for wrong in ("-1", "much", "inf", "nan"):
        with pytest.raises(SystemExit):
            parse([f"--stash={wrong}"])


def test_residuals_go_to_the_host_by_a_flag():
    parse = flags.train_parser().parse_args
    assert [parse(given).offload for given in ([], ["--offload", "1.5e9"], ["--offload", "all"])] == [
        0,
        15 * 10**8,
        2**60,
    ]
    for wrong in ("-1", "auto", "inf"):
        with pytest.raises(SystemExit):
            parse([f"--offload={wrong}"])


@pytest.mark.slow
def test_fp8_learns_as_bfloat16s_place_does():
    """A tiny model on the CPU: losses of a few steps within two percent, blocks that are not finite counted."""
    config = dataclasses.replace(MODELS["tiny-128"], layers=2, sequence=32, redundant=0)
    curves = []
    for precision in ("bf16", "fp8"):
        tested = config.in_precision(precision)
        _, _, state, step, _, _ = setup(None, 1, 1, config=tested, microbatches=1)
        _, metrics = run(step, state, 12, tested)
        curves.append([float(each["loss"]) for each in metrics])
        assert ("not_finite_blocks" in metrics[0]) == (precision == "fp8")
    assert int(metrics[-1]["not_finite_blocks"]) == 0 and curves[1][-1] < curves[1][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-2)


def test_divided_parameters_and_moments_are_kept_where_gradients_are():
    """Of every parameter, those of dense layers, experts and multi-token prediction; small ones stay whole."""
    mesh = AbstractMesh((2, 2, 4), ("pp", "dp", "ep"), axis_types=(AxisType.Auto,) * 3)
    schedule = jaxpipe.schedule.build("dualpipev", 2, 8)
    config = dataclasses.replace(MODELS["moe-1b"], dense_layers=2, layers=6, mtp=True, zero1=True)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    state = trainer.abstract_state(model, trainer.make_optimizer(CONFIG, model), mesh)
    expected = trainer.pipelined(model, schedule, mesh).grad_shardings(model.params)
    found = [node for node in jax.tree.leaves(state.opt_state, is_leaf=is_params) if is_params(node)]
    assert len(found) == 2  # Adam's moments
    for moments in found:
        leaves = jax.tree.leaves_with_path(moments)
        of = dict(jax.tree.leaves_with_path(expected))
        assert leaves and all(leaf.sharding.spec == of[path].spec for path, leaf in leaves)
    divided = [leaf for leaf in jax.tree.leaves(found[0]) if "dp" in str(leaf.sharding.spec)]
    assert sum(leaf.size for leaf in divided) > 0.99 * sum(leaf.size for leaf in jax.tree.leaves(found[0]))
    for path, leaf in jax.tree.leaves_with_path(state.params):  # and parameters where their moments are
        assert leaf.sharding.spec == of[path].spec


def is_params(node):
    return isinstance(node, jaxpipe.Params)


@pytest.mark.slow
def test_divided_parameters_and_moments_change_nothing(monkeypatch):
    """Three steps of the small model with all parameters and moments divided over the experts' axis."""
    needs_devices(4)
    monkeypatch.setattr(trainer, "SMALLEST_PART", 1)
    states = []
    for zero1 in (False, True):
        config = small(zero1=zero1)
        _, _, state, step, _, _ = setup("dualpipev", 2, 2, config=config)
        states.append(run(step, state, 3, config)[0])
    whole, divided = states
    moments = [node for node in jax.tree.leaves(divided.opt_state, is_leaf=is_params) if is_params(node)]
    for kept in (moments[0].outer, divided.params.outer):
        assert any("ep" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(kept))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(divided), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-6)
