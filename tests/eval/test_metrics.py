"""Accuracies, differences and their intervals against formulas written out, scipy, and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from latefusion.eval import metrics

answers = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" Yes. ", "yes"), ("top\n  left", "top left"), ("42", "42"), ("a orange", "a orange"), ("", "")],
)
def test_answers_are_compared_without_case_spaces_and_full_stop(answer, right):
    assert metrics.normalise(answer) == right


def test_accuracy_equals_the_formula_written_out():
    scenes = {"a": [1, 1, 0], "b": [1, 0], "c": [1, 1, 1, 1], "d": [0]}
    measure = metrics.accuracy(
        [bool(y) for ys in scenes.values() for y in ys], [s for s, ys in scenes.items() for _ in ys]
    )
    n, clusters, p = 10, 4, 7 / 10
    between = sum((sum(ys) - p * len(ys)) ** 2 for ys in scenes.values())
    effect = (clusters / (clusters - 1) * between / n**2) / (p * (1 - p) / n)
    m, z = n / max(1, effect), stats.t.ppf(0.975, 3)
    centre, root = p + z**2 / (2 * m), z * math.sqrt(p * (1 - p) / m + z**2 / (4 * m**2))
    assert measure.value == p and (measure.n, measure.clusters) == (10, 4)
    assert measure.low == pytest.approx((centre - root) / (1 + z**2 / m))
    assert measure.high == pytest.approx((centre + root) / (1 + z**2 / m))


def test_one_question_a_scene_gives_the_usual_wilson_interval():
    correct = [i % 10 != 0 for i in range(2000)]
    measure = metrics.accuracy(correct, range(2000))
    usual = stats.binomtest(sum(correct), 2000).proportion_ci(method="wilson")
    assert (measure.low, measure.high) == pytest.approx((usual.low, usual.high), abs=1e-4)


def test_asking_the_same_thing_three_times_tells_nothing_new():
    correct = [i % 7 != 0 for i in range(70)]
    once = metrics.accuracy(correct, range(70))
    thrice = metrics.accuracy(correct * 3, list(range(70)) * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_all_right_is_not_certainty():
    measure = metrics.accuracy([True] * 40, [i // 4 for i in range(40)])
    assert measure.high == 1 and 0.5 < measure.low < 0.8


@settings(max_examples=60, deadline=None)
@given(answers)
def test_intervals_hold_the_estimate_and_do_not_depend_on_order(rows):
    measure = metrics.accuracy([a for a, _, _ in rows], [s for _, _, s in rows])
    assert 0 <= measure.low <= measure.value + 1e-12 and measure.value - 1e-12 <= measure.high <= 1
    again = metrics.accuracy([a for a, _, _ in rows[::-1]], [s for _, _, s in rows[::-1]])
    assert (again.low, again.high) == pytest.approx((measure.low, measure.high))


def beta_scenes(rng, rate, clusters, size, spread=5.0):
    """Answers of scenes that differ in difficulty, bool [clusters, size]."""
    hard = rng.beta(rate * spread, (1 - rate) * spread, clusters)
    return rng.random((clusters, size)) < hard[:, None]


@pytest.mark.parametrize("rate", [0.7, 0.95])
def test_accuracy_intervals_cover(rate):
    rng, scenes, trials = np.random.default_rng(0), np.repeat(np.arange(60), 8), 400
    hits = 0
    for _ in range(trials):
        measure = metrics.accuracy(beta_scenes(rng, rate, 60, 8).ravel().tolist(), scenes.tolist())
        hits += measure.low <= rate <= measure.high
    assert 0.92 <= hits / trials <= 0.985


def test_difference_intervals_cover():
    rng, scenes, trials = np.random.default_rng(1), np.repeat(np.arange(60), 8).tolist(), 400
    hits = 0
    for _ in range(trials):
        better = beta_scenes(rng, 0.9, 60, 8)
        worse = better & (rng.random(better.shape) < 0.9)  # loses a tenth of what the better one knows
        difference = metrics.paired(better.ravel().tolist(), worse.ravel().tolist(), scenes).difference
        hits += difference.low <= 0.09 <= difference.high
    assert 0.92 <= hits / trials <= 0.985


@pytest.mark.parametrize("lost", [0.005, 0.01])
def test_differences_near_100_percent_are_missed_on_neither_side(lost):
    """A bootstrap's lower end lies above the truth in 9 to 10% of these."""
    rng, scenes, trials = np.random.default_rng(2), np.repeat(np.arange(200), 4), 500
    above = below = 0
    for _ in range(trials):
        base = rng.random((200, 4)) < 0.998
        student = base & (rng.random((200, 4)) >= rng.beta(20 * lost, 20 * (1 - lost), 200)[:, None])
        difference = metrics.paired(student.ravel(), base.ravel(), scenes).difference
        above += difference.low > -0.998 * lost
        below += difference.high < -0.998 * lost
    assert above / trials <= 0.05 and below / trials <= 0.05


def test_the_paired_interval_is_what_the_score_test_does_not_reject():
    """Against the likelihood of wins, losses and ties, maximised where the difference is held fixed."""
    wins, losses, n = 12, 2, 50

    def statistic(gap):
        def lost(rate):
            return -(
                wins * np.log(rate + gap)
                + losses * np.log(rate)
                + (n - wins - losses) * np.log(1 - 2 * rate - gap)
            )

        ends = (max(0.0, -gap) + 1e-12, (1 - gap) / 2 - 1e-12)
        rate = optimize.minimize_scalar(lost, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        return (wins - losses - n * gap) / np.sqrt(n * (2 * rate + gap - gap**2))

    scores = [1.0] * wins + [0.0] * losses + [1.0] * (n - wins - losses)
    others = [0.0] * wins + [1.0] * losses + [1.0] * (n - wins - losses)
    difference = metrics.paired(scores, others, range(n)).difference
    quantile = stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))  # the least design effect of n images
    assert statistic(difference.low) == pytest.approx(quantile, abs=1e-4)
    assert statistic(difference.high) == pytest.approx(-quantile, abs=1e-4)


def test_tasks_that_ask_about_the_same_images_tell_nothing_new():
    rng = np.random.default_rng(3)
    first = (rng.random(300) < 0.6).astype(float)
    second = np.where(rng.random(300) < 0.1, 1 - first, first)
    images, tasks = [f"image {i}" for i in range(300)], ["a"] * 300 + ["b"] * 300
    once = metrics.paired(second, first, images).difference
    twice = metrics.paired(np.tile(second, 2), np.tile(first, 2), images * 2, tasks=tasks).difference
    assert (twice.low, twice.high, twice.clusters) == pytest.approx((once.low, once.high, 300))
    alone, both = metrics.accuracy(first, images), metrics.mean_of_tasks(np.tile(first, 2), images * 2, tasks)
    assert (both.low, both.high, both.clusters) == pytest.approx((alone.low, alone.high, 300))
    others = [f"other {i}" for i in range(300)]
    apart = metrics.mean_of_tasks(np.tile(first, 2), images + others, tasks)
    assert (apart.high - apart.low) / (alone.high - alone.low) == pytest.approx(1 / math.sqrt(2), abs=0.01)


def test_tasks_that_are_all_right_are_not_certain():
    """Two of 40 images each are as wide as one of 80 would be; the same 40 images twice, as one of 40."""
    tasks = ["x"] * 40 + ["y"] * 40
    apart = metrics.mean_of_tasks([1.0] * 80, range(80), tasks)
    assert apart.low == pytest.approx(metrics.accuracy([1.0] * 80, range(80)).low, abs=0.03)
    shared = metrics.mean_of_tasks([1.0] * 80, [*range(40), *range(40)], tasks)
    assert shared.low == pytest.approx(metrics.accuracy([1.0] * 40, range(40)).low)
    equal = metrics.paired([1.0] * 80, [1.0] * 80, range(80), tasks=tasks).difference
    assert equal.high == pytest.approx(-equal.low) and equal.high > 0.02


@pytest.mark.parametrize(("rates", "lost"), [((0.97, 0.6), (0.02, 0.1)), ((0.998, 0.995), (0.004, 0.01))])
def test_means_over_tasks_that_share_half_of_their_images_cover(rates, lost):
    rng, trials, images = np.random.default_rng(4), 300, 150
    clusters = [*range(images), *range(images // 2, images + images // 2)]
    tasks = ["a"] * images + ["b"] * images
    hits = np.zeros(2)
    for _ in range(trials):
        easy = rng.random(2 * images)[np.asarray(clusters)]  # of an image, in both tasks
        dense = easy < np.repeat(rates, images)
        student = dense & (rng.random(2 * images) >= np.repeat(lost, images))
        mean = metrics.mean_of_tasks(dense, clusters, tasks)
        gap = metrics.paired(student, dense, clusters, tasks=tasks).difference
        hits += (
            mean.low <= np.mean(rates) <= mean.high,
            gap.low <= -np.mean(np.multiply(rates, lost)) <= gap.high,
        )
    assert (hits / trials >= 0.92).all()


def test_measures_cover_and_are_never_certain():
    ones = [1.0] * 40
    certain = metrics.measure(metrics.Measure(terms=[(ones, ones)]), range(40))
    assert certain.value == certain.high == 100 and certain.low == pytest.approx(
        100 * metrics.accuracy(ones, range(40)).low
    )
    rng, scenes, trials, hits = np.random.default_rng(5), np.repeat(np.arange(60), 6), 300, 0
    for _ in range(trials):  # yes is right half of the time; precision and recall are 0.9
        truth = rng.random(360) < 0.5
        yes = np.where(truth, beta_scenes(rng, 0.9, 60, 6).ravel(), rng.random(360) < 0.1)
        figure = metrics.Measure(terms=[(1.0 * (truth & yes), 1.0 * truth + yes)], scale=200)
        estimate = metrics.measure(figure, scenes)
        hits += estimate.low <= 90 <= estimate.high
    assert 0.92 <= hits / trials <= 0.99


def test_paired_counts_mcnemar_and_direction():
    first = [True] * 8 + [False] * 2 + [True] * 30
    second = [False] * 8 + [True] * 2 + [True] * 30
    paired = metrics.paired(first, second, range(40))
    assert (paired.wins, paired.losses) == (8, 2)
    assert paired.mcnemar_p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert paired.difference.value == pytest.approx(6 / 40)
    turned = metrics.paired(second, first, range(40)).difference
    assert (turned.low, turned.high) == pytest.approx((-paired.difference.high, -paired.difference.low))


def test_the_paired_interval_agrees_with_the_normal_one_on_many_scenes():
    rng = np.random.default_rng(2)
    a, b = beta_scenes(rng, 0.8, 400, 5), beta_scenes(rng, 0.7, 400, 5)
    paired = metrics.paired(a.ravel().tolist(), b.ravel().tolist(), np.repeat(range(400), 5).tolist())
    means = a.mean(1) - b.mean(1)
    half = 1.96 * means.std(ddof=1) / 20
    ends = (paired.difference.low, paired.difference.high)
    assert ends == pytest.approx((means.mean() - half, means.mean() + half), abs=0.1 * half)


def test_equal_answers_are_not_certainty_either():
    paired = metrics.paired([True] * 60, [True] * 60, [i // 2 for i in range(60)])
    assert paired.mcnemar_p == 1
    assert paired.difference.value == 0
    assert paired.difference.high == pytest.approx(0.1224, abs=1e-4)
    assert paired.difference.low == pytest.approx(-0.1224, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.accuracy([], []), "no answers"),
        (lambda: metrics.accuracy([True], ["a", "b"]), "2 images"),
        (lambda: metrics.paired([True], [True, False], ["a"]), "cannot be paired"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
