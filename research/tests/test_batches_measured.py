"""What is made of the times of batches."""

from sparrow_research.batches import fastest


def test_of_each_batch_the_fastest_run_counts() -> None:
    runs = [{"seconds": [3.0, 1.0, 2.0]}, {"seconds": [2.0, 5.0, 2.5]}]
    assert fastest(runs, "seconds") == 2.0 + 1.0 + 2.0
