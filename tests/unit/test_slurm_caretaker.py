"""Of the nodes of the test cluster (tests/slurm), what is stuck is restarted, and nothing else."""

from __future__ import annotations

from tests.slurm.caretaker import Caretaker


class Nodes:
    """Nodes whose states are written by hand, at a time that is."""

    def __init__(self) -> None:
        self.states = {"n1": "idle", "n2": "idle", "n6": "down*"}
        self.now_s = 0.0
        self.restarted: list[str] = []

    def look_for(self, caretaker: Caretaker, seconds: int) -> None:
        for _ in range(seconds):
            self.now_s += 1.0
            caretaker.look()


def test_a_node_that_does_not_come_free_is_reported_and_restarted() -> None:
    nodes, reports = Nodes(), list[tuple[str, str]]()
    caretaker = Caretaker(
        ["n1", "n2"],
        lambda: "".join(f"{name} {state}\n" for name, state in nodes.states.items()),
        nodes.restarted.append,
        lambda node, state: reports.append((node, state)),
        lambda: nodes.now_s,
    )
    nodes.states |= {"n1": "completing", "n2": "allocated"}
    nodes.look_for(caretaker, 10)  # as after every job
    nodes.states["n1"] = "idle"
    nodes.look_for(caretaker, 20)
    nodes.states["n1"] = "completing"
    nodes.look_for(caretaker, 20)
    assert nodes.restarted == []
    nodes.look_for(caretaker, 10)
    assert reports == [("n1", "completing")]
    assert nodes.restarted == ["n1"], "once; not the one that runs a job, nor the one cut off"
