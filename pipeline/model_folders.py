"""Write a model folder (Hugging Face files, card, manifest) that appears whole or not at all."""

import glob
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import cards
from pipeline import manifest as manifests
from pipeline.claims import Claim, claim_output, describe_job, rank
from pipeline.fingerprints import fingerprint_model
from pipeline.manifest import MANIFEST
from pipeline.repos import Repo


@dataclass
class ModelRun:
    """One stage writing one model folder."""

    claim: Claim

    @property
    def path(self) -> Path:
        """The model folder; it appears whole, at the end."""
        return self.claim.path

    @property
    def work(self) -> Path:
        """Scratch beside it (`<output_dir>.work`) that survives a kill: caches, metrics.jsonl."""
        return self.claim.work

    @property
    def finished(self) -> bool:
        """Whether the same command has written it already, so that nothing is left to do."""
        return self.claim.finished

    @property
    def date(self) -> str:
        """The ISO day of the first start; resuming keeps it."""
        return self.claim.date

    def finish(
        self,
        save: Callable[[Path], None],
        *,
        counts: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        pictures: Mapping[str, bytes] | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> Path:
        """Let `save` fill a folder, add metrics.jsonl, card and manifest, and move it into place.

        Rank 0 alone calls this. `metrics`: the last values, for the card and the manifest.
        """
        assert not self.finished, "a finished model isn't written again"
        assert rank() == 0, "only rank 0 writes"
        building = self._fresh_folder()
        save(building)
        if (self.work / "metrics.jsonl").exists():
            shutil.copyfile(self.work / "metrics.jsonl", building / "metrics.jsonl")
        # peft writes a README.md of its own; ours takes its place, and people may edit it.
        files = [p for p in sorted(building.rglob("*")) if p.is_file() and p.name != "README.md"]
        entries = [manifests.describe_file(building, path) for path in files]
        for path in files:
            manifests.sync_file(path)
        values = self.claim.manifest(
            seed=self.claim.job.identity["seed"],
            counts=manifests.as_json(counts or {}),
            metrics=manifests.as_json(metrics or {}),
            extra=manifests.redact(manifests.as_json(extra or {})),
            fingerprint=fingerprint_model(str(building)),
            content_hash=manifests.content_hash(entries),
            files=entries,
        )
        cards.write(building, values, pictures or {}, card or {})
        manifests.write_atomically(building / MANIFEST, manifests.dump(values))
        os.replace(building, self.path)
        manifests.sync_folder(self.path.parent)
        self.claim.finished = True
        self.claim.release()
        return self.path

    def _fresh_folder(self) -> Path:
        for stale in self.path.parent.glob(f"{glob.escape(self.path.name)}.tmp-*"):
            shutil.rmtree(stale)  # of a killed process: the lock is ours
        building = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        building.mkdir(parents=True)
        return building


def begin_model(
    stage: str,
    config: Any,
    output_dir: str,
    *,
    inputs: Sequence[Repo] = (),
    models: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> ModelRun:
    """Begin or resume writing a model folder; the semantics are those of `begin`."""
    path = Path(output_dir).expanduser()
    path = path if path.name else path.resolve()
    job = describe_job(stage, "model", output_dir, config, inputs, models or {}, seed)
    return ModelRun(claim_output(job, path, path.with_name(path.name + ".work"), "--output_dir"))
