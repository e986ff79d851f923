"""The parties of a dialogue: the policy and, where a model plays the user, the user model."""

import asyncio
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.dialogues import with_system_prompt
from pipeline.engines import ENGINES, IN_PROCESS, SPEAK_TEXT
from pipeline.engines.base import Engine, EngineOptions, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.environments import ENVIRONMENTS
from pipeline.environments.simulated_user import User
from pipeline.errors import DataError, RowError
from pipeline.meter import Meter, Metered
from pipeline.records import Message
from pipeline.rollout import Table, TemplateContext, TextContext


@dataclass(frozen=True)
class Party:
    """Who speaks and how. `name` is `policy` or `user`; `engine` a key of ENGINES."""

    name: str
    model: str
    engine: str
    sampling: Sampling
    options: EngineOptions
    system_prompt: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def party_of(config: Any, name: str, rounds: Rounds, log_dir: Path) -> Party:
    """Gather what the flags of stages/generate.py say of one party.

    What a flag without a prefix says of the policy, one with `user_` says of the user model.
    """

    def own(field: str) -> Any:
        return getattr(config, f"user_{field}" if name == "user" else field)

    heat = own("temperature")
    return Party(
        name=name,
        model=own("model"),
        engine=own("engine") or config.engine,
        sampling=Sampling(
            temperature=config.temperature if heat is None else heat,
            max_tokens=own("maxlen") or config.maxlen,
            top_p=own("top_p"),
            top_k=own("top_k"),
            stop=own("stop"),
        ),
        options=_options(config, name, rounds, log_dir),
        system_prompt=own("system_prompt"),
        template_kwargs=json.loads(own("template_kwargs") or "{}"),
    )


def _options(config: Any, name: str, rounds: Rounds, log_dir: Path) -> EngineOptions:
    """Gather what an engine needs to start; `policy_` and `user_` flags go by the party's name."""
    is_user = name == "user"
    return EngineOptions(
        rounds=rounds,
        dtype=config.dtype,
        device=config.device,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_rows=config.max_batch_rows,
        urls=getattr(config, f"{name}_url"),
        gpus=getattr(config, f"{name}_gpus"),
        tensor_parallel=(is_user and config.user_world_size) or config.world_size,
        max_model_len=config.user_max_model_len if is_user else config.max_model_len,
        log_dir=log_dir,
        script=config.script,
        trust_remote_code=config.trust_remote_code,
        extra_args=config.server_args + (config.user_server_args if is_user else ()),
        timeout_s=config.request_timeout,
        attempts=1 + config.retries,
        restarts=config.server_restarts,
        api_key_env=getattr(config, f"{name}_api_key_env"),
        tell=_tell,
    )


def _tell(line: str) -> None:
    """Show what happens to a server where the live line is shown, and error messages are."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Seat:
    """A party that is ready: its engine, and its chat template where ids are spoken."""

    party: Party
    engine: Engine
    chat: Any


async def seat_all(
    parties: Sequence[Party], date: str, meter: Meter, opened: AsyncExitStack
) -> list[Seat]:
    """Load each party's template and engine, which `opened` closes; servers start side by side.

    Raises DataError or EngineError as soon as one of them can't start; the others are ended.
    """
    chats = [_chat(party, date) for party in parties]
    started: list[Engine] = []
    opened.push_async_callback(_close_all, started)
    starting = [
        asyncio.ensure_future(_open(party, chat, started))
        for party, chat in zip(parties, chats, strict=True)
    ]
    try:
        engines = await asyncio.gather(*starting)
    except BaseException:
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        raise
    return [
        Seat(party, Metered(engine, party.name, meter), chat)
        for party, engine, chat in zip(parties, engines, chats, strict=True)
    ]


def _chat(party: Party, date: str) -> Any:
    """Load a party's template, and make sure that it takes the system prompt."""
    if party.engine in SPEAK_TEXT:
        return None
    from pipeline.chat_files import load_chat

    chat = load_chat(
        party.model, date, party.options.trust_remote_code, party.template_kwargs or None
    )
    if party.system_prompt:
        probe = Message(role="user", content="Hi.")
        try:
            chat.prompt(with_system_prompt([probe], party.system_prompt))
        except RowError as error:
            raise DataError(
                f"the chat template of {party.model} takes no system prompt ({error.detail}); "
                f"leave out --{'user_' * (party.name == 'user')}system_prompt"
            ) from None
    return chat


async def _close_all(engines: Sequence[Engine]) -> None:
    """Close side by side: each server has its seconds to end, and Ctrl-C is to take no longer."""
    await asyncio.gather(*(engine.close() for engine in engines))


async def _open(party: Party, chat: Any, started: list[Engine]) -> Engine:
    open_engine = import_dotted(ENGINES[party.engine])
    tokenizer = chat.tokenizer if chat else None
    if party.engine in IN_PROCESS:
        # Not in a thread: loading weights sets torch's default dtype for the whole process.
        engine: Engine = open_engine(party.model, tokenizer, party.options)
    else:
        engine = await _in_thread(open_engine, party, tokenizer)
    started.append(engine)
    return engine


async def _in_thread(open_engine: Any, party: Party, tokenizer: Any) -> Engine:
    """Wait for a server in a thread; when cancelled, tell the thread to give up."""
    try:
        return await asyncio.to_thread(open_engine, party.model, tokenizer, party.options)
    except asyncio.CancelledError:
        party.options.cancelled.set()
        raise


def import_dotted(dotted: str) -> Any:
    """Return what `module:name` names."""
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


async def open_table(
    config: Any, date: str, work: Path, meter: Meter, opened: AsyncExitStack
) -> Table:
    """Load policy and user model, which `opened` closes, and sit them down at a table.

    `config`: that of stages/generate.py. Nobody is told of finished rollouts yet.
    """
    rounds, logs = Rounds(), Path(config.output_dir) if config.output_dir else work
    parties = [party_of(config, name, rounds, logs) for name in config.parties]
    policy, *others = await seat_all(parties, date, meter, opened)
    user = None
    for seat in others:
        told = seat.party.system_prompt
        user = User(seat.engine, seat.chat, seat.party.sampling, told, config.stop_phrase)
    return Table(
        run_seed=config.seed,
        engine=policy.engine,
        chat=policy.chat,
        sampling=policy.party.sampling,
        context=TemplateContext(policy.chat) if policy.chat else TextContext(),
        environment=import_dotted(ENVIRONMENTS[config.environment])(config, user),
        rounds=rounds,
        finished=lambda rollout: None,
        least_turns=config.num_turns if config.full_dialogues else 0,
        play_last_reply=config.last_reply,
        system_prompt=policy.party.system_prompt,
    )
