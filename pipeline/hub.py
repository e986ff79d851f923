"""The Hub: one commit a repo, bounded retries, and the local copy is never at stake."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.manifest import MANIFEST, read_json, redact_text

_ATTEMPTS = 6
_LONGEST_WAIT_S = 300.0
# What the Hub itself puts into a new repo.
_NOT_CONTENT = {".gitattributes", "README.md"}


def hub_api() -> Any:
    """Return the Hub's client; it takes its token from HF_TOKEN or the login, never from us."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="turnwise")


@dataclass(frozen=True)
class Remote:
    """A Hub repo's head: commit, and the manifest's bytes if it has one."""

    revision: str | None
    manifest: bytes | None


def look(hub_id: str) -> Remote | None:
    """Return the head of a Hub dataset repo; None when there is none.

    Raises DataError when it holds something that Turnwise didn't write.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = hub_api()
    try:
        info = api.dataset_info(hub_id)
    except RepositoryNotFoundError:
        return None
    names = {item.rfilename for item in info.siblings or []}
    if MANIFEST in names:
        path = api.hf_hub_download(hub_id, MANIFEST, repo_type="dataset", revision=info.sha)
        return Remote(info.sha, Path(path).read_bytes())
    if names - _NOT_CONTENT:
        raise DataError(
            f"the Hub repo {hub_id} holds something else (no {MANIFEST}, but "
            f"{', '.join(sorted(names - _NOT_CONTENT)[:5])}); choose another name"
        )
    return Remote(info.sha, None)


def look_before_writing(hub_id: str) -> Remote | None:
    """Look at a Hub output before any work is done; without a token there will be no push."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise DataError(
            f"the output {hub_id} is a Hub repo, and there is no token: set HF_TOKEN to one that "
            f"may write, or write to a folder (./{hub_id.split('/')[1]})"
        )
    return _bounded(
        lambda: look(hub_id), f"can't look at the Hub repo {hub_id}; nothing was written yet"
    )


def push(hub_id: str, folder: Path, *, public: bool, command: str) -> str:
    """Commit a finished folder to the Hub in one commit; return the revision.

    Nothing is sent when the Hub has this very repo already. After the last attempt DataError says
    that the local copy is complete and which command pushes it.
    """
    return _bounded(
        lambda: _push_once(hub_id, folder, public),
        f"{folder} is complete, but it couldn't be pushed to {hub_id}. Push it with the same "
        f"command again (nothing is computed anew): {command}",
    )


def _push_once(hub_id: str, folder: Path, public: bool) -> str:
    api = hub_api()
    api.create_repo(hub_id, repo_type="dataset", private=not public, exist_ok=True)
    remote = look(hub_id)
    ours = (folder / MANIFEST).read_bytes()
    if remote is not None and remote.manifest is not None:
        if remote.manifest == ours:
            return remote.revision or ""
        raise DataError(
            f"the Hub repo {hub_id} holds the output of another run; choose another name for this "
            f"one, or delete that repo. The local copy {folder} is complete"
        )
    commit = api.create_commit(
        hub_id,
        _operations(folder),
        commit_message=f"Add {hub_id.split('/')[1]}, written by Turnwise",
        repo_type="dataset",
        parent_commit=None if remote is None else remote.revision,
    )
    return str(commit.oid)


def _operations(folder: Path) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]


def _bounded(call: Any, failure: str) -> Any:
    """Call, again after 412, 429, 5xx or a broken connection; at most _ATTEMPTS times."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from tenacity import Retrying, retry_if_exception, stop_after_attempt

    retrying = Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        retry=retry_if_exception(_passes),
        wait=_wait_s,
        reraise=True,
    )
    try:
        return retrying(call)
    except (HTTPError, OfflineModeIsEnabled, json.JSONDecodeError) as error:
        raise DataError(f"{failure}\nThe Hub said: {redact_text(str(error))}") from error


def _passes(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError

    if (status := _status(error)) is not None:
        return status in (408, 412, 429) or status >= 500
    # No answer at all, or an outage's HTML page where huggingface_hub reads JSON.
    return isinstance(error, HTTPError | json.JSONDecodeError)


def _status(error: BaseException | None) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _wait_s(state: Any) -> float:
    """Return the seconds that the Hub asks for (Retry-After, RateLimit), or 1, 2, 4, ..."""
    from huggingface_hub.utils import parse_ratelimit_headers

    error = state.outcome.exception()
    headers = {} if _status(error) is None else error.response.headers
    asked = headers.get("retry-after", "")
    limit = parse_ratelimit_headers(headers)
    if asked.isdigit():
        wait = float(asked)
    elif _status(error) == 429 and limit is not None:
        wait = float(limit.reset_in_seconds + 1)
    else:
        wait = 2.0 ** (state.attempt_number - 1)
    return min(wait, _LONGEST_WAIT_S)


def download(hub_id: str, revision: str | None, copy: Path) -> tuple[Path, str | None]:
    """Return the folder and revision of a Hub repo; our own copy of it while it is the same."""
    manifest = None if revision else read_json(copy / MANIFEST)
    if manifest is not None:
        remote = _bounded(lambda: look(hub_id), f"can't look at the Hub repo {hub_id}")
        if remote is None or remote.manifest is None:
            raise DataError(
                f"{hub_id} isn't on the Hub yet; its local copy {copy} is complete. Push it "
                f"with: {manifest['command']}"
            )
        if remote.manifest == (copy / MANIFEST).read_bytes():
            return copy, remote.revision
    return snapshot(hub_id, revision)


def snapshot(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """Download a Hub dataset repo's parquet files and manifest into the Hub's own cache."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = hub_api().snapshot_download(
            hub_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=["*.parquet", MANIFEST, "README.md"],
        )
    except GatedRepoError as error:
        raise DataError(
            f"{hub_id} is gated: ask for access on its page, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{hub_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"there is no dataset repo {hub_id} on the Hub that this token may read; "
            f"write ./{hub_id} for a folder, or set HF_TOKEN for a private repo"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DataError(f"can't download {hub_id}: {redact_text(str(error))}") from error
    return Path(path), Path(path).name
