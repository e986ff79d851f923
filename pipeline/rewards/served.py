"""Sequence classifiers behind vLLM's pooling servers.

A dialogue is one request to `/pooling` (task `classify`) that holds the ids of every prefix to
score; the server pools each prefix's last position. Its prefix cache is on by default for causal
classifiers and knows blocks that are computed in the same step, so that what the prefixes of a
dialogue, and the rollouts of a prompt, have in common is read once: of five prefixes of 900 ids,
2,603 together, the 1,408 in whole blocks of 128 were, with scores the same to the bit (0.32, CPU).
`token_classify` would score every position of one prompt, but a server gives it only when started
with `--pooler-config.task token_classify`, and reads no prefix cache for it, so that siblings would
share nothing: https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/pooling_params.py
Scores come as the bits of float32: JSON has no NaN, and vLLM would answer 500 to one.
"""

import asyncio
import base64
import binascii
import dataclasses
import secrets
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.engines.background import Background
from pipeline.engines.base import EngineOptions, Request, Sampling
from pipeline.engines.serving import OPENING, Line, Retry, Served
from pipeline.engines.vllm_line import find, open_line
from pipeline.engines.wire import Outage, Refusal, Wire, set_up_error
from pipeline.errors import DataError, EngineError
from pipeline.records import Rollout
from pipeline.rewards import checkpoints
from pipeline.rewards.base import Scored, Settings, policy_messages, require_finite
from pipeline.rewards.classifier import read_config
from pipeline.rewards.encoding import Encoder
from pipeline.rewards.onepass import PROBES
from pipeline.rewards.prefixes import Prefix, prefixes
from pipeline.seeds import seed_for

CHUNKS_PER_SERVER = 4
"""Chunks under way at once: more than a hundred dialogues, so that a server is never idle."""
ACTIVATION_SHOWS = 1e-3


class ServedReward:
    """A classifier behind the servers of `line`.

    `separate`: each prefix is encoded by itself, because the template rewrites; `note` says so.
    """

    reads_reply = False

    def __init__(
        self, name: str, fingerprint: str, encoder: Encoder, check: "Check", line: Line
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.parallel = CHUNKS_PER_SERVER * len(line.servers)
        self.line = line
        self.note = encoder.breaks_prefix(PROBES)
        self.separate = self.note is not None
        self._encoder = encoder
        self._check = check
        self._loop = Background()
        if self.note:
            print(f"{name}: prefixes are encoded one by one, because {self.note}", file=sys.stderr)

    def score(self, rollouts: Sequence[Rollout], turns: Sequence[Sequence[int]]) -> list[Scored]:
        """Encode, ask for all dialogues at once, and put the answers where they belong."""
        results, found = prefixes(
            self._encoder, rollouts, turns, self._check.max_length, self.separate
        )
        if found:
            for prefix, score in self._loop.run(self._ask_all(rollouts, found)):
                row, turn = prefix.row, prefix.turn
                score = require_finite(score, self.name, rollouts[row], turn)
                results[row].rewards[turn] = score
        return results

    def close(self) -> None:
        """Call off what is under way, drop the connections, and end a server that is ours."""
        self._loop.close(self.line.close())

    async def _ask_all(
        self, rollouts: Sequence[Rollout], found: Sequence[Prefix]
    ) -> list[tuple[Prefix, float]]:
        by_row: dict[int, list[Prefix]] = {}
        for prefix in found:
            by_row.setdefault(prefix.row, []).append(prefix)
        asked = [self._ask(rollouts[row], group) for row, group in by_row.items()]
        return [pair for pairs in await asyncio.gather(*asked) for pair in pairs]

    async def _ask(self, rollout: Rollout, group: Sequence[Prefix]) -> list[tuple[Prefix, float]]:
        """Return the scores of a rollout's prefixes. EngineError, with the row, without them."""
        prompt_id, sample, turn = rollout.prompt_id, rollout.sample, group[-1].turn
        seed = seed_for(0, prompt_id, sample, turn, "reward")  # spreads the pauses before retries
        request = Request(group[-1].ids, seed, Sampling(), (), (prompt_id, sample, turn))
        inputs = [prefix.ids for prefix in group]

        async def send(served: Served) -> list[float]:
            if self._check.distrusts_cache:
                return await ask_fresh(self.line.wire, served, inputs)
            return await ask(self.line.wire, served, inputs)

        try:
            return list(zip(group, await self.line.ask(request, send), strict=True))
        except EngineError as error:
            raise EngineError(
                f"{self.name} gave no score for prompt_id {prompt_id!r}, sample {sample}: {error}."
                " Run the same command again to go on"
            ) from None


async def ask(
    wire: Wire, served: Served, inputs: Sequence[Sequence[int]], **more: Any
) -> list[float]:
    """Return the raw score of each list of ids. Raises Outage, Refusal or EngineError.

    Truncation is off unless it is asked for: a prompt that is too long is a refusal.
    """
    body = {
        "model": served.name,
        "task": "classify",
        "input": inputs,
        "add_special_tokens": False,
        "use_activation": False,
        "encoding_format": "base64",
        "embed_dtype": "float32",
        "endianness": "little",
    }
    answer = await wire.post(f"{served.url}/pooling", body | more)
    return parse(answer, len(inputs))


async def ask_fresh(wire: Wire, served: Served, inputs: Sequence[Sequence[int]]) -> list[float]:
    """Return raw scores for which nothing comes from the server's cache: under a salt of its own,
    no list of ids begins like one that was there before.
    """
    salt = secrets.token_hex(8)
    scores = []
    for n, ids in enumerate(inputs):
        scores += await ask(wire, served, [ids], cache_salt=f"{salt}{n}")
    return scores


def parse(answer: Mapping[str, Any], count: int) -> list[float]:
    """Return the scores of an answer. Raises Outage for one that is none, such as a proxy's page,
    EngineError for one that doesn't hold exactly one score for each prefix.
    """
    data = answer.get("data")
    if not isinstance(data, list):
        raise Outage(f"the server answered no scores: {str(answer)[:500]}")
    scores = [_score(item, n) for n, item in enumerate(data)]
    if len(scores) != count:
        raise EngineError(f"the server answered {len(scores)} scores for {count} prefixes")
    return scores


def _score(item: Any, index: int) -> float:
    try:
        if item["index"] != index:
            raise EngineError(f"the server answered prefix {item['index']} in place of {index}")
        bits = base64.b64decode(item["data"], validate=True)
        return float(struct.unpack("<f", bits)[0])
    except (KeyError, TypeError, binascii.Error, struct.error):
        raise EngineError(
            f"the server's answer for a prefix isn't one float32, base64: {str(item)[:200]};"
            " a reward model has one label, and the server has to be vLLM's"
        ) from None


def load(
    folder: Path, name: str, fingerprint: str, settings: Settings, options: EngineOptions
) -> ServedReward:
    """Start a server for a sequence classifier, or attach to `options.urls`, which serve it.

    Of a server that runs already only the name that it gives its model can be checked. Raises
    DataError for a folder that isn't a reward model's, EngineError where a server can't be used.
    """
    config = read_config(folder)
    encoder = checkpoints.make_encoder(checkpoints.load_tokenizer(folder), settings)
    limit = checkpoints.context_limit(config, settings)
    _, dtype = checkpoints.placement(config, settings)
    if options.urls and settings.dtype == "auto":
        dtype = torch.bfloat16  # for all that we know
    check = Check(encoder, limit, checkpoints.TOLERANCE[dtype], _activates(config))
    options = dataclasses.replace(
        options,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=limit,
        extra_args=("--runner", "pooling", *options.extra_args),
    )
    line = open_line(name if options.urls else str(folder), options, check.attach)
    return ServedReward(name, fingerprint, encoder, check, line)


def _activates(config: Any) -> bool:
    """Whether vLLM has an activation for this model's scores, unless it is told to leave it.

    https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/pooler/activations.py
    """
    trained = getattr(config, "sentence_transformers", None) or {}
    named = trained.get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    return config.problem_type != "regression" and not str(named).endswith("Identity")


class Check:
    """What a server must show before it is asked for scores.

    `tolerance`: between scores with and without its cache, relative to the largest (at least 1).
    Where they differ by more, `distrusts_cache` is set, and the reason is told. `activates`:
    whether this model's config leaves the server an activation to apply.
    """

    def __init__(
        self, encoder: Encoder, max_length: int, tolerance: float, activates: bool
    ) -> None:
        self.max_length = max_length
        self.distrusts_cache = False
        self._tolerance = tolerance
        self._activates = activates
        asked = [range(len(policy_messages(probe))) for probe in PROBES]
        _, found = prefixes(encoder, PROBES, asked, sys.maxsize, separate=True)
        self._probes = [prefix.ids[:max_length] for prefix in found]

    async def attach(self, wire: Wire, url: str, model: str, retry: Retry = OPENING) -> Served:
        """Return how to address `model` at `url`. Raises EngineError where nothing answers, another
        model is served, or its scores can't be used; DataError where its context is too short.
        """
        try:
            served = await find(wire, url, model, retry)
            self._require_room(served)
            await self._probe(wire, served, retry)
        except Refusal as refusal:
            raise _explained(refusal, url, model, wire.key_env) from None
        return served

    def _require_room(self, served: Served) -> None:
        """Make sure that what is too long doesn't depend on the server."""
        if served.max_context < self.max_length:
            raise DataError(
                f"{served.url} reads at most {served.max_context} ids, not the {self.max_length}"
                f" that may be scored: give --max_length {served.max_context}, or start it with"
                f" `--max-model-len {self.max_length}`"
            )

    async def _probe(self, wire: Wire, served: Served, retry: Retry) -> None:
        """Compare scores from the cache with fresh ones, and raw ones with activated ones."""
        probes = self._probes
        together = await retry.opening(lambda: ask(wire, served, probes))
        fresh = await retry.opening(lambda: ask_fresh(wire, served, probes))
        active = await retry.opening(lambda: ask(wire, served, probes, use_activation=True))
        worst = _apart(together, fresh)
        if not worst <= self._tolerance * max(1.0, *map(abs, fresh)):
            self.distrusts_cache = True
            note = f"{served.url}: no score is taken from its cache, because those of probes"
            print(f"{note} differ by up to {worst:.2g} from fresh ones", file=sys.stderr)
        if self._activates and _apart(together, active) < ACTIVATION_SHOWS:
            raise EngineError(
                f"{served.url} gives the same scores with and without an activation, so that they"
                " are no raw ones; `use_activation` needs a newer vLLM"
            )


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _explained(refusal: Refusal, url: str, model: str, key_env: str) -> EngineError:
    if refusal.status == 404 and "/pooling" in str(refusal):
        return EngineError(f"{url} has no /pooling: start it with `--runner pooling`")
    return set_up_error(refusal, model, key_env) or EngineError(str(refusal))
