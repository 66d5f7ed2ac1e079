"""What the plan says: memory as XLA's own analysis, sizes and times of large models without devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.examples.sizes import SMALL, small  # first: it makes the example importable

from pretraining import plan as planning  # isort: skip
from pretraining import trainer
from pretraining.compiled import Compiled, compile_step, table

import jaxpipe
from jaxpipe.deepseek import build_model
from jaxpipe.deepseek.config import MODELS, model_config
from jaxpipe.planning.chips import CHIPS
from profiling.hlo.hiding import overlap
from profiling.hlo.topologies import has_cuda


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dualpipev", "1f1b"])
def test_memory_is_that_of_the_compiled_program(name):
    """The tiny model on pp=4 x ep=2: arguments exactly, the whole within 6%."""
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, there are {jax.device_count()}")
    config, sizes = model_config("tiny"), {"pp": 4, "ep": 2}
    options = dict(schedules=[name], microbatches=8, microbatch_size=4, dtype=jnp.float32, cpu=True)
    (row,) = planning.plan(config, sizes, **options).rows

    schedule, mesh = jaxpipe.schedule.build(name, 4, 8), jaxpipe.make_mesh(**sizes)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=10), model)
    step = trainer.make_step(trainer.pipelined(model, schedule, mesh), model, optimizer, mesh)
    state, batch = trainer.abstract_state(model, optimizer, mesh), trainer.abstract_batch(config, 64)
    compiled = step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile().memory_analysis()
    arguments, temporary = compiled.argument_size_in_bytes, compiled.temp_size_in_bytes
    print(f"{name}: arguments {row.memory.arguments} of {arguments}, temporary {row.memory.temporary} of {temporary}")
    assert abs(row.memory.arguments - arguments) < 1000
    assert abs(compiled.output_size_in_bytes - (row.memory.masters + row.memory.optimizer)) < 4000
    assert compiled.alias_size_in_bytes >= 0.99 * (row.memory.masters + row.memory.optimizer)
    assert row.memory.temporary == pytest.approx(temporary, rel=0.07)
    assert row.memory.total == pytest.approx(arguments + temporary, rel=0.06)  # as docs/guides/memory.md says


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.skipif(not has_cuda(), reason="XLA's compiler for GPUs is needed: pip install 'jax[cuda13]'; a GPU is not")
def test_memory_of_a_billion_parameters_is_that_of_the_program_for_a_gpu():
    """moe-1b on one H200: attention is a kernel of the same shapes, since cuDNN's compiles only beside a GPU."""
    config, sizes = model_config("moe-1b"), {"pp": 1, "ep": 1}
    (row,) = planning.plan(config, sizes, schedules=["dualpipev"], microbatches=8, microbatch_size=4).rows
    found = compile_step(config, jaxpipe.schedule.build("dualpipev", 1, 8), sizes, 4, CHIPS["H200"])
    print(f"{row.memory} planned, {found.arguments} and {found.temporary} compiled")
    assert abs(row.memory.arguments - found.arguments) < 1000
    assert row.memory.temporary == pytest.approx(found.temporary, rel=0.05)
    assert row.memory.total == pytest.approx(found.arguments + found.temporary, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("precision, gib", [("bf16", 15.166), ("fp8", 11.582)])
def test_memory_of_a_billion_parameters_is_that_of_an_h200(precision, gib):
    """The temporaries of moe-1b's step, 8 microbatches of 4 sequences, by the compiler on one H200."""
    config = model_config("moe-1b").in_precision(precision)
    options = dict(schedules=["dualpipev"], microbatches=8, microbatch_size=4)
    memory = planning.plan(config, {"pp": 1, "ep": 1}, chip=CHIPS["H200"], **options).rows[0].memory
    assert memory.total == pytest.approx(memory.arguments + gib * 2**30, rel=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.skipif(not has_cuda(), reason="XLA's compiler for GPUs is needed: pip install 'jax[cuda13]'; a GPU is not")
def test_command_compiles(capsys):
    """A step of the tiny model for four H100s: its row, and that its exchanges are hidden in part."""
    command = "--config tiny --mesh pp=2,ep=2 --schedules 1f1b --chip H100 --compile"
    planning.main(command.split())
    heads, *_, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][3:]
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert row.startswith("| 1f1b |") and 0 < float(cells["all-to-alls hidden"].rstrip("%")) < 100


@pytest.mark.skipif(has_cuda(), reason="a CUDA build of JAX is installed")
def test_compiling_needs_a_compiler():
    with pytest.raises(RuntimeError, match=r"pip install .jax\[cuda13\]"):
        compile_step(model_config("tiny"), jaxpipe.schedule.build("1f1b", 1, 8), {"pp": 1, "ep": 1}, 1, CHIPS["H100"])


def test_compiled_table():
    """Bytes in GB, marked where they exceed the chip; what does not communicate has no share."""
    toy = "HloModule toy, is_scheduled=true\nENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}"
    one = Compiled(20_000_000_000, 70_000_000_000, overlap(toy, CHIPS["H100"]), 12.3)
    rows = [("zbv", 80_000_000_000, one), ("1f1b", 25_000_000_000, one._replace(temporary=0))]
    heads, line, large, small = table(rows, CHIPS["H100"])
    assert heads.count("|") == line.count("|") == large.count("|") == small.count("|")
    assert large == "| zbv | 80.0 | 20.0 | 70.0 | 90.0 (too much) | 1.125 | - | - | 0 | 0.00 | 12 |"
    assert small.startswith("| 1f1b | 25.0 | 20.0 | 0.0 | 20.0 | 0.800 | -")


@pytest.mark.slow
def test_gradients_between_nodes_take_longer():
    """More expert parallelism leaves each device fewer experts; summing the rest between nodes takes longer."""

    def rows(ep, **options):
        return planning.plan(
            small(redundant=0), {"pp": 1, "ep": ep}, schedules=["1f1b"], chip=CHIPS["H100"], **options
        ).rows

    (two,), (four,), (apart,) = rows(2), rows(4), rows(4, devices_per_node=2)
    assert four.memory.masters < two.memory.masters
    assert apart.seconds > four.seconds


@pytest.mark.slow
def test_the_largest_model_is_planned_without_devices():
    found = planning.plan(MODELS["dsv3-671b"].over_devices(64, 256), {"pp": 16, "ep": 64}, schedules=["1f1b"])
    (row,) = found.rows
    text = str(found)
    assert "671.03 in all, 37.55 active" in text and "1024 H800" in text
    assert "stages of 1f1b: 1 of 3 dense, 14 of 4 moe, 1 of 2 moe + 1 mtp" in text
    assert row.seconds < 40  # 51 where all ranks compute dense layers and multi-token prediction, in embed and head
    assert 20e9 < row.memory.arguments + row.memory.gradients < 25e9
    assert row.memory.total < 80e9
    assert 0.05 < row.mfu < 0.6 and 0.5 < row.bubble < 0.8  # the rank of dense layers waits for experts elsewhere


@pytest.mark.slow
def test_all_schedules_side_by_side_and_those_that_do_not_exist():
    config = dataclasses.replace(SMALL, layers=5)
    found = planning.plan(config, {"pp": 2, "ep": 2}, schedules=["1f1b", "interleaved", "dualpipe"], microbatches=3)
    assert [row.reason is None for row in found.rows] == [True, True, False]
    assert "| 1f1b |" in str(found) and str(found.rows[2].reason) in str(found)
    with pytest.raises(ValueError, match="do not divide over the 3 devices"):
        planning.plan(SMALL, {"pp": 2, "ep": 3})
    with pytest.raises(ValueError, match="size of axis pp"):
        planning.plan(SMALL, {"dp": 2})


@pytest.mark.slow
def test_command(capsys):
    planning.main(["--config", "tiny", "--mesh", "pp=2,ep=2", "--schedules", "dualpipev", "--chip", "h100"])
    assert "4 H100, mesh {'pp': 2, 'ep': 2}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="write sizes by axis"):
        planning.main(["--mesh", "16x64"])


def test_products_in_fp8_are_planned_as_kernels():
    """Products take less time than casts add at DeepSeek-V3's widths, less is stashed, and rules know all kernels."""
    moe = dataclasses.replace(model_config("moe-1b").moe, width=7168, hidden=2048)
    config = dataclasses.replace(model_config("moe-1b"), layers=2, moe=moe, dense_hidden=18_432)
    options = dict(schedules=["1f1b"], microbatches=4, chip=CHIPS["H200"])
    plain, fp8 = (
        planning.plan(config.in_precision(precision), {"pp": 2, "ep": 1}, **options).rows[0]
        for precision in ("bf16", "fp8")
    )
    assert fp8.seconds < plain.seconds and fp8.memory.stash < 0.9 * plain.memory.stash
    assert fp8.memory.working < 1.05 * plain.memory.working  # two layouts of one byte
    assert fp8.uncounted == ()


@pytest.mark.slow
def test_sums_in_bfloat16_take_half_the_memory():
    options = dict(schedules=["1f1b"], microbatches=4)
    sums = {
        dtype: planning.plan(model_config("tiny"), {"pp": 2}, grad_dtype=dtype, **options).rows[0].memory.gradients
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    assert 2 * sums[jnp.bfloat16] == sums[jnp.float32]


@pytest.mark.slow
def test_fewer_deferred_weight_gradients_need_less_memory():
    """The plan is that of the bounded schedule: ZB1P on two ranks puts two off."""
    options = {"schedules": ["zb1p"], "microbatches": 4}
    as_it_is, bounded = (
        planning.plan(model_config("tiny"), {"pp": 2, "ep": 1}, **options, deferred=deferred).rows[0]
        for deferred in (2, 1)
    )
    assert bounded.memory.stash < as_it_is.memory.stash and bounded.seconds > as_it_is.seconds


def test_a_negative_bound_is_refused():
    (row,) = planning.plan(model_config("tiny"), {"pp": 2}, schedules=["zb1p"], deferred=-1).rows
    assert row.reason == "zb1p with slots=-1: it must be an integer of at least 0"


@pytest.mark.slow
def test_what_goes_to_the_host_is_told_and_not_on_the_device():
    options = dict(schedules=["1f1b"], microbatches=4, dtype=jnp.float32)
    here, there = (planning.plan(SMALL, {"pp": 2, "ep": 1}, **options, offload=offload) for offload in (0, 10**12))
    less = here.rows[0].memory.stash - there.rows[0].memory.stash
    assert less == there.rows[0].memory.host > 0.9 * here.rows[0].memory.stash
    assert "1f1b: memory of the host for a device" in str(there) and "memory of the host" not in str(here)
    with pytest.raises(ValueError, match="--search --offload: a search keeps all on the devices"):
        planning.main(["--config", "tiny", "--search", "--gpus", "4", "--offload", "all"])


@pytest.mark.slow
def test_a_stash_fits_the_chip_and_is_told():
    """The largest that fits; bytes that are too few stand in the row of the schedule, with the least that work."""
    config = dataclasses.replace(SMALL, remat="none")
    options = dict(schedules=["zb1p"], microbatches=4, dtype=jnp.float32)
    (whole,) = planning.plan(config, {"pp": 2, "ep": 1}, **options).rows
    chip = dataclasses.replace(CHIPS["H800"], memory=(whole.memory.total - whole.memory.stash // 2) / 0.95)
    found = planning.plan(config, {"pp": 2, "ep": 1}, **options, chip=chip, stash="auto")
    (row,) = found.rows
    assert row.memory.total <= 0.95 * chip.memory and row.memory.stash < whole.memory.stash
    assert f"again in the backward pass: what exceeds {row.stash / 1e9:.3g} GB of a microbatch and stage" in str(found)
    (row,) = planning.plan(config, {"pp": 2, "ep": 1}, **options, stash=10).rows
    assert row.memory is None and "stash=10 bytes of a microbatch and stage are too few: the least" in row.reason
