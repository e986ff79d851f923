"""Derive every random number from (run seed, prompt, sample, turn, party).

Nothing in the house touches a global generator, so a rollout's randomness doesn't depend on batch
composition, order or restarts.
"""

import hashlib

import numpy as np


def seed_for(run_seed: int, prompt_id: str, sample: int, turn: int, party: str) -> int:
    """Return the 63-bit seed of one utterance (or of one draw of a plan).

    The parts are joined with their lengths, so that no two different tuples give the same text.
    63 bits, because servers read seeds as signed 64-bit integers.
    """
    parts = (str(run_seed), prompt_id, str(sample), str(turn), party)
    text = "".join(f"{len(part)}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(
    run_seed: int, prompt_id: str, sample: int, turn: int, party: str
) -> np.random.Generator:
    """Return numpy's generator for one draw; Philox is counter-based and the same everywhere."""
    return np.random.Generator(np.random.Philox(seed_for(run_seed, prompt_id, sample, turn, party)))
