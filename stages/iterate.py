"""Run a recipe: its opening commands once, its iteration K times, its closing commands once.

python stages/iterate.py recipes/demo.yaml

Each command is a stage that a user could type, and is printed before it runs. A stage whose output
is there already verifies it and returns, so the same command goes on wherever the last one stopped.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.config import execution, run
from pipeline.errors import DataError

STAGES = Path(__file__).parent
_KEYS = {"folder", "iterations", "policy", "open", "each", "close"}
_OPTIONAL = {"base_policy"}


@dataclass(frozen=True)
class Config:
    """Run every command of a recipe, iteration after iteration."""

    recipe: Annotated[str, tyro.conf.Positional]
    """A YAML file: folder, iterations, policy, base_policy, and the sections open, each, close."""
    folder: str = execution("")
    """Where everything is written; the recipe's own folder when empty."""
    iterations: int = execution(0)
    """How many iterations to run; the recipe's own number when 0."""


def main(config: Config) -> None:
    """Run the recipe's commands in order and stop at the first that fails."""
    recipe = load_recipe(Path(config.recipe))
    folder = config.folder or recipe["folder"]
    iterations = config.iterations or recipe["iterations"]
    started = time.monotonic()
    for title, command in commands(recipe, folder, iterations):
        print(f"\n[{time.monotonic() - started:5.0f} s] {title}", flush=True)
        print(f"$ {shlex.join(command)}", flush=True)
        code = subprocess.run(_executable(command), check=False).returncode
        if code:
            print(f"error: that command ended with {code}; mend it and run", file=sys.stderr)
            print(f"  {shlex.join(['python', *sys.argv])}", file=sys.stderr)
            raise SystemExit(code)
    print(f"\ndone in {time.monotonic() - started:.0f} s", flush=True)


def load_recipe(path: Path) -> dict[str, Any]:
    """Read and check a recipe. Raises DataError naming every problem."""
    import yaml

    if not path.is_file():
        raise DataError(f"no recipe {path}; there are {', '.join(_recipes())}")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise DataError(f"{path}: a recipe is a mapping of {', '.join(sorted(_KEYS))}")
    problems = [f"{key} is missing" for key in sorted(_KEYS - recipe.keys())]
    problems += [f"{key} is unknown" for key in sorted(recipe.keys() - _KEYS - _OPTIONAL)]
    for part in ("open", "each", "close"):
        for name, section in (recipe.get(part) or {}).items():
            stage = section.get("stage", name)
            if not (STAGES / f"{stage}.py").is_file():
                problems.append(f"{part}.{name}: there is no stage {stage}")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    return recipe


def _recipes() -> list[str]:
    return sorted(str(path) for path in (STAGES.parent / "recipes").glob("*.yaml"))


def commands(
    recipe: Mapping[str, Any], folder: str, iterations: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield (title, command) for each command of the run, placeholders filled.

    {folder}; {t}: the iteration, 0 before the first; {policy}: the policy that iteration t starts
    from; {next}: the one it makes; {all} repeats a value for t = 0..K.
    """
    names: dict[str, Any] = {"folder": folder}
    for part, rounds in [
        ("open", [0]),
        ("each", range(1, iterations + 1)),
        ("close", [iterations]),
    ]:
        for t in rounds:
            names["t"] = t
            names["policy"] = _policy(recipe, folder, max(t - 1, 0))
            names["next"] = _policy(recipe, folder, t)
            for name, section in (recipe[part] or {}).items():
                title = f"iteration {t}/{iterations}: {name}" if part == "each" else name
                yield title, _command(name, section, names, iterations)


def _policy(recipe: Mapping[str, Any], folder: str, t: int) -> str:
    """Return the policy after iteration t: a folder, or the model that the recipe starts from."""
    if t == 0 and "base_policy" in recipe:
        return str(recipe["base_policy"])
    return str(recipe["policy"].format(folder=folder, t=t))


def _command(
    name: str, section: Mapping[str, Any], names: Mapping[str, Any], iterations: int
) -> list[str]:
    launcher = shlex.split(section.get("launcher", "python"))
    command = [*launcher, f"stages/{section.get('stage', name)}.py"]
    for flag, value in section.items():
        if flag in ("stage", "launcher"):
            continue
        if value is True:
            command.append(f"--{flag}")
            continue
        command.append(f"--{flag}")
        for item in value if isinstance(value, list) else [value]:
            command += _filled(str(item), names, iterations)
    return command


def _filled(value: str, names: Mapping[str, Any], iterations: int) -> list[str]:
    if "{all}" in value:
        return [value.format(**names, all=t) for t in range(iterations + 1)]
    return [value.format(**names)]


def _executable(command: list[str]) -> list[str]:
    """Run with this Python whatever `python` is on the path, from any folder."""
    here = Path(sys.executable)
    launcher = str(here if command[0] == "python" else here.parent / command[0])
    root = STAGES.parent
    ours = ("stages/", "accelerate_cfgs/")
    rest = [str(root / part) if part.startswith(ours) else part for part in command[1:]]
    return [launcher, *rest]


if __name__ == "__main__":
    run(main, Config)
