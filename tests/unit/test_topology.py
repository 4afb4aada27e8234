import itertools

import pytest

from mhc_dist.topology import Topology

LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 1, 1), (1, 4, 4), (2, 4, 2), (3, 6, 2)]


def test_the_documented_example_by_hand() -> None:
    # Oracle: the drawing in the module's docstring.
    place = Topology(pipeline=2, data=4, expert=2, rank=6)
    assert (place.pipeline_rank, place.data_rank, place.expert_rank) == (1, 2, 0)
    assert place.data_group_ranks == (4, 5, 6, 7)
    assert place.expert_group_ranks == (6, 7)
    assert place.expert_data_group_ranks == (4, 6)
    assert place.pipeline_group_ranks == (2, 6)
    assert place.neighbour_ranks == (2,)


@pytest.mark.parametrize(("pipeline", "data", "expert"), LAYOUTS)
def test_every_kind_of_group_partitions_the_world(pipeline: int, data: int, expert: int) -> None:
    # Oracle: the definition of a partition, and every rank's own view of its group.
    place = Topology(pipeline, data, expert)
    for groups, own, size in (
        (place.all_data_groups(), "data_group_ranks", data),
        (place.all_expert_groups(), "expert_group_ranks", expert),
        (place.all_expert_data_groups(), "expert_data_group_ranks", data // expert),
    ):
        assert sorted(itertools.chain(*groups)) == list(range(pipeline * data))
        for group in groups:
            assert len(group) == size
            assert all(getattr(place.at(rank), own) == group for rank in group)


@pytest.mark.parametrize(("pipeline", "data", "expert"), LAYOUTS)
def test_coordinates_invert_rank_of(pipeline: int, data: int, expert: int) -> None:
    # Oracle: brute force over all coordinates.
    place = Topology(pipeline, data, expert)
    for pipeline_rank, data_rank in itertools.product(range(pipeline), range(data)):
        there = place.at(place.rank_of(pipeline_rank, data_rank))
        assert (there.pipeline_rank, there.data_rank) == (pipeline_rank, data_rank)


@pytest.mark.parametrize(("pipeline", "data", "expert"), LAYOUTS)
def test_an_expert_group_and_its_expert_data_group_share_one_rank(
    pipeline: int, data: int, expert: int
) -> None:
    # Oracle: the two kinds of group are rows and columns of one grid.
    for rank in range(pipeline * data):
        place = Topology(pipeline, data, expert, rank)
        assert set(place.expert_group_ranks) & set(place.expert_data_group_ranks) == {rank}
        assert set(place.expert_group_ranks) <= set(place.data_group_ranks)


def test_channels_are_ordered_neighbour_pairs() -> None:
    # Oracle: the pairs of a three-stage pipeline with two data ranks, written out.
    expected = {(0, 2), (2, 0), (1, 3), (3, 1), (2, 4), (4, 2), (3, 5), (5, 3)}
    channels = Topology(pipeline=3, data=2, expert=1).all_channels()
    assert set(channels) == expected
    assert len(channels) == len(expected)


def test_bad_sizes_are_refused_with_numbers_and_remedy() -> None:
    # Oracle: the wording promised to users.
    with pytest.raises(ValueError, match=r"expert=3 does not divide parallel.data=4.*\[1, 2, 4\]"):
        Topology(2, 4, 3).check()
    with pytest.raises(ValueError, match=r"parallel.pipeline=0 is less than 1"):
        Topology(0, 4, 2).check()
    with pytest.raises(ValueError, match=r"rank 8 is outside 0..7.*exactly 8 processes"):
        Topology(2, 4, 2, rank=8).check()
    with pytest.raises(ValueError, match=r"6 processes were started.*needs 8"):
        Topology(2, 4, 2).check_world_size(6)
