"""When waiting for samples is worth a warning."""

from speculators_cli.core.training.run_log import WaitWatch


def test_a_short_time_is_never_warned_of() -> None:
    watch = WaitWatch()

    assert watch.add(waited=4.0, seconds=9.0) is None


def test_a_share_is_taken_of_all_that_was_watched() -> None:
    watch = WaitWatch()

    shares = [watch.add(waited=w, seconds=4.0) for w in (0.0, 1.5, 1.5, 4.0, 4.0, 4.0)]

    # Three times four seconds, a quarter of which was waited; one warning is enough.
    assert shares == [None, None, 0.25, None, None, None]


def test_what_was_good_is_forgotten_when_samples_become_slow() -> None:
    watch = WaitWatch()

    assert watch.add(waited=0.0, seconds=1000.0) is None
    assert watch.add(waited=1.0, seconds=10.0) == 0.1


def test_a_small_share_is_not_worth_a_warning() -> None:
    watch = WaitWatch()

    assert watch.add(waited=0.5, seconds=10.0) is None
    assert watch.add(waited=0.6, seconds=10.0) == 0.06
