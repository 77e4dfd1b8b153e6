import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from deme_core.errors import InputError, RecipeError
from deme_core.recipe import DatasetSpec
from deme_core.recipe_file import (
    RECIPES_FOLDER,
    differing_settings,
    dump_recipe,
    find_recipe,
    flatten,
    load_recipe,
    recipe_names,
    spell_out_recipe,
)
from deme_core.recipe_reference import recipe_sections
from flows.cli import show_recipe

# What no message may repeat.
SECRET_ADDRESSES = [
    "https://user:hush@host/a.yaml",
    "https://bucket.s3.amazonaws.com/a.yaml?X-Amz-Signature=hush",
    "s3://KEY:hush@bucket/a.yaml",
]
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "pretrained": {"source": "pretrain", "training": {"num_steps": 5}},
    "dataset": {"source": "digits"},
    "segments": {"count": 2},
    "finetune": {"num_steps": 10},
    "merge": {"weights": [0.5, 0.25]},
    "evaluate": {"num_images": 100},
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A minimal recipe that overrides spoil."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return str(path)


def message(name_or_path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_with_deme_loads_and_opens_with_its_command(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    command, _, summary, *_ = find_recipe(name).read_text().splitlines()
    assert command == f"# deme run {name}"
    assert summary.endswith(".")  # `deme recipes list` prints this line.


def test_deme_comes_with_recipes() -> None:
    assert "digits" in recipe_names()
    assert [f"{name}.yaml" for name in recipe_names()] == sorted(p.name for p in RECIPES_FOLDER.glob("*.y*ml"))


@pytest.mark.parametrize("name", recipe_names())
def test_a_written_recipe_reads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["finetune.learning_rate=3.3e-7", "evaluate.seeds=[7, 8, 9]"])
    (tmp_path / "written.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "written.yaml")) == recipe
    assert dump_recipe(load_recipe(str(tmp_path / "written.yaml"))) == dump_recipe(recipe)


def test_a_written_recipe_spells_out_every_default(file: str) -> None:
    written = yaml.safe_load(dump_recipe(load_recipe(file)))
    assert written["finetune"]["learning_rate"] == 5e-5
    assert written["evaluate"]["seeds"] == [1, 2, 3]
    assert written["merge"]["search"] is None


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_is_spelled_out_has_every_key_and_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    overrides = ["finetune.channel_projection=false", "finetune.lora.rank=2", "distill.num_steps=1"]
    recipe = load_recipe(name, overrides)
    text = spell_out_recipe(recipe)
    (tmp_path / "written.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "written.yaml")) == recipe
    assert dump_recipe(load_recipe(str(tmp_path / "written.yaml"))) == dump_recipe(recipe)
    for model, path in recipe_sections().items():
        section = yaml.safe_load(text)
        for part in path.split(".") if path else ():
            section = section and section[part]  # A section that is not set is null.
        assert section is None or list(section) == list(model.model_fields), path


def test_the_command_that_shows_a_recipe_spells_it_out(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_recipe(file, ["finetune.num_steps=7"])
    assert capsys.readouterr().out == spell_out_recipe(load_recipe(file, ["finetune.num_steps=7"]))


def test_what_is_spelled_out_beyond_a_written_recipe_are_defaults(file: str) -> None:
    recipe = load_recipe(file)
    written, spelled = (flatten(yaml.safe_load(text)) for text in (dump_recipe(recipe), spell_out_recipe(recipe)))
    assert {name: spelled[name] for name in written} == written
    more = {name: spelled[name] for name in spelled if name not in written}
    assert more["finetune.optimizer"] == "adamw"
    assert more["evaluate.guidance_scale"] == 1.0
    assert more["evaluate.reference_dataset"] is None


def test_a_recipe_file_is_found_from_anywhere(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny.yaml") == load_recipe(file)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("~/tiny.yaml") == load_recipe(file)


def test_a_file_uri_may_have_spaces(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "my récipe.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(CONTENT))
    assert load_recipe(path.as_uri()) == load_recipe(str(path))


@pytest.mark.parametrize("uri", SECRET_ADDRESSES)
def test_an_address_that_is_no_stores_is_not_repeated(uri: str) -> None:
    assert message(uri) == "There is no recipe at such an address; give s3://BUCKET/KEY or file:///PATH."


@pytest.mark.parametrize("uri", SECRET_ADDRESSES)
@pytest.mark.parametrize(
    "key",
    [
        "pretrained.source",
        "dataset.path",
        "evaluate.prompts",
        "evaluate.reference_dataset.path",
        "execution.ray_address",
        "pretrained.unet.a.b",
        "evaluate.sampler",
        "finetune.num_steps",
        "finetune",
    ],
)
def test_a_password_in_a_recipe_is_refused_and_not_repeated(file: str, key: str, uri: str) -> None:
    overrides = ["evaluate.reference_dataset.source=digits"] if "reference" in key else []
    assert "hush" not in message(file, *overrides, f"{key}={uri}")


@pytest.mark.parametrize("path", ["s3://bucket/a@b/c?d", "file:///data/a@b?c", "a@b?c", "hf://datasets/me/it@main"])
def test_an_address_without_a_password_is_taken(file: str, path: str) -> None:
    overrides = ["dataset.source=imagefolder", "dataset.resolution=8", f"dataset.path={path}"]
    assert load_recipe(file, overrides).dataset.path == path


@pytest.mark.parametrize("uri", ["s3://AKIA:hu/sh+x@bucket/a", "https://u:hu/sh@host/a"])
def test_a_password_with_a_slash_is_refused_too(file: str, uri: str) -> None:
    told = message(file, "dataset.source=imagefolder", "dataset.resolution=8", f"dataset.path={uri}")
    assert "an address with a password" in told and "hu/sh" not in told


def test_a_sentence_with_an_address_in_it_is_no_password(file: str) -> None:
    text = "see http://a.b, mail c@d"
    overrides = [
        "dataset.source=imagefolder",
        "dataset.resolution=8",
        "dataset.path=x",
        f'dataset.caption_template="{text}"',
    ]
    assert load_recipe(file, overrides).dataset.caption_template == text


def test_an_error_of_a_spec_alone_does_not_repeat_a_password() -> None:
    with pytest.raises(ValueError, match="path is an address") as caught:
        DatasetSpec.model_validate({"source": "imagefolder", "path": "https://u:hush@h", "resolution": 8})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["a" * 300, "folder/" * 1000 + "a", "~nosuchuser/a"])
def test_a_recipe_of_a_name_that_no_file_can_have_is_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match="Cannot look for"):
        load_recipe(f"{name}.yaml")


def test_a_data_set_of_a_name_that_no_file_can_have_is_one_sentence(file: str) -> None:
    overrides = ["dataset.source=imagefolder", "dataset.resolution=8", f"dataset.path=/data/{'a' * 300}"]
    assert message(file, *overrides) == (
        "tiny.yaml: dataset: path has a name of more than 255 bytes, which no file can have."
    )


@pytest.mark.parametrize("value", ['"a\\0b"', '"\\ud800"'])
def test_a_text_that_no_file_has_as_its_name_is_refused(file: str, value: str) -> None:
    for key in ("pretrained.source", "pretrained.unet.a.b", "evaluate.prompts"):
        assert message(file, f"{key}={value}").startswith("tiny.yaml: ")


DEEP = ".a" * 3000


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("k=!!int ''", "The value of --set pretrained.unet.k is not valid YAML: a value is not what its !!tag says."),
        ("k=!!bool zz", "is not valid YAML: a value is not what its !!tag says."),
        ("k=!!timestamp zz", "is not valid YAML: a value is not what its !!tag says."),
        ("k={a: 1, b: 2, a: 3}", "is not valid YAML: found the key 'a' a second time"),
        ("k=" + "{a: " * 3000 + "1" + "}" * 3000, "is not valid YAML: it is nested too deeply."),
        (f"k{DEEP}=1", "tiny.yaml: pretrained.unet is nested too deeply, or holds itself."),
        ("k=&a [*a]", "tiny.yaml: pretrained.unet is nested too deeply, or holds itself."),
        ("k=!!binary /w==", "tiny.yaml: pretrained.unet.k: input was not a valid JSON value"),
        ("k=2020-01-01", "tiny.yaml: pretrained.unet.k: input was not a valid JSON value"),
        ("k=!!set {a}", "tiny.yaml: pretrained.unet.k: input was not a valid JSON value"),
        ("k=.nan", "input should be a finite number (got nan)."),
    ],
)
def test_a_value_that_no_config_can_hold_is_one_sentence(file: str, override: str, sentence: str) -> None:
    assert sentence in message(file, f"pretrained.unet.{override}")


@pytest.mark.parametrize(
    "text", ["name: a\nname: b\n", "name: a\n'name': b\n", "merge: {weights: [1], weights: [2]}\n"]
)
def test_a_key_that_comes_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    assert "a second time" in message(str(tmp_path / "twice.yaml"))


def test_a_mapping_may_change_what_it_merges(tmp_path: Path) -> None:
    changed = {**CONTENT, "finetune": None}
    training = "x: &base {num_steps: 5, seed: 1}\nfinetune: &next {<<: *base, seed: 2}\ny: {<<: *next, seed: 3}\n"
    del changed["finetune"]
    (tmp_path / "merged.yaml").write_text(yaml.safe_dump(changed) + training)
    answer = message(str(tmp_path / "merged.yaml"))
    assert answer.startswith("merged.yaml: x is no recipe key") and "; y is no recipe key" in answer


def test_levels_that_are_no_list_are_told_where_the_model_is_built(file: str) -> None:
    overrides = ["merge.method=block_weights", "merge.weights=[0.1, 0.2]"]
    recipe = load_recipe(file, [*overrides, "pretrained.unet.block_out_channels=5"])
    assert recipe.pretrained.num_blocks == load_recipe(file, overrides).pretrained.num_blocks


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    assert message("digit") == (
        f"There is no recipe 'digit'; there are {', '.join(recipe_names())}, or give a .yaml file."
    )
    assert message("./digit.yaml") == "There is no recipe file ./digit.yaml."
    assert message("digits.yml") == "There is no recipe file digits.yml."


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("finetune.num_stepz=5", "tiny.yaml: finetune.num_stepz is no recipe key (did you mean num_steps?)."),
        ("finetun.num_steps=5", "tiny.yaml: finetun is no recipe key (did you mean finetune?)."),
        (
            "merge.qqq=5",
            "tiny.yaml: merge.qqq is no recipe key (known there are density, drop_rate, method, on_bad_expert, "
            "regmean, search, seed, weights).",
        ),
        (
            "pretrained.training.lerning_rate=1e-3",
            "tiny.yaml: pretrained.training.lerning_rate is no recipe key (did you mean learning_rate?).",
        ),
        ("finetune.num_steps=null", "tiny.yaml: finetune.num_steps: input should be a valid integer (got None)."),
        ("finetune.num_steps=0", "finetune.num_steps: input should be greater than or equal to 1 (got 0)."),
        (
            "finetune.global_sampling_probability=1.5",
            "finetune.global_sampling_probability: input should be less than or equal to 1 (got 1.5).",
        ),
        (
            "finetune.global_sampling_probability=-0.1",
            "finetune.global_sampling_probability: input should be greater than or equal to 0 (got -0.1).",
        ),
        ("merge.weights=[1, 2, 3]", "tiny.yaml: merge.weights has 3 values for 2 segments."),
        ("merge.weights=[0.5, .nan]", "tiny.yaml: merge.weights.1: input should be a finite number (got nan)."),
        ("segments.edges=[0, 1000]", "tiny.yaml: segments: give either count or edges."),
        ("segments={edges: [0, 5, 3]}", "segments: edges [0, 5, 3] must increase strictly."),
        ("segments={edges: [1, 5]}", "segments: edges [1, 5] must start at 0 and end at num_train_timesteps."),
        ("segments={edges: [0]}", "segments: edges [0] must start at 0 and end at num_train_timesteps."),
        ("segments.count=0", "segments.count: input should be greater than or equal to 1 (got 0)."),
        ("evaluate.seeds=[1, 2]", "evaluate.seeds: tuple should have at least 3 items"),
        ("evaluate.seeds=[1, 2, 2]", "evaluate: seeds must differ from one another."),
        (
            "merge={search: {seeds: [3]}}",
            "tiny.yaml: merge.search.seeds and evaluate.seeds share [3]: a search must not see the report.",
        ),
        (
            "evaluate.sampler=euler",
            "evaluate.sampler: input should be 'ddim', 'ddpm' or 'flow_match_euler' (got 'euler').",
        ),
        ("dataset.source=imagefolder", "dataset: source 'imagefolder' needs a path."),
        (
            "name=my toy",
            "tiny.yaml: name: must be of letters a to z and A to Z, digits, '.', '_' and '-', and begin with a letter "
            "or digit (got 'my toy').",
        ),
        ("finetune=5", "tiny.yaml: finetune: input should be a valid dictionary or instance of FinetuneSpec (got 5)."),
    ],
)
def test_a_wrong_setting_is_answered_with_a_sentence(file: str, override: str, expected: str) -> None:
    answer = message(file, override)
    assert expected in answer
    assert answer.endswith(".")


def test_several_problems_are_told_at_once(file: str) -> None:
    answer = message(file, "finetune.num_stepz=5", "finetune.batch_size=0").removeprefix("tiny.yaml: ").rstrip(".")
    assert set(answer.split("; ")) == {
        "finetune.num_stepz is no recipe key (did you mean num_steps?)",
        "finetune.batch_size: input should be greater than or equal to 1 (got 0)",
    }


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({k: v for k, v in CONTENT.items() if k != "merge"}))
    assert message(str(tmp_path / "part.yaml")) == "part.yaml: merge is missing."


@pytest.mark.parametrize("override", ["finetune.num_steps", "=5", "num_steps", "two\nlines"])
def test_an_override_of_another_form_is_refused(file: str, override: str) -> None:
    assert message(file, override) == f"The override {override!r} is not of the form key.subkey=value."


def test_an_override_goes_below_no_value(file: str) -> None:
    assert message(file, "name.first=5") == "The override 'name.first=5' goes below name, which is a plain value."


def test_the_value_of_an_override_is_yaml(file: str) -> None:
    assert message(file, "finetune.num_steps=[1").startswith("The value of --set finetune.num_steps is not valid YAML")
    recipe = load_recipe(
        file,
        [
            "finetune.learning_rate=5e-4",
            "finetune.channel_projection=false",
            "merge.weights=[0.1, 0.2]",
            "dataset.path=a=b",
            "evaluate.timestep_spacing=null",
        ],
    )
    assert recipe.finetune.learning_rate == 5e-4
    assert recipe.finetune.channel_projection is False
    assert recipe.merge.weights == (0.1, 0.2)
    assert recipe.dataset.path == "a=b"
    assert recipe.evaluate.timestep_spacing is None


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "+1e-4", "1.e-4", ".1e-3", "0.0001"])
def test_a_number_with_an_exponent_is_a_number(file: str, written: str) -> None:
    found = load_recipe(file, [f"pretrained.unet.norm_eps={written}", "pretrained.unet.norm=e-4"]).pretrained.unet
    assert found == {"norm_eps": 1e-4, "norm": "e-4"}


def test_overrides_reach_parts_the_file_leaves_out_and_the_last_one_counts(file: str) -> None:
    recipe = load_recipe(file, ["execution.num_workers=2", "pretrained.training.seed=4", "execution.num_workers=3"])
    assert recipe.execution.num_workers == 3
    assert recipe.pretrained.training is not None
    assert recipe.pretrained.training.seed == 4


def test_an_override_fills_an_explicit_null(file: str) -> None:
    recipe = load_recipe(file, ["merge.weights=null", "merge.search=null", "merge.search.max_candidates=3"])
    assert recipe.merge.search is not None
    assert recipe.merge.search.max_candidates == 3


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "does not hold a mapping of recipe keys."),
        ("- 1\n", "does not hold a mapping of recipe keys."),
        ("a: [1\n", "is not valid YAML: "),
        ("a: !!python/object/apply:os.system ['true']\n", "is not valid YAML: "),
        ("1: 2\n", "keys should be strings"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "odd.yaml").write_text(content)
    assert sentence in message(str(tmp_path / "odd.yaml"))


def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("# Größe\n".encode("latin-1"))
    assert "latin.yaml is not valid YAML" in message(str(tmp_path / "latin.yaml"))


def test_every_setting_has_a_dotted_name(file: str) -> None:
    settings = flatten(load_recipe(file).model_dump(mode="json"))
    assert settings["finetune.num_steps"] == 10
    assert settings["merge.weights"] == [0.5, 0.25]
    assert settings["merge.search"] is None
    assert settings["pretrained.unet"] == {}
    assert settings["pretrained.training.num_steps"] == 5
    assert json.loads(json.dumps(settings)) == settings


def test_only_settings_that_differ_are_listed(file: str) -> None:
    first = load_recipe(file).model_dump(mode="json")
    second = load_recipe(file, ["finetune.num_steps=20"]).model_dump(mode="json")
    older = {"name": first["name"], "finetune": {"num_steps": 10}}
    assert differing_settings([first, first]) == {}
    assert differing_settings([first, second]) == {"finetune.num_steps": [10, 20]}
    found = differing_settings([first, older])
    assert found["finetune.seed"] == [0, None]
    assert "finetune.num_steps" not in found


def test_recipes_are_read_without_torch() -> None:
    # `deme run` and `deme recipes` answer in a second only as long as this holds.
    code = "import sys; from deme_core.recipe_file import *; load_recipe('digits'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_overrides_that_the_documentation_shows_are_valid() -> None:
    root = Path(__file__).parents[2]
    shown = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "recipes").glob("*.yaml"))]
    pattern = r"^(?:#|    ) *deme run (?P<recipe>[a-z0-9_]+)(?![\w.])(?P<options>(?:[^\n\\]|\\\n)*)"
    found = [match for path in shown for match in re.finditer(pattern, path.read_text("utf-8"), re.MULTILINE)]
    commands = [(m["recipe"], shlex.split(m["options"].replace("\\\n", " ").partition(" #")[0])) for m in found]
    assert any("--set" in options for _, options in commands)
    for recipe, options in commands:
        load_recipe(recipe, [value for option, value in pairwise(options) if option == "--set"])
