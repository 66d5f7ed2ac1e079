"""What Kineto's annotations and arguments say of an event: phase, step, layer, microbatch, collective."""

import collections
from typing import Any

import pytest

from profiling.event import Collective
from profiling.read.kineto import read_kineto
from tests.profiling.kineto_files import ALL_REDUCE, GEMM, described, document, gpu, host, launch, launched


@pytest.fixture
def read(write_trace):
    return lambda events, **header: read_kineto(write_trace(document(events, **header)))


class TestLayers:
    def layers(self, read, names, step: str | None = "ProfilerStep#5"):
        around = [host(step, -1, 10_000)] if step else []
        trace = read([*around, *launched(names)])
        return [event.layer for event in trace.events], trace.notes

    def test_two_phases_in_turn_within_a_step(self, read):
        assert self.layers(read, ["embed", *["attn", "mlp"] * 3, "head"])[0] == [None, 0, 0, 1, 1, 2, 2, None]

    def test_buckets_of_ddp_are_none(self, read):
        """One phase that repeats is evidence of nothing, whatever it communicates."""
        assert self.layers(read, ["nccl:all_reduce"] * 3)[0] == [None] * 3
        assert self.layers(read, ["nccl:all_reduce", "nccl:all_gather"] * 3)[0] == [None] * 6

    def test_microbatches_and_steps_are_none(self, read):
        assert self.layers(read, ["## forward ##", "## backward ##"] * 4)[0] == [None] * 8
        assert self.layers(read, ["fwd", "bwd"] * 4)[0] == [None] * 8
        assert self.layers(read, ["attn", "mlp"] * 4, step=None)[0] == [None] * 8

    def test_a_phase_that_occurs_once_is_none(self, read):
        assert self.layers(read, ["attn", "mlp"])[0] == [None] * 2

    def test_another_order_is_none(self, read):
        layers, notes = self.layers(read, ["attn", "mlp", "mlp", "attn"])
        assert layers == [None] * 4
        assert "phases repeat in changing order" in notes[0]

    def test_what_takes_little_time_is_none(self, read):
        """The model runs in one phase; exchanges of data beside it repeat."""
        events = [host("ProfilerStep#5", -1, 9000), *launched(["lengths", "values"] * 2)]
        events += [host("model", 100, 50), launch(120, 77), gpu(GEMM, 2000, 500, correlation=77)]
        assert {event.layer for event in read(events).events} == {None}

    def test_communication_is_no_evidence(self, read):
        """Sharded parameters are gathered in two phases, of which waiting for peers takes most of the time."""
        events = [host("ProfilerStep#5", -1, 9000), *launched(["FSDP::copy_in", "FSDP::all_gather"] * 2)]
        events += [launch(32, 77), gpu(ALL_REDUCE, 2000, 900, 20, correlation=77)]
        events += [host("model", 100, 50), launch(120, 78), gpu(GEMM, 3000, 100, correlation=78)]
        assert {event.layer for event in read(events).events} == {None}

    def test_numbers_in_names(self, read):
        events = [host("layer_3", 0, 29), host("model.layers.11.mlp", 30, 9), *launched(["attn", "mlp", "norm", "moe"])]
        assert [event.layer for event in read(events).events] == [3, 3, 3, 11]


class TestSteps:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("ProfilerStep#5", ("ProfilerStep", 5)),
            ("## backward ##", ("## backward ##", None)),
            ("Optimizer.step#Adam.step", ("Optimizer.step#Adam.step", None)),
            ("enumerate(DataLoader)#__next__", ("enumerate(DataLoader)#__next__", None)),
            ("train_step#12", ("train_step", 12)),
            ("iteration 7", ("iteration", 7)),
            ("#3", ("#3", None)),
        ],
    )
    def test_names(self, read, name, expected):
        (step,) = read([host(name, -1, 100), *launched(["inner"])]).steps
        assert (step.name, step.number) == expected

    def test_a_kernel_has_the_step_that_launched_it(self, read):
        """Step 8 runs on the GPU while the host is in step 9; the last is launched between two."""
        events = [host("ProfilerStep#8", 0, 50), host("ProfilerStep#9", 60, 50)]
        for n, at in enumerate((10, 49, 61, 55)):
            events += [launch(at, n), gpu(GEMM, 100 + n * 10, 5, correlation=n)]
        assert [event.step for event in read(events).events] == [8, 8, 9, None]

    def test_steps_of_the_user_count_where_the_profiler_has_none(self, read):
        events = [host("step#1", 0, 18), host("step#2", 20, 18), launch(25, 1), gpu(GEMM, 90, 5, correlation=1)]
        trace = read(events)
        assert (trace.events[0].step, trace.events[0].phase) == (2, "")
        assert read([host("ProfilerStep#4", 0, 99), *events]).events[0].step == 4
        assert read([host("step[DECODE bs=32]", 0, 99), launch(5, 1), events[3]]).events[0].step is None


class TestPhases:
    def test_the_launching_thread_decides(self, read):
        """A loader of data on another thread, that began later, does not take the kernels of the model."""
        events = [
            host("forward", 0, 100, tid=1),
            host("load", 10, 100, tid=2),
            launch(20, 1, tid=1),
            launch(21, 2, tid=3),
            gpu(GEMM, 500, 5, correlation=1),
            gpu(GEMM, 510, 5, correlation=2),
        ]
        assert [event.phase for event in read(events).events] == ["forward", "forward"]

    def test_the_backward_pass_runs_on_a_thread_of_its_own(self, read):
        events = [
            host("## backward ##", 0, 100, tid=1),
            launch(1, 1, tid=1),
            gpu(GEMM, 490, 5, correlation=1),
            host("nccl:all_reduce", 10, 10, tid=2),
            launch(12, 2, tid=2),
            gpu(ALL_REDUCE, 500, 5, 20, correlation=2),
        ]
        trace = read(events)
        assert [event.scope for event in trace.events] == ["## backward ##", "## backward ##/nccl:all_reduce"]
        assert [step.name for step in trace.steps] == ["## backward ##"]

    def test_annotations_on_the_gpu_are_no_kernels(self, read):
        events = [*launched(["a"]), gpu("ProfilerStep#5", 0, 9000, cat="gpu_user_annotation")]
        assert [event.name for event in read(events).events] == [GEMM]

    def test_brackets_that_are_no_microbatch(self, read):
        names = ["ATTN-0(1)", "attn(F)", "execute_context_1(888_788544)_generation_0(0)", "microbatch 2"]
        assert [event.microbatch for event in read(launched(names)).events] == [1, None, None, 2]


class TestCollectives:
    def one(self, read, *events, **header):
        (found,) = {event.collective for event in read(list(events), **header).events}
        return found

    def test_from_the_arguments_of_the_kernel(self, read):
        """1,024 elements of two bytes each go in, and come out eight times as many of an all-gather of eight."""
        args = described(
            ranks=range(8), **{"Collective name": "_allgather_base", "Out msg nelems": 8192, "Process Group Name": "3"}
        )
        assert self.one(read, gpu("ncclDevKernel_AllGather_RING_LL", 0, 9, **args)) == Collective(
            "all-gather", "3", tuple(range(8)), 8, 2048, 16384, "BFloat16", 3
        )

    @pytest.mark.parametrize(
        ("name", "kind"),
        {
            "allreduce": "all-reduce", "allreduce_coalesced": "all-reduce", "all_gather_into_tensor": "all-gather",
            "_reduce_scatter_base": "reduce-scatter", "all_to_allv": "all-to-all", "all_to_all_single": "all-to-all",
            "broadcast": "broadcast", "_broadcast_oop": "broadcast", "reduce": "reduce", "send": "send",
            "recv": "receive", "coalesced": "coalesced", "barrier": "barrier",
        }.items(),
    )  # fmt: skip
    def test_names(self, read, name, kind):
        assert self.one(read, gpu("nccl", 0, 9, **described(**{"Collective name": name}))).kind == kind

    def test_an_unknown_type_has_no_bytes(self, read):
        found = self.one(read, gpu("nccl", 0, 9, **described(dtype="Posit16")))
        assert (found.sent, found.received, found.dtype) == (None, None, "Posit16")

    @pytest.mark.parametrize(
        ("args", "ranks"),
        [
            ({"Process Group Ranks": "[0, 2, ..., 14]"}, None),
            (
                {"Process Group Ranks": "[0, 2, ..., 14]", "Global rank start": 0, "Global rank stride": 2},
                range(0, 16, 2),
            ),
            ({"Process Group Ranks": "[0, 2, ..., 14]", "Global rank start": 0, "Global rank stride": -1}, None),
            ({"Process Group Ranks": "[0, 1]"}, None),
            ({"Process Group Ranks": [7, 6, 5, 4, 3, 2, 1, 0]}, range(7, -1, -1)),
        ],
    )
    def test_ranks_that_were_cut_short(self, read, args, ranks):
        """A group of eight; a list of another length than the group's size is not believed."""
        found = self.one(read, gpu("nccl", 0, 9, **described(**{"Group size": 8, **args})))
        assert found.ranks == (None if ranks is None else tuple(ranks))
        assert found.size == 8

    def test_ranks_from_the_head_of_the_file(self, read):
        job = {"rank": 0, "world_size": 4, "pg_config": [{"pg_name": "0", "pg_size": 4, "ranks": [0, 1, 2, 3]}]}
        args = described(**{"Group size": 4, "Process Group Ranks": "[0, 1, ..., 3]"})
        assert self.one(read, gpu("nccl", 0, 9, **args), distributedInfo=job).ranks == (0, 1, 2, 3)

    def test_from_the_operator_with_the_same_external_id(self, read):
        facts: dict[str, Any] = {"External id": 40}
        operator = host("record_param_comms", 0, 9, "cpu_op", **facts, **described())
        assert self.one(read, operator, gpu(ALL_REDUCE, 50, 9, **facts)).sent == 2048

    def test_from_the_operator_round_the_launch(self, read):
        """Waiting for a collective is an operator of the same name, and no collective."""
        waiting = described() | {"Collective name": "wait"}
        events = [
            host("record_param_comms", 0, 9, "cpu_op", **described()),
            host("record_param_comms", 20, 9, "cpu_op", 1, **waiting),
            launch(5, 1),
            launch(25, 2),
            gpu(ALL_REDUCE, 50, 9, 20, correlation=1),
            gpu(ALL_REDUCE, 60, 9, 20, correlation=2),
            gpu(GEMM, 70, 9, correlation=1),
        ]
        found = [event.collective for event in read(events).events]
        assert found[0] is not None and found[0].kind == "all-reduce"
        assert found[1:] == [None, None]

    def test_equal_ones_are_one_object(self, read):
        events = [gpu(ALL_REDUCE, 10 * i, 5, 20, **described()) for i in range(50)]
        assert collections.Counter(id(event.collective) for event in read(events).events).most_common(1)[0][1] == 50
