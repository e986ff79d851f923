"""Selected rows on disk: the selection sees each once, the split needs to know them all."""

from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.seeds import seed_for


class Spool:
    """Rows on disk, uncompressed, and the names of their prompts. One writer, then readers."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Begin anew, whatever an earlier run has left at this place."""
        self.path = path
        self.rows = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, schema)
        self._prompts = dict[str, None]()

    @property
    def prompts(self) -> Set[str]:
        return self._prompts.keys()

    def add(self, rows: pa.RecordBatch) -> None:
        """Append rows."""
        if rows.num_rows:
            self._writer.write_batch(rows)
            self._prompts.update(dict.fromkeys(pc.unique(rows.column("prompt_id")).to_pylist()))
            self.rows += rows.num_rows

    def close(self) -> None:
        """End writing."""
        self._writer.close()
        self._file.close()

    def read(self, prompts: Iterable[str], inside: bool) -> Iterator[pa.RecordBatch]:
        """Stream the rows of these prompts, or of all others."""
        chosen = pa.array(sorted(prompts), pa.string())
        with pa.OSFile(str(self.path), "rb") as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                held = pc.is_in(batch.column("prompt_id"), chosen)
                batch = batch.filter(held if inside else pc.invert(held))
                if batch.num_rows:
                    yield batch


def draw_test(prompts: Set[str], size: float, seed: int) -> set[str]:
    """Draw the prompts of the test split: each by its own hash, so that at least one trains.

    `size` is a fraction below 1, or a number of prompts.
    """
    wanted = int(size) if size >= 1 else round(size * len(prompts))
    order = sorted(prompts, key=lambda prompt: (seed_for(seed, prompt, 0, 0, "test"), prompt))
    return set(order[: max(min(wanted, len(prompts) - 1), 0)])
