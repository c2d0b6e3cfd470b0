"""How often the report's simultaneous 95 % intervals hold: `python -m benchmarks.coverage [--json]`.

Simulated grids: six comparisons with one shared control, 250 questions, three and five seeds. Answers are right or
wrong; a run's chance on a question depends on the question (the same for all runs), on the seed's run (some seeds
learn less) and on the run itself. The true difference is that of the chances' means over seeds and questions. A grid
counts as covered if all of its intervals hold. Beside it: how many single intervals hold, and how many differences
are shown (of "no difference": falsely).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import Results, table, wants_json
from stillhouse.reporting.comparisons import Comparison, compare_runs

GRIDS, COMPARISONS, QUESTIONS = 400, 6, 250


@dataclass(frozen=True)
class World:
    """What a simulated experiment varies by, in logits of a right answer."""

    name: str
    seed_sd: float  # of a run's mean over seeds
    question_sd: float  # of a question's ease, the same for all runs
    own_sd: float  # of a question's ease for one run
    gain: float  # of every run over the control


WORLDS = (
    World("seeds alike", 0.0, 1.5, 0.5, 0.5),
    World("usual", 0.2, 1.5, 0.5, 0.5),
    World("seeds apart", 0.8, 1.5, 0.5, 0.5),
    World("no difference", 0.2, 1.5, 0.0, 0.0),
)


def simulate_grids(world: World, *, num_seeds: int, num_grids: int, seed: int = 0) -> Iterator[list[Comparison]]:
    """Yields each grid's comparisons; the true difference is the same in all."""
    random = np.random.Generator(np.random.PCG64([seed, num_seeds]))
    for _ in range(num_grids):
        ease = random.normal(0, world.question_sd, QUESTIONS)
        answers = [_answer(world, ease, world.gain * (run > 0), num_seeds, random) for run in range(COMPARISONS + 1)]
        pairs = {(str(run), "control"): answers[run] - answers[0] for run in range(1, COMPARISONS + 1)}
        yield compare_runs("exact_match", pairs)


def _answer(
    world: World, ease: NDArray[np.float64], gain: float, num_seeds: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Returns (s, q) right answers, 0 or 1."""
    own = random.normal(0, world.own_sd, len(ease))
    of_seeds = random.normal(0, world.seed_sd, (num_seeds, 1))
    chance = 1 / (1 + np.exp(-(ease + own + gain + of_seeds)))
    return (random.random(chance.shape) < chance).astype(np.float64)


def compute_true_difference(world: World) -> float:
    """Returns the gain in the chance of a right answer, over all seeds and questions."""
    width = np.sqrt(world.seed_sd**2 + world.question_sd**2 + world.own_sd**2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    chances = [1 / (1 + np.exp(-(width * nodes + gain))) for gain in (0.0, world.gain)]
    control, other = (float((weights * each).sum() / weights.sum()) for each in chances)
    return other - control


def measure(world: World, num_seeds: int, num_grids: int) -> dict[str, float]:
    """Returns the shares of grids and of comparisons that the table shows."""
    covered, single, shown = 0, 0, 0
    truth = compute_true_difference(world)
    for comparisons in simulate_grids(world, num_seeds=num_seeds, num_grids=num_grids):
        held = [abs(each.difference - truth) <= (each.smallest or 0.0) for each in comparisons]
        covered += all(held)
        single += sum(held)
        shown += sum(each.shown for each in comparisons)
    count = num_grids * COMPARISONS
    return {"all_hold": covered / num_grids, "one_holds": single / count, "shown": shown / count}


def main() -> None:
    """Prints the table."""
    as_json = wants_json("How often the simultaneous intervals of the report hold.")
    results, rows = Results("coverage"), []
    for world in WORLDS:
        for num_seeds in (3, 5):
            found = measure(world, num_seeds, GRIDS)
            rows.append([world.name, num_seeds, *(f"{value:.3f}" for value in found.values())])
            for name, value in found.items():
                results.metrics[f"{world.name}_{num_seeds}_seeds_{name}".replace(" ", "_")] = value
    print(table(["differences", "seeds", "all six hold", "one holds", "shown"], rows))
    results.print(as_json=as_json)


if __name__ == "__main__":
    main()
