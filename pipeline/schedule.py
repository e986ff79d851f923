"""Which examples train at which update, and at which learning rate: pure functions.

Neither depends on the number of processes, nor on how an update is cut into micro-batches.
"""

import math

import numpy as np
import numpy.typing as npt

from pipeline.seeds import generator_for


def lr_at(update: int, updates: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of update 1..updates: linear warm-up, then a cosine towards 0.

    Neither end is 0, unlike the seed's schedule, whose first update changes nothing. Of 10 updates
    with warmup_ratio 0.2 the first three rates are 1/3, 2/3 and 1 of the peak.
    """
    warmup = int(updates * warmup_ratio)
    if update <= warmup:
        return peak * update / (warmup + 1)
    progress = (update - 1 - warmup) / (updates - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def plan_updates(
    examples: int, batch_size: int, total: int, run_seed: int
) -> list[npt.NDArray[np.int64]]:
    """Return the indices of each update's examples: epochs of seeded permutations, `total` in all.

    An epoch's last batch holds what is left of it, so no example is dropped or seen twice in one
    epoch, and no update holds an example twice. The last epoch stops after `total` examples.
    """
    updates: list[npt.NDArray[np.int64]] = []
    epoch = 0
    while total > 0 and examples > 0:
        order = generator_for(run_seed, "epoch", 0, epoch, "schedule").permutation(examples)
        order = order[: min(total, examples)]
        updates += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        total -= len(order)
        epoch += 1
    return updates
