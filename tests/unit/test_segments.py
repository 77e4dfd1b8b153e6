import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme_core.errors import InputError
from deme_core.recipe import SegmentsSpec
from deme_core.segments import TimestepSegment, equal_segments, recipe_segments, segments_from_edges

lengths = st.integers(1, 1000)


@given(st.data())
def test_equal_segments_partition_all_timesteps(data: st.DataObject) -> None:
    num_train_timesteps = data.draw(lengths)
    count = data.draw(st.integers(1, num_train_timesteps))

    segments = equal_segments(count, num_train_timesteps)

    assert [t for segment in segments for t in range(segment.low, segment.high)] == list(range(num_train_timesteps))
    assert len(segments) == count
    assert max(map(len, segments)) - min(map(len, segments)) <= 1


@given(st.data())
def test_edges_partition_all_timesteps(data: st.DataObject) -> None:
    num_train_timesteps = data.draw(lengths)
    inner = data.draw(st.sets(st.integers(1, max(num_train_timesteps - 1, 1)), max_size=10)) - {num_train_timesteps}
    edges = [0, *sorted(inner), num_train_timesteps]

    segments = segments_from_edges(edges, num_train_timesteps)

    assert [t for segment in segments for t in range(segment.low, segment.high)] == list(range(num_train_timesteps))
    assert [segment.low for segment in segments] == edges[:-1]


@given(st.data())
def test_every_timestep_is_in_exactly_one_segment(data: st.DataObject) -> None:
    segments = equal_segments(data.draw(st.integers(1, 20)), 1000)
    timestep = data.draw(st.integers(0, 999))

    assert sum(timestep in segment for segment in segments) == 1
    assert not any(outside in segment for segment in segments for outside in (-1, 1000))


def test_segments_of_unequal_lengths_begin_at_whole_parts_rounded_down() -> None:
    assert [segment.low for segment in equal_segments(3, 1000)] == [0, 333, 666]


def test_of_a_tensor_a_segment_holds_what_is_in_it() -> None:
    segment = TimestepSegment(3, 6)
    assert segment.holds(torch.arange(10)).tolist() == [timestep in segment for timestep in range(10)]


@pytest.mark.parametrize("count", [0, -1, 11])
def test_more_segments_than_timesteps_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"segments.count {count} must lie between 1 and num_train_timesteps 10\."):
        equal_segments(count, 10)


@pytest.mark.parametrize(
    ("edges", "sentence"),
    [
        ([], r"edges \[\] must start at 0 and end at 10\."),
        ([0], r"edges \[0\] must start at 0 and end at 10\."),
        ([1, 10], r"edges \[1, 10\] must start at 0 and end at 10\."),
        ([0, 5], r"edges \[0, 5\] must start at 0 and end at 10\."),
        ([0, 5, 11], r"edges \[0, 5, 11\] must start at 0 and end at 10\."),
        ([0, 5, 5, 10], r"edges \[0, 5, 5, 10\] must increase strictly\."),
        ([0, 7, 3, 10], r"edges \[0, 7, 3, 10\] must increase strictly\."),
    ],
)
def test_edges_that_do_not_partition_are_refused(edges: list[int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        segments_from_edges(edges, 10)


def test_a_recipe_gives_a_count_or_edges() -> None:
    assert recipe_segments(SegmentsSpec(count=2), 9) == (TimestepSegment(0, 4), TimestepSegment(4, 9))
    assert recipe_segments(SegmentsSpec(edges=(0, 2, 9)), 9) == (TimestepSegment(0, 2), TimestepSegment(2, 9))


def test_a_segment_prints_as_a_half_open_range() -> None:
    assert str(TimestepSegment(250, 500)) == "[250, 500)"
