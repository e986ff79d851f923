"""Recipes: commands in order, placeholders filled, mistakes named."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def iterate():
    import importlib.util

    spec = importlib.util.spec_from_file_location("iterate", ROOT / "stages" / "iterate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["iterate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recipe(**changes) -> dict:
    values = {
        "folder": "./runs/x",
        "iterations": 2,
        "policy": "{folder}/policy_{t}",
        "open": {"init_model": {"output_dir": "{folder}/policy_0"}},
        "each": {
            "generate": {"model": "{policy}", "seed": "{t}", "full_dialogues": True},
            "train": {
                "stage": "refuel",
                "launcher": "torchrun --nproc_per_node 2",
                "base_model": "{policy}",
                "output_dir": "{next}",
            },
        },
        "close": {"evaluate": {"input_repo": "{folder}/eval_{all}", "names": ["a b", "c"]}},
    }
    return values | changes


def test_commands_in_order_with_placeholders_filled(iterate):
    told = [" ".join(command) for _, command in iterate.commands(recipe(), "./runs/y", 2)]
    train = "torchrun --nproc_per_node 2 stages/refuel.py"
    assert told == [
        "python stages/init_model.py --output_dir ./runs/y/policy_0",
        "python stages/generate.py --model ./runs/y/policy_0 --seed 1 --full_dialogues",
        f"{train} --base_model ./runs/y/policy_0 --output_dir ./runs/y/policy_1",
        "python stages/generate.py --model ./runs/y/policy_1 --seed 2 --full_dialogues",
        f"{train} --base_model ./runs/y/policy_1 --output_dir ./runs/y/policy_2",
        "python stages/evaluate.py --input_repo ./runs/y/eval_0 ./runs/y/eval_1 ./runs/y/eval_2"
        " --names a b c",
    ]


def test_every_problem_of_a_recipe_is_named(iterate, tmp_path):
    path = tmp_path / "r.yaml"
    wrong = recipe(iteration=3, each={"genrate": {}})
    del wrong["close"]
    path.write_text(yaml.safe_dump(wrong))
    with pytest.raises(DataError) as told:
        iterate.load_recipe(path)
    for problem in ("close is missing", "iteration is unknown", "there is no stage genrate"):
        assert problem in str(told.value)
    with pytest.raises(DataError, match=r"demo\.yaml"):
        iterate.load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_only_use_flags_that_exist(iterate, path):
    """Each command of each recipe is parsed by the stage's own Config."""
    import importlib.util

    from pipeline.config import parse

    shipped = iterate.load_recipe(path)
    for _, command in iterate.commands(shipped, shipped["folder"], 2):
        script = next(n for n, part in enumerate(command) if part.startswith("stages/"))
        name = Path(command[script]).stem
        spec = importlib.util.spec_from_file_location(name, ROOT / command[script])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        parse(module.Config, command[script + 1 :])


def test_a_failing_command_stops_the_run_and_says_how_to_go_on(tmp_path):
    path = tmp_path / "r.yaml"
    # Unknown flags fail at once and start nothing.
    path.write_text(yaml.safe_dump(recipe(open={"evaluate": {"nonsense": 1}})))
    command = [sys.executable, str(ROOT / "stages" / "iterate.py"), str(path)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert failed.returncode == 2
    assert "$ python stages/evaluate.py --nonsense 1" in failed.stdout
    assert "mend it and run" in failed.stderr
    assert failed.stdout.count("$ ") == 1
