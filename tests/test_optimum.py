"""The optimum against exhaustive enumeration, against simulation, and the boundaries against published figures."""

import random
from itertools import permutations, product
from statistics import fmean, stdev

import pytest

from searchr1_lib.training.grpo import group_advantages
from searchr1_lib.worlds.optimum import RECALL, TRUST, UNKNOWN, WORDINGS, Notes, Optimum, Skill, State, boundary

SKILL = Skill(found=(0.9, 0.5), again=(0.6, 0.8), read=0.95)
NOTES = Notes(found=0.4, price=0.02)


def best_of_all_policies(o: Optimum) -> float:
    """The value of the best of all plans for one hop: an order of ways to try, and what to do when they fail."""
    (level,) = o.levels
    values = []
    orders = [order for n in range(len(o.ways) + 1) for order in permutations(o.ways, n)]
    for tries, last in product(orders, (TRUST, UNKNOWN)):
        value, reached, kept, failed = 0.0, 1.0, 1.0, False
        worth = lambda right, kept: (right + (1 - right) * o.guess) * kept
        for way in tries:
            if way == RECALL:
                found, price = o.notes.found, o.notes.price
            else:
                found, price = (o.skill.again if failed else o.skill.found)[WORDINGS.index(way)], o.price
                failed = True
            kept *= 1 - price
            value += reached * found * max(worth(o.skill.read, kept), o.unknown)
            reached *= 1 - found
        values.append(value + reached * (max(worth(level, kept), o.unknown) if last == TRUST else o.unknown))
    return max(values)


@pytest.mark.parametrize("level", [0.0, 0.2, 0.55, 0.7, 0.95])
@pytest.mark.parametrize("price, unknown, guess", [(0.05, 0.0, 0.0), (0.3, 0.1, 0.0), (0.7, 0.1, 0.5), (0.3, 0.6, 0.0)])
@pytest.mark.parametrize("notes", [None, NOTES, Notes(found=0.9, price=0.3)])
def test_one_hop_is_the_best_of_all_plans(level, price, unknown, guess, notes):
    o = Optimum((level,), price, SKILL, unknown=unknown, guess=guess, notes=notes)
    assert o.value == pytest.approx(best_of_all_policies(o), abs=1e-12)


def simulate(o: Optimum, choose, rng: random.Random) -> tuple[float, float]:
    """The reward of an episode, and its choice regret: the sum over its decisions of V* - Q* of what was chosen."""
    state, regret, right = State(), 0.0, True
    while True:
        level = None  # behind the last hop
        if state.hop < len(o.levels):
            spread = o.levels[state.hop]
            chances, levels = zip(*spread) if isinstance(spread, tuple) else ((1.0,), (spread,))
            level = rng.choices(levels, chances)[0]
        act = None
        while act != TRUST:
            values = o.act_values(state, level)
            act = choose(values)
            regret += max(values.values()) - values[act]
            if act == UNKNOWN:
                return o.unknown, regret
            if act == TRUST and level is None:
                right = right or rng.random() < o.guess
                return right * (1 - o.price) ** state.searches * (1 - NOTES.price) ** state.recalls, regret
            if act == TRUST:
                right = right and rng.random() < level
                state = state.trusted(level)
            else:
                number = o.ways.index(act)
                chances_here = (o.skill.again if {0, 1} & {*state.tried} else o.skill.found) + (NOTES.found,)
                found, failed = o.after_search(state, number)
                if rng.random() < chances_here[number]:
                    state, right, act = found, right and rng.random() < o.skill.read, TRUST
                else:
                    state = failed


@pytest.mark.parametrize("notes", [None, NOTES])
@pytest.mark.parametrize("levels", [(0.55,), (0.0, 0.85), (0.4, ((0.5, 0.0), (0.5, 0.95))), (0.7, 0.2, 0.95)])
def test_what_the_optimum_promises_is_earned(levels, notes):
    o, rng = Optimum(levels, 0.15, SKILL, unknown=0.05, notes=notes), random.Random(0)
    best = [simulate(o, lambda values: max(values, key=values.get), rng) for _ in range(20_000)]
    rewards = [reward for reward, _ in best]
    assert fmean(rewards) == pytest.approx(o.value, abs=4 * stdev(rewards) / len(rewards) ** 0.5)
    assert max(regret for _, regret in best) == 0
    blind = [simulate(o, lambda values: rng.choice(list(values)), rng) for _ in range(20_000)]
    lost = [o.value - reward - regret for reward, regret in blind]  # choice regret is what chance does not explain
    assert fmean(lost) == pytest.approx(0, abs=4 * stdev(lost) / len(lost) ** 0.5)


def test_an_act_is_open_while_it_can_be_done():
    o = Optimum((0.5,), 0.1, SKILL, max_searches=1)
    assert list(o.act_values()) == [TRUST, *WORDINGS, UNKNOWN]
    _, failed = o.after_search(State(), 0)
    assert list(o.act_values(failed)) == [TRUST, UNKNOWN]


@pytest.mark.parametrize(
    "wrong", [{"price": 1.5}, {"price": float("nan")}, {"levels": (1.2,)}, {"unknown": -1}, {"notes": Notes(2.0, 0.1)}]
)
def test_what_is_no_chance_is_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be between 0 and 1"):
        Optimum(**{"levels": (0.5,), "price": 0.1, "skill": SKILL} | wrong)


@pytest.mark.parametrize(
    "price, size, expected",
    [(0.05, 8, (0.494, 0.516, 0.536)), (0.15, 64, (0.519, 0.586, 0.689)), (0.5, 8, (0.489, 0.493, 0.491))],
)
def test_dividing_by_the_groups_spread_moves_the_boundary(price, size, expected):
    advantages = lambda rewards, size: group_advantages(rewards, size)
    at = [boundary(advantages, price=price, read=0.95, num_generations=size, share=s) for s in (0.1, 0.5, 0.9)]
    assert at == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("price", [0.05, 0.15, 0.5])
def test_the_mean_alone_pushes_to_the_right_boundary(price):
    mean_only = lambda rewards, size: group_advantages(rewards, size, scale_rewards="none")
    assert boundary(mean_only, price=price, read=0.95, share=0.3) == pytest.approx(0.95 * (1 - price), abs=1e-6)
