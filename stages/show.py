"""Show rows of a repo in the terminal: what trains, in colour and decoded, with its figures.

python stages/show.py ./pairs --row 7
"""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.config import run
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.glance import Glance
    from pipeline.pieces import Decoder

LEAST_WIDTH = 60


@dataclass(frozen=True)
class Config:
    """Show rows of rollouts, ranked rollouts, pairs or groups, or of published pairs."""

    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO")]
    """The repo: ./folder, or org/name on the Hub."""
    split: str = ""
    """Split of the repo; its first one unless told."""
    row: int = 0
    """Which row, counted from 0; -1 is the last one."""
    rows: int = 1
    """How many rows, from there on."""
    prompt_id: str = ""
    """Show the rows of this prompt instead of --row."""
    sample: int | None = None
    """Of that prompt, the rows of this sample only."""
    tokenizer: str = ""
    """Model folder or Hub id that decodes ids; by default the one that the repo's manifest, or
    those of its parents, name. Without any, ids are numbers."""
    max_tokens: int = 1000
    """Most ids of a text that are shown; what doesn't train loses its middle."""
    ids: bool = False
    """Show ids and their places beside the text."""
    width: int = 0
    """Columns to write; those of the terminal unless told. From 120 on, a pair is side by side."""
    color: bool = True
    """Show what trains in colour; with --no_color, NO_COLOR or output to a file, in brackets."""

    def __post_init__(self) -> None:
        problems = []
        if self.rows < 1:
            problems.append(f"--rows {self.rows}: at least 1")
        if self.max_tokens < 1:
            problems.append(f"--max_tokens {self.max_tokens}: at least 1")
        if self.width and self.width < LEAST_WIDTH:
            problems.append(f"--width {self.width}: at least {LEAST_WIDTH}")
        if self.prompt_id and self.row:
            problems.append("--row and --prompt_id both say which row: give one of them")
        if self.sample is not None and not self.prompt_id:
            problems.append("--sample is of a prompt: name it with --prompt_id")
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Find the rows, decode and print them."""
    from rich.console import Console
    from rich.rule import Rule

    from pipeline.glance import glance
    from pipeline.paint import Look, legend
    from pipeline.showing import page_of
    from pipeline.visible import in_line

    repo = glance(config.repo, config.split)
    places = _places(repo, config)
    colour = config.color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    width = config.width or shutil.get_terminal_size().columns
    decoder, said = _decoder(repo, config)
    look = Look(decoder, colour, width, config.max_tokens, config.ids)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few characters
    console = Console(width=width, no_color=not colour, highlight=False, markup=False, emoji=False)
    console.print(
        f"{in_line(repo.repo.name)}, split {in_line(repo.split)}: {repo.num_rows} rows. {said}",
        soft_wrap=True,  # a path stays in one piece, whatever its length
    )
    console.print(legend(look))
    for place in places:
        console.print(Rule(f"row {place}", align="left", style=""))
        for part in page_of(repo.row(place), look):
            console.print(part)


def _places(repo: "Glance", config: Config) -> list[int]:
    if config.prompt_id:
        return repo.places_of(config.prompt_id, config.sample)
    first = repo.place(config.row)
    return list(range(first, min(first + config.rows, repo.num_rows)))


def _decoder(repo: "Glance", config: Config) -> tuple["Decoder", str]:
    """Load the tokenizer that was named, or the first that the manifests name and that is there."""
    from pipeline.glance import tokenizer_names
    from pipeline.pieces import Numbers, load_words
    from pipeline.visible import in_line

    if config.tokenizer:
        return load_words(config.tokenizer), f"Decoded by {in_line(config.tokenizer)}."
    for name in tokenizer_names(repo.repo):
        try:
            return load_words(name), f"Decoded by {in_line(name)}."
        except DataError:
            continue  # moved or never here: the next one, or numbers
    return Numbers(), "No tokenizer is known: name one with --tokenizer to read the ids."


if __name__ == "__main__":
    run(main, Config)
