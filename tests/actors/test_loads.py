"""Who has the least to do: as by looking at every member, and without doing so."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.rollout.loads import Loads


@given(
    acts=st.lists(
        st.tuples(st.sampled_from(["choose", "end", "leave", "join"]), st.integers(0, 99))
    )
)
def test_the_first_of_those_with_the_fewest_calls_is_chosen(acts: list[tuple[str, int]]) -> None:
    loads = Loads(f"member-{index}" for index in range(4))
    members = [f"member-{index}" for index in range(4)]  # in the order of joining
    calls, away = dict.fromkeys(members, 0), list[str]()
    under_way: list[str] = []
    for act, number in acts:
        if act == "choose":
            name = min(members, key=calls.__getitem__)
            assert loads.least() == name
            loads.add(name, 1)
            calls[name] += 1
            under_way.append(name)
        elif act == "end" and under_way:
            name = under_way.pop(number % len(under_way))
            loads.add(name, -1)
            calls[name] -= 1
        elif act == "leave" and len(members) > 1:
            away.append(members.pop(number % len(members)))
            loads.leave(away[-1])
        elif act == "join" and away:
            members.append(away.pop(number % len(away)))
            loads.join(members[-1])
    assert loads.least() == min(members, key=calls.__getitem__)


def test_what_is_outdated_does_not_pile_up() -> None:
    loads = Loads(["one", "other"])
    for _ in range(10_000):
        name = loads.least()
        loads.add(name, 1)
        loads.add(name, -1)
    assert len(loads._heap) < 100
