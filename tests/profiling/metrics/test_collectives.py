"""Bandwidth of collectives against plain arithmetic, and stragglers among ranks that really meet."""

import dataclasses

import pytest

from profiling.event import Collective, Event, Trace
from profiling.metrics import bus_factor, collectives, measure, skew
from profiling.metrics.calls import calls, ranges
from profiling.reports.making import report

MB = 1_000_000


def nccl(device, start, end, kind="all-reduce", ranks=(0, 1), sequence=None, sent=8 * MB, received=8 * MB, **facts):
    of = Collective(kind, facts.pop("name", "dp"), ranks, facts.pop("size", len(ranks) if ranks else None), sent,
                    received, "bf16", sequence)  # fmt: skip
    return Event(device, "20", float(start), float(end), "ncclDevKernel", group="transfer", kind=kind, collective=of,
                 step=facts.pop("step", None))  # fmt: skip


def trace(*events, **facts):
    return Trace("by hand", "kineto", tuple(sorted(events, key=lambda event: event.start)), **facts)


def rows(*events, **facts):
    return {(row.kind, row.size_class): row for row in collectives(trace(*events), **facts)}


@pytest.mark.parametrize(
    ("kind", "sent", "received", "algorithm", "bus"),
    [
        # Eight ranks, 1,000 us. 8 MB in 1 ms are 8 GB/s.
        ("all-reduce", 8 * MB, 8 * MB, 8.0, 8.0 * 2 * 7 / 8),
        # Each rank gives 1 MB, and the whole is 8 MB.
        ("all-gather", 1 * MB, 8 * MB, 8.0, 7.0),
        ("reduce-scatter", 8 * MB, 1 * MB, 8.0, 7.0),
        ("all-to-all", 8 * MB, 8 * MB, 8.0, 7.0),
        ("broadcast", 8 * MB, 8 * MB, 8.0, 8.0),
        ("reduce", 8 * MB, 0, 8.0, 8.0),
        ("send", 8 * MB, None, 8.0, 8.0),
        ("receive", None, 8 * MB, 8.0, 8.0),
        # What only one side tells.
        ("all-gather", 1 * MB, None, 8.0, 7.0),
        ("reduce-scatter", None, 1 * MB, 8.0, 7.0),
        ("gather", 1 * MB, 0, 8.0, 7.0),
        ("scatter", 0, 1 * MB, 8.0, 7.0),
        ("barrier", None, None, None, None),
        ("something new", 8 * MB, 8 * MB, 8.0, None),
    ],
)
def test_bandwidths_are_those_of_nccls_tests(kind, sent, received, algorithm, bus):
    (row,) = collectives(trace(nccl(0, 0, 1000, kind, tuple(range(8)), None, sent, received)))
    assert row.algorithm_bandwidth == pytest.approx(algorithm) if algorithm else row.algorithm_bandwidth is None
    assert row.bus_bandwidth == pytest.approx(bus) if bus else row.bus_bandwidth is None


def test_a_group_of_one_or_of_unknown_size_has_no_bus():
    assert bus_factor("all-reduce", 1) is bus_factor("all-reduce", None) is bus_factor("all-gather", None) is None
    assert bus_factor("all-reduce", 2) == 1.0
    (row,) = collectives(trace(nccl(0, 0, 10, ranks=None, name="tp")))
    assert row.algorithm_bandwidth == 800.0 and row.bus_bandwidth is None


def test_nothing_is_said_where_the_profiler_says_nothing():
    plain = trace(Event(0, "20", 0.0, 9.0, "ncclDevKernel_AllReduce", group="transfer"))
    assert collectives(plain) == measure(plain).collectives == ()
    assert "collectives" not in {table.name for table in report(plain).tables}
    (row,) = collectives(trace(nccl(0, 0, 0)))
    assert row.algorithm_bandwidth is row.hidden is None


def test_rows_are_kinds_groups_and_sizes():
    found = collectives(
        trace(
            nccl(0, 0, 10, sent=1000, received=1000), nccl(0, 10, 40, sent=2000, received=2000),
            nccl(0, 50, 60), nccl(0, 70, 75, "broadcast"), nccl(0, 80, 90, ranks=(0, 2), name="pp"),
        )
    )  # fmt: skip
    assert [(row.kind, row.group.label, row.size_class, row.count, row.bytes, row.time) for row in found] == [
        ("all-reduce", "dp (ranks 0, 1)", "up to 64 KiB", 2, 3000, 40.0),
        ("all-reduce", "dp (ranks 0, 1)", "1-16 MiB", 1, 8 * MB, 10.0),
        ("all-reduce", "pp (ranks 0, 2)", "1-16 MiB", 1, 8 * MB, 10.0),
        ("broadcast", "dp (ranks 0, 1)", "1-16 MiB", 1, 8 * MB, 5.0),
    ]
    # Bandwidth is all bytes by all the time: 3,000 bytes in 40 us.
    assert found[0].algorithm_bandwidth == pytest.approx(0.075)


def test_hidden_is_the_share_with_compute_on_the_same_device():
    gemms = [Event(device, "7", 4.0, 100.0, "gemm", group="compute") for device in (0, 5)]
    found = rows(nccl(0, 0, 10), nccl(1, 0, 10), nccl(0, 20, 30), *gemms)
    # 6 of 10 us and 10 of 10 us on device 0, none on device 1.
    assert found["all-reduce", "1-16 MiB"].hidden == pytest.approx(16 / 30)


def test_the_rank_that_comes_last_tells_the_time_of_the_transfer():
    """Rank 1 joins 60 us late: rank 0's kernel takes 100 us, of which 40 us move the data."""
    (row,) = collectives(trace(nccl(0, 0, 100), nccl(1, 60, 100)))
    assert (row.count, row.time, row.matched, row.least_time) == (2, 140.0, 1, 40.0)
    assert row.bus_bandwidth == pytest.approx(16e6 / 140 / 1e3)
    assert row.least_bus_bandwidth == row.least_algorithm_bandwidth == pytest.approx(8e6 / 40 / 1e3)
    (alone,) = collectives(trace(nccl(0, 0, 100)))
    assert (alone.matched, alone.least_bus_bandwidth) == (0, None)


def test_kernels_of_one_call_count_once():
    channels = [nccl(0, t, t + 4, sequence=1) for t in (0, 2)]
    parts = [nccl(0, t, t + 4, sequence=2, sent=size, received=size) for t, size in ((10, 1000), (14, 2000))]
    plain = [nccl(0, t, t + 4, sequence=None) for t in (0, 2)]
    assert [(call.time, call.bytes) for call in calls([*channels, *parts])] == [(6.0, 8 * MB), (8.0, 3000)]
    assert len(calls(plain)) == 2
    # A number that is always the same numbers nothing.
    assert len(calls([nccl(0, 10 * t, 10 * t + 4, sequence=0) for t in range(3)])) == 3


def test_a_window_counts_whole_collectives_only():
    events = [nccl(0, 0, 10), nccl(0, 15, 25), nccl(0, 40, 50)]
    assert sum(row.count for row in collectives(trace(*events), (0.0, 25.0))) == 2
    found = measure(trace(*events), window=(0.0, 20.0))
    assert [row.count for row in found.collectives] == [1]
    assert any("1 collectives lie across an edge" in note for note in found.notes)


def test_an_event_that_computes_is_no_collective():
    copy = dataclasses.replace(nccl(0, 0, 10), group="compute")
    assert collectives(trace(copy)) == ()


def test_table_in_reports():
    made = report(trace(nccl(0, 0, 100), nccl(1, 60, 100)))
    table = made["collectives"]
    assert table.rows == (
        ("all-reduce", "dp (ranks 0, 1)", 2, "1-16 MiB", 2, 16.0, 140.0, 70.0, *[pytest.approx(16 / 0.14)] * 2, 40.0,
         200.0, 0.0),
    )  # fmt: skip
    assert "wait" in table.caption and "Least" in table.caption
    assert "Least" not in report(trace(nccl(0, 0, 100)))["collectives"].caption
    assert "GB/s" in made.text()


def test_ranks_of_a_group_in_few_words():
    assert ranges((3, 4)) == "3, 4"
    assert ranges(tuple(range(128))) == "0-127"
    assert ranges(tuple(n * n for n in range(12))) == "0, 1, 4, 9, 16, 25, 36, 49, ..., 121"
    assert ranges(()) == ""


class TestStragglers:
    def test_unrelated_groups_have_nothing_in_common(self):
        """Ranks 0 and 1 are of the groups [0, 2] and [1, 3]; their all-reduces have the same name."""
        apart = trace(nccl(0, 0, 100, ranks=(0, 2)), nccl(1, 5000, 5100, ranks=(1, 3)))
        assert skew(apart) is None
        assert [row.matched for row in collectives(apart)] == [0, 0]
        found = report(apart)
        assert any("no two devices of this trace are in one process group" in note for note in found.notes)
        assert "skew" not in {table.name for table in found.tables}

    def test_within_groups(self):
        """Two groups of two: rank 1 comes 10 us late, rank 3 30 us; the groups run at other times."""
        events = []
        for n in range(4):
            t = 1000 * n
            events += [nccl(0, t, t + 100, sequence=n), nccl(1, t + 10, t + 100, sequence=n)]
            events += [nccl(d, t + late, t + 700, ranks=(2, 3), sequence=n) for d, late in ((2, 500), (3, 530))]
        found = skew(trace(*events))
        assert found is not None and found.matched == 8
        assert [(of.devices, of.start_spread, of.straggler) for of in found.groups] == [
            ((0, 1), 10, 1),
            ((2, 3), 30, 3),
        ]
        assert [row.lateness for row in found.devices] == [0, 10, 0, 30]
        assert [row.peer_wait for row in found.devices] == [40, 0, 120, 0]
        assert (found.start_spread, found.straggler, found.resolution) == (20, 3, 2.0)
        made = report(trace(*events))
        assert [row[0] for row in made["skew-groups"].rows] == ["dp (ranks 0, 1)", "dp (ranks 2, 3)"]
        assert "Device 3 joins latest." in made["skew"].caption

    def test_ranks_that_are_not_here_are_not_needed(self):
        found = skew(trace(nccl(0, 0, 50, ranks=(0, 1, 2, 3)), nccl(2, 30, 50, ranks=(0, 1, 2, 3))))
        assert found is not None and found.groups[0].devices == (0, 2) and found.straggler == 2

    def test_names_of_a_group_may_differ_between_ranks(self):
        same = trace(nccl(0, 0, 50, name="7"), nccl(1, 30, 50, name="9"))
        found = skew(same)
        assert found is not None and found.groups[0].group.label == "ranks 0, 1"
        assert [row.count for row in collectives(same)] == [2]
        # A rank with two groups of the same ranks tells them apart by name.
        twice = trace(nccl(0, 0, 50, name="a"), nccl(0, 60, 90, name="b"), nccl(1, 70, 90, name="b"))
        found = skew(twice)
        assert found is not None and [of.group.name for of in found.groups] == ["b"]

    def test_sequence_numbers_align_profiles_that_begin_at_other_times(self):
        late = [nccl(1, 100 * n + 20, 100 * n + 50, sequence=n) for n in (1, 2)]
        found = measure(trace(*[nccl(0, 100 * n, 100 * n + 50, sequence=n) for n in (0, 1, 2)], *late))
        assert found.skew is not None and (found.skew.matched, found.skew.start_spread) == (2, 20)
        assert any("1 are not on every device" in note for note in found.notes)

    def test_without_numbers_the_counts_and_sizes_must_agree(self):
        fewer = trace(nccl(0, 0, 50), nccl(0, 100, 150), nccl(1, 100, 150))
        assert skew(fewer) is None
        assert any("2 on device 0, 1 on device 1" in note for note in report(fewer).notes)
        other = trace(nccl(0, 0, 50), nccl(1, 20, 50, sent=MB, received=MB))
        assert skew(other) is None
        assert any("different sizes" in note for note in report(other).notes)

    def test_steps_keep_what_belongs_together(self):
        """Device 1's profile lacks an all-reduce of step 3; those of steps 4 and 5 are compared all the same."""
        events = [
            nccl(d, 100 * n + 30 * d, 100 * n + 50, step=3 + n // 2)
            for n in range(6)
            for d in (0, 1)
            if (d, n) != (1, 0)
        ]
        made = report(trace(*events))
        assert made.measurement.skew is not None
        assert (made.measurement.skew.matched, made.measurement.skew.start_spread) == (4, 30)
        assert any("in 1 of 3 steps the devices have different numbers" in note for note in made.notes)

    def test_sends_and_receives_do_not_involve_the_group(self):
        assert skew(trace(nccl(0, 0, 50, "send"), nccl(1, 20, 50, "send"))) is None

    def test_clocks_that_differ(self):
        """Device 1's clock is 5,000 us ahead: its all-reduces begin when device 0's have ended long ago."""
        events = [nccl(0, 100 * n, 100 * n + 50, sequence=n) for n in range(5)]
        events += [nccl(1, 5000 + 100 * n + 20, 5000 + 100 * n + 50, sequence=n) for n in range(5)]
        made = report(trace(*events))
        found = made.measurement.skew
        assert found is not None and found.straggler is None and found.start_spread is None
        (of,) = found.groups
        assert (of.clocks_agree, of.impossible, of.offsets) == (False, 5, {0: -2500.0, 1: 2500.0})
        assert [row.lateness for row in found.devices] == [None, None]
        # Durations need no common clock.
        assert [row.peer_wait for row in found.devices] == [100, 0]
        (note,) = [note for note in made.notes if "clocks" in note]
        assert "device 1's is ahead of device 0's by about 5,000 us" in note
        assert "clocks differ" in made["skew"].caption

    def test_a_broadcast_may_end_before_others_begin(self):
        found = skew(trace(nccl(0, 0, 10, "broadcast"), nccl(1, 50, 60, "broadcast")))
        assert found is not None and found.groups[0].clocks_agree and found.start_spread == 50

    def test_clocks_that_differ_in_one_group_differ_in_another(self):
        """Broadcasts of devices 0 and 1 tell nothing of clocks; an all-reduce of both does."""
        broadcasts = [nccl(0, 0, 10, "broadcast", name="b"), nccl(1, 50, 60, "broadcast", name="b")]
        found = skew(trace(*broadcasts, nccl(0, 100, 110, name="a"), nccl(1, 150, 160, name="a")))
        assert found is not None and [of.clocks_agree for of in found.groups] == [False, False]

    @pytest.mark.parametrize(("late", "straggler"), [(10, None), (200, 1)])
    def test_lateness_below_the_resolution_names_nobody(self, late, straggler):
        """The ends, which belong together, lie 40 us apart: starts cannot be told closer."""
        events = [nccl(d, 1000 * n + d * late, 1000 * n + 300 + 40 * d, sequence=n) for n in range(4) for d in (0, 1)]
        made = report(trace(*events))
        found = made.measurement.skew
        assert found is not None and (found.resolution, found.straggler) == (40, straggler)
        said = "No device is late by more than the 40.0 us" if straggler is None else "Device 1 joins latest"
        assert said in made["skew"].caption

    def test_whole_microseconds_are_no_difference_of_clocks(self):
        found = skew(trace(nccl(0, 0, 10), nccl(1, 11, 12)))
        assert found is not None and found.groups[0].clocks_agree

    def test_windows_keep_what_belongs_together(self):
        """In the window device 1 has one all-reduce less; by their order in the whole trace they are still matched."""
        events = [nccl(0, 100 * n, 100 * n + 50) for n in range(3)] + [
            nccl(1, 100 * n + 40, 100 * n + 50) for n in range(3)
        ]
        found = measure(trace(*events), window=(120.0, 260.0)).skew
        assert found is not None and (found.matched, found.start_spread) == (1, 40)


class TestWithoutGroups:
    """A profiler that tells no process groups: names and order must do, and must not contradict each other."""

    def event(self, device, start, end, name="ncclDevKernel_AllReduce", **facts):
        return Event(device, "20", float(start), float(end), name, group="transfer", **facts)

    def test_the_same_sequence_everywhere(self):
        found = skew(trace(self.event(0, 0, 50), self.event(1, 30, 50), self.event(0, 60, 90), self.event(1, 80, 90)))
        assert found is not None and (found.matched, found.start_spread, found.straggler) == (2, 25, 1)

    def test_other_counts(self):
        made = report(trace(self.event(0, 0, 50), self.event(1, 30, 50), self.event(0, 60, 90)))
        assert made.measurement.skew is None
        assert any("do not run the same collectives" in note and "2 on device 0" in note for note in made.notes)

    def test_names_of_instructions_tell_collectives_apart(self):
        events = [self.event(d, 10 * d, 50, hlo_op="all-reduce.1") for d in (0, 1)]
        found = skew(trace(*events, self.event(1, 60, 90, hlo_op="all-gather.7")))
        assert found is not None and found.matched == 1

    def test_what_contradicts_itself_is_not_compared(self):
        made = report(trace(self.event(0, 0, 50), self.event(1, 5000, 5050)))
        assert made.measurement.skew is None
        assert any("not the same, or the clocks differ" in note for note in made.notes)

    def test_copies_are_no_collectives(self):
        copies = [self.event(0, t, t + 1, "Memcpy PtoP (Device -> Device)") for t in (0, 5)]
        found = skew(trace(*copies, self.event(0, 10, 50), self.event(1, 30, 50)))
        assert found is not None and found.matched == 1

    def test_one_device_has_no_note(self):
        assert measure(trace(self.event(0, 0, 50))).notes == ()
