"""Every figure: drawn from real shapes of data and from broken ones, legible, with alt text that tells the values."""

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from searchr1_lib.records import Question, SearchCall, Trajectory
from searchr1_lib.study import plots
from searchr1_lib.study.microscope import Reading, verdicts


def run(seed=0, steps=60, at=30):
    """Metrics of a run that parts known from look-up questions at step ``at``, with gaps."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        learned = 1 / (1 + math.exp(-(step - at)))
        known, lookup = rng.normal(0.5 - 0.48 * learned, 0.02), rng.normal(0.5 + 0.48 * learned, 0.02)
        rows.append(
            {
                "step": step,
                "reward": 0.6 + 0.3 * learned,
                "reward_std": 0.3,
                "em_known": 0.9,
                "em_lookup": lookup,
                "searches_known": known,
                "searches_per_need_lookup": lookup,
                "search_first_known": known,
                "search_first_lookup": lookup,
                "entropy": 0.3,
                "kl": None if step < 3 else 0.01 * step,
                "grad_norm": math.nan if step == 5 else 0.5,
                "clip_fraction": 0.0,
                "malformed": 0.01,
                "completion_tokens": 40.0,
                "zero_variance_groups": 0.5,
                "finish_answer": 0.9,
                "finish_turns": 0.1,
            }
        )
        if step == 7:
            del rows[-1]["em_lookup"]
    return rows


def rollout(known, hops, searches, right=True, **fields):
    question = Question("q", "Where?", ["here"], hops=hops, known=known)
    return Trajectory(
        question,
        [],
        [],
        [],
        [],
        calls=[SearchCall("q", [], 0.0)] * searches,
        answer="here" if right else "there",
        **fields,
    )


def readings(*, names=9):
    """Turns under the microscope: the first method is the truth, the last its reverse, one in between says nothing."""
    rng, found = np.random.default_rng(2), []
    for i, truth in enumerate(rng.choice([-0.2, 0.0, 0.1], 60)):
        given = {f"method {n}": float(truth * (1 - 2 * n / (names - 1)) + n % 2 * rng.normal()) for n in range(names)}
        found.append(Reading(i // 2, i % 2, "g", "s", "trust", float(truth), 0.0, given | {"method 4": 0.0}))
    return found


def figures():
    rng = np.random.default_rng(1)
    steps, rewards = np.arange(400) % 50 + 1.0, rng.choice([0.0, 0.85, 1.0], 400)
    bins = [
        {"sure": 0.1, "right": 0.0, "low": 0.0, "high": 0.2, "n": 30},
        {"sure": 0.9, "right": 0.95, "low": 0.9, "high": 1.0, "n": 300},
    ]
    settings = [
        {
            "setting": {"search_cost": c, "topk": k},
            "runs": 3,
            "figures": {
                f"exact match, {g}": {"mean": c, "low": c - 0.1, "high": c + 0.1, "values": [c, c, c + 0.05], "n": 3}
                for g in ("known", "look-up")
            },
        }
        for c in (0.0, 0.15, 0.5)
        for k in (1, 3)
    ]
    ways = [
        {"label": f"method number {i}", "x": 0.3 * (i // 2), "y": 0.9, "y_low": 0.8, "y_high": 0.95} for i in range(9)
    ]
    engines = [
        {"engine": f"engine {i}", "recall@1": 0.5, "recall@3": 0.8, "mrr": 0.6, "ms_per_query": 3.0**i}
        for i in range(6)
    ]
    w = rng.normal(0, 0.02, (64, 128))
    return {
        "learning_curves": plots.learning_curves(run()),
        "learning_curves of seeds": plots.learning_curves([run(0), run(1, at=40), run(2, steps=50)]),
        "outcomes": plots.outcomes(steps, rewards > 0, rng.integers(0, 3, 400), rng.integers(0, 2, 400)),
        "outcomes of known questions": plots.outcomes([1, 2], [1, 0], [0, 1], [1, 1]),
        "calibration": plots.calibration({"first steps": bins, "last steps": bins[1:]}),
        "calibration of nothing": plots.calibration({"first steps": [], "last steps": bins}),
        "trade_off": plots.trade_off(ways, x="searches per question", y="exact match"),
        "trade_off of runs": plots.trade_off(
            [way | {"runs": [(0.1, 0.2), (0.3, 0.4)]} for way in ways[:3]], x="searches", y="reward"
        ),
        "by_setting": plots.by_setting(
            settings[::2],
            {"Exact match": ["exact match, known", "exact match, look-up"], "None": ["nothing"]},
            "search_cost",
        ),
        "grid": plots.grid(settings, ["exact match, known", "exact match, look-up"], "topk", "search_cost"),
        "clip_objective": plots.clip_objective(0.2, 0.28),
        "retrieval_comparison": plots.retrieval_comparison(engines),
        "retrieval_comparison without times": plots.retrieval_comparison([{"engine": "BM25", "recall@3": 0.9}]),
        "nf4_quantisation": plots.nf4_quantisation(w, np.round(w, 2)),
        "advantages_of_group": plots.advantages_of_group([1, 0.85, 0, 0], [1.2, 0.8, -1, -1]),
        "advantages_of_group without variance": plots.advantages_of_group([0.85] * 4, [0] * 4),
        "curves": plots.curves(
            run(),
            {"Two": {"em_known": "known", "em_lookup": "look-up"}, "One": {"kl": "KL"}},
            title="Any metrics over the steps, also those that are missing at times",
        ),
        "side_by_side": plots.side_by_side(
            {"healthy": run(), "broken": run()[:3]},
            {"Reward": "reward", "KL": "kl", "No such": "none", "EM": "em"},
            title="Two runs of different lengths, and a metric that is missing",
            logarithmic=["kl"],
        ),
        "reward_histograms": plots.reward_histograms(
            {"exact_match": [1.0, 0.0, 1.0, 0.0], "ikea": [-1.0, 0.05, 1.6, 1.2], "search_cost": [0.0] * 4},
            [True, False, True, False],
        ),
        "correlations": plots.correlations(
            {
                "a": {"a": 1.0, "b": -0.5, "c": math.nan},
                "b": {"a": -0.5, "b": 1.0, "c": math.nan},
                "c": {"a": math.nan, "b": math.nan, "c": math.nan},
            }
        ),
        "lines": plots.lines(
            [0.0, 0.5, 1.0],
            {"known": {"search": [1, 0.5, 0], "answer": [1, 1, 1]}, "look-up": {"search": [0.9, 0.4, -0.1]}},
            xlabel="cost of a search",
            title="Where answering begins to pay more",
        ),
        "search_by_level": plots.search_by_level(
            {
                "before": [{"level": x, "searches": 0.5, "best": 1.0} for x in (0.0, 0.2, 0.95)],
                "after": [{"level": x, "searches": 1 - x, "best": float(x < 0.5)} for x in (0.0, 0.2, 0.95)],
            }
        ),
        "regrets": plots.regrets(
            [
                {"method": m, "price": c, "mean": 0.1 * c, "low": 0.08 * c, "high": 0.2 * c}
                for m in ("mine", "grpo", "a third one")
                for c in (0.15, 0.3)
            ],
            {c: {"always searches": 0.15, "never": 0.2, "where nothing is recalled": 0.1} for c in (0.15, 0.3)},
        ),
        "regrets at one price": plots.regrets(
            [{"method": "mine", "price": 0.3, "mean": 0.1, "low": 0.08, "high": 0.2}], {0.3: {"never": 0.2}}
        ),
        "credit": plots.credit(readings(), verdicts(readings())),
        "credit of two methods": plots.credit(readings(names=2), verdicts(readings(names=2))),
        "searches_vs_need": plots.searches_vs_need([rollout(True, 1, 0), rollout(False, 2, 3)] * 3),
    }


@pytest.fixture(scope="module")
def drawn():
    return {name: (fig, plots.png(fig)) for name, fig in figures().items()}


def test_every_figure_is_900_pixels_wide_small_and_told_in_words(drawn):
    for name, (fig, png) in drawn.items():
        picture = Image.open(io.BytesIO(png))
        assert picture.width == 900 and len(png) < 100_000, name
        assert len(fig.alt) > 60 and "nan" not in fig.alt and fig.alt.startswith(fig.get_suptitle()[:20]), name
        assert np.asarray(picture.convert("L")).std() > 5, name  # something is drawn


def test_no_label_is_cut_off_and_no_title_overlaps_its_neighbour(drawn):
    for name, (fig, _) in drawn.items():
        renderer = FigureCanvasAgg(fig).get_renderer()
        page = fig.bbox
        titles = []
        for ax in fig.axes:
            box = ax.get_tightbbox(renderer)
            assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, (name, "cut at the side")
            assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, (name, "cut above or below")
            if title := ax.get_title(loc="left"):
                titles.append((title, ax._left_title.get_window_extent(renderer)))
        suptitle = fig._suptitle.get_window_extent(renderer)
        assert suptitle.x1 <= page.x1, (name, "takeaway line too long")
        boxes = [*titles, ("takeaway", suptitle)]
        for i, (a, first) in enumerate(boxes):
            assert not any(first.overlaps(second) for _, second in boxes[i + 1 :]), (name, a)


def test_a_long_takeaway_is_wrapped_and_kept():
    title = "A takeaway line that is much too long for the width of a single line in a picture of nine hundred pixels"
    fig = plots.clip_objective(title=title)
    assert "\n" in fig.get_suptitle() and fig.alt.startswith(title)


def test_values_reach_the_alt_text(drawn):
    told = drawn["learning_curves"][0].alt
    assert "exact match known 0.90" in told and "marks step 3" in told
    assert drawn["learning_curves"][0].get_suptitle().startswith("From step 3")
    told = drawn["search_by_level"][0].alt
    assert "the optimum 1.00 at 0.00, 1.00 at 0.20, 0.00 at 0.95" in told and "after 1.00 at 0.00, 0.80" in told
    fig = plots.searches_vs_need([rollout(True, 1, 0), rollout(True, 1, 2), rollout(False, 2, 1), rollout(False, 2, 2)])
    assert "just right 50%, too many 25%, too few 25%" in fig.alt
    fig = plots.outcomes([1, 1, 2, 2], [1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1])
    assert "look-up questions, right, searched: 0% to 100%" in fig.alt
    assert "known questions, right, no search: 100% to 100%" in fig.alt


def test_who_is_right_shows_at_a_glance(drawn):
    fig = drawn["credit"][0]
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles[0] == "method 0: 1.00" and titles[-2:] == ["method 8: -1.00", "method 4: none"]  # the truest first
    assert [ax.texts[0].get_text() for ax in fig.axes][-2:] == ["100% wrong", "0% wrong"]
    lines = [{line.get_label(): line.get_xydata() for line in ax.lines} for ax in fig.axes]
    np.testing.assert_allclose(np.diff(lines[0]["mean credit"][:, 1]), np.diff(lines[0]["the truth"][:, 1]))
    assert (np.diff(lines[-2]["mean credit"][:, 1]) < 0).all() and not lines[-1]["mean credit"][:, 1].any()
    assert lines[0]["the truth"][:, 0] == pytest.approx([-0.2, 0.0, 0.1])
    assert "method 0 is truest: its rank correlation with the truth is 1.00" in fig.alt
    assert "method 8 -1.00, 100% wrong" in fig.alt
    many = [replace(r, truth=i / 100) for i, r in enumerate(readings())]  # of many truths, groups
    assert len(plots.credit(many, verdicts(many)).axes[0].lines[0].get_xdata()) == 7
    with pytest.raises(ValueError, match="no method to draw"):
        plots.credit([], [])


def test_labels_of_points_do_not_meet(drawn):
    fig, _ = drawn["trade_off"]
    renderer = FigureCanvasAgg(fig).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in fig.axes[0].texts]
    assert boxes and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_known_and_look_up_questions_have_one_look_in_all_figures(drawn):
    metrics = {"em_known": "of known questions", "em_lookup": "of look-up questions", "em": "of all", "f1": "F1"}
    fig = plots.curves([{"step": 1} | dict.fromkeys(metrics, 0.5)], {"Right": metrics}, title="Right")
    looks = {line.get_label(): (line.get_color(), line.get_marker()) for line in fig.axes[0].lines}
    assert looks["of known questions"] == (plots.BLUE, "o") and looks["of look-up questions"] == (plots.RED, "s")
    assert looks["of all"] == (plots.BLACK, "D") and looks["F1"] == (plots.GREEN, "^")
    labelled = [line for name in ("learning_curves", "curves") for ax in drawn[name][0].axes for line in ax.lines]
    assert {line.get_color() for line in labelled if line.get_label().startswith("known:")} == {plots.BLUE}


def test_the_pareto_front_is_what_no_point_beats():
    points = [
        {"label": str(i), "x": x, "y": y}
        for i, (x, y) in enumerate([(1.2, 0.9), (0.0, 0.5), (0.7, 0.8), (0.7, 0.9), (1.3, 0.95)])
    ]
    front = plots.trade_off(points, x="searches", y="right").axes[0].lines[0]
    assert front.get_xydata().tolist() == [[0.0, 0.5], [0.7, 0.9], [1.3, 0.95]]


def test_the_transition_is_where_the_gap_crosses_its_middle():
    for at in (20, 30, 45):
        assert abs(plots.transition_step(run(at=at)) - at) <= 2
    lost = run(at=30)[:50] + [{**row, "search_first_lookup": row["search_first_known"]} for row in run(at=30)[50:52]]
    assert plots.transition_step(lost) in range(28, 52)  # the gap is gone at the very end, not yet in the mean
    flat = [{**row, "search_first_known": 0.5, "search_first_lookup": 0.5} for row in run()]
    assert plots.transition_step(flat) is None
    assert plots.transition_step([]) is None and plots.transition_step(run()[:4]) is None


MESSY = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(-5, 5), st.just("text"))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(sorted(run()[0])[:-1]), MESSY, max_size=6), max_size=8))
def test_gaps_and_nonsense_in_metrics_leave_gaps_in_the_figure(rows):
    rows = [
        {**{k: v for k, v in row.items() if not (isinstance(v, float) and abs(v) > 1e9)}, "step": i}
        for i, row in enumerate(rows)
    ]
    assert plots.learning_curves(rows).alt


def test_missing_metrics_are_said_to_be_missing():
    entropy = {"Entropy (nats)": {"entropy": ""}}
    assert "Entropy (nats) not recorded" in plots.curves([{"step": 1}], entropy, title="Health").alt
    steps, values = plots.series(run(), "kl")
    assert steps[0] == 3 and len(values) == 58
    assert 5 not in plots.series(run(), "grad_norm")[0]


@given(st.lists(st.floats(-1e6, 1e6), max_size=40), st.integers(1, 9))
def test_smoothing_is_the_mean_of_the_neighbourhood(values, window):
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(plots.smooth(values, window), expected, atol=1e-6)


def test_questions_whose_need_nobody_knows_are_left_out_and_counted():
    fig = plots.searches_vs_need([rollout(None, 2, 2), rollout(None, 1, 0), rollout(False, 2, 2), rollout(True, 1, 1)])
    assert "Grid of 2 rollouts" in fig.alt and "just right 50%, too many 50%" in fig.alt
    assert "Rollouts left out: 2; nobody knows how many searches" in fig.alt
    assert fig.get_supxlabel().startswith("Rollouts left out: 2")
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["known: 0", "look-up: 2"]
    fig = plots.searches_vs_need([rollout(None, 2, 2)])
    assert plots.png(fig) and "Rollouts left out: 1" in fig.alt and not fig.axes[0].images


def test_a_map_without_values_is_drawn_empty():
    settings = [{"setting": {"a": 1, "b": 2}, "runs": 1, "figures": {}}]
    assert plots.png(plots.grid(settings, ["reward"], "a", "b"))


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="equal length"):
        plots.advantages_of_group([1, 2], [1])
    with pytest.raises(ValueError, match="recall@K"):
        plots.retrieval_comparison([])
    with pytest.raises(ValueError, match="one shape"):
        plots.nf4_quantisation(np.zeros((2, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no rollout has a step"):
        plots.outcomes([1], [1], [0], [math.nan])
    for draw in (plots.by_setting, plots.grid):
        with pytest.raises(ValueError, match="at least one setting"):
            draw([], {}, "a", *(["b"] if draw is plots.grid else []))
    with pytest.raises(ValueError, match="at least one point"):
        plots.trade_off([], x="a", y="b")
    with pytest.raises(ValueError, match="no trajectories"):
        plots.searches_vs_need([])


def test_the_notebook_keeps_a_png_and_its_words(drawn, capsys):
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    from IPython.core.formatters import DisplayFormatter

    fig, _ = drawn["clip_objective"]
    plots.show_figure(fig)  # no notebook here: the words
    assert fig.alt in capsys.readouterr().out
    outputs = []
    for shown in (plots.Picture(fig), plots.Words(fig)):
        data, metadata = DisplayFormatter().format(shown)
        if "image/png" in data:
            assert "text/html" not in data  # a reader that prefers HTML would lose the picture
            data["image/png"] = base64.b64encode(data["image/png"]).decode()  # as a kernel sends it
        outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata))
    cell = nbformat.v4.new_code_cell("show_figure(fig)", execution_count=1, outputs=outputs)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.validate(notebook)
    pages = [nbconvert.HTMLExporter(template_name=t).from_notebook_node(notebook)[0] for t in ("lab", "classic")]
    for page in pages:
        assert "data:image/png;base64" in page and f"</summary>{fig.alt}</details>" in page
    assert f'alt="{fig.alt}"' in pages[1]


def test_pyplot_stays_closed(drawn):
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_histograms_of_rewards_need_a_value_for_every_rollout():
    with pytest.raises(ValueError, match="every rollout"):
        plots.reward_histograms({"a": [1.0]}, [True, False])
    with pytest.raises(ValueError, match="at least one reward"):
        plots.reward_histograms({}, [True])


def test_a_constant_reward_has_no_correlation_and_none_is_told():
    fig = plots.correlations({"a": {"a": 1.0, "b": math.nan}, "b": {"a": math.nan, "b": math.nan}})
    assert "–" in {text.get_text() for text in fig.axes[0].texts}
    assert fig.alt.endswith("a with the others: none.")


def test_methods_are_drawn_side_by_side_each_with_its_seeds():
    def run(level):
        return [{"step": step, "reward": level + step / 100} for step in (3, 8, 13)]

    fig = plots.methods({"GRPO": [run(0.5), run(0.7)], "PPO": [run(0.2)]}, "reward", "reward", "GRPO", title="Who wins")
    assert "GRPO 0.73" in fig.alt and "PPO 0.33" in fig.alt  # the mean of the seeds at the last step
    assert [ax.get_title("left") for ax in fig.axes] == ["GRPO", "PPO"]
    timed = [[row | {"minutes": pace * row["step"]} for row in run(0.5)] for pace in (1, 3)]
    *_, mean, _ = plots.methods({"PPO": timed}, "reward", "reward", "PPO", title="Slow", over="minutes").axes[0].lines
    assert mean.get_xdata().tolist() == [6, 16, 26]  # of two runs, at equal steps
    seven = plots.methods({str(i): [run(0.1 * i)] for i in range(7)}, "reward", "reward", "0", title="Seven")
    assert len(seven.axes) == 7
    assert "9 not recorded" in plots.methods({"9": []}, "reward", "reward", "9", title="None").alt
