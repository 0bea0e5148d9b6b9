"""A recipe is checked by its key: every mistake is answered with the file, the line, the key and what to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from refusalkit.errors import InputError
from refusalkit.recipe import Recipe, json_schema
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from tests.conftest import BUILT_IN, ROOT
from tests.conftest import SMALL as WHOLE

jsonschema = pytest.importorskip("jsonschema")

#: Ends in a section to which keys can be added.
SMALL = WHOLE.replace("  interventions: [none, ablate, steer, orthogonalize]\n", "")
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "recipes" / "analyses").glob("*.yaml"))]


def refused(path: Path, text: str | bytes, *settings: str) -> InputError:
    """Write a recipe and return the error that loading it raises."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, BUILT_IN, settings)
    assert caught.value.hint, f"no hint: {caught.value}"
    assert "\n" not in caught.value.message
    return caught.value


# Keys and values


@pytest.mark.parametrize(
    ("added", "line", "key", "message", "hint"),
    [
        ("evalute: {}", 12, "evalute", "unknown key 'evalute'", "did you mean 'evaluate'?"),
        ("capture:\n  sites: resid_pre", 13, "capture.sites", "unknown key 'sites'", "did you mean 'site'?"),
        ("find:\n  strategy: random\n  sead: 3", 14, "find.sead", "unknown key 'sead'", "did you mean 'seed'?"),
        ("select:\n  max_kl_nat: 3", 13, "select.max_kl_nat", "unknown key", "did you mean 'max_kl_nats'?"),
        ("find: diff_in_means", 12, "find", "no strategy is called 'diff_in_means'", "'difference_in_means'?"),
        ("find:\n  strategy: randon", 13, "find.strategy", "no strategy is called 'randon'", "'random'?"),
        ("select: casual", 12, "select", "no selector is called 'casual'", "did you mean 'causal'?"),
        ("select: fixed", 12, "select.layer", "'layer' is missing", "a mapping below `select:`"),
        ("capture:\n  site: resid_mid", 13, "capture.site", "not 'resid_mid'", "did you mean 'resid_pre'?"),
        ("capture:\n  positions: 0", 13, "capture.positions", "cannot be 0", "negative numbers"),
        ("capture:\n  positions: post_instuction", 13, "capture.positions", "cannot be", "'post_instruction'?"),
        ("capture:\n  positions:\n    - -1\n    - 3", 15, "capture.positions.1", "cannot be 3", "negative numbers"),
        ("find:", 12, "find", "should be keys and values, not nothing", "one of: difference_in_means"),
        ("find: [random]", 12, "find", "should be keys and values, not a list", "one of: difference_in_means"),
        ("description: 2024-01-01", 12, "description", "should be text, not '2024-01-01'", 'quote it: "2024-01-01"'),
        ("select:\n  min_induced_score: .nan", 13, "select.min_induced_score", "not a number", "write a number"),
        ("name: other", 12, "name", "the key stands twice, first on line 1", "keep one of them"),
    ],
)
def test_a_mistake_names_file_line_key_and_remedy(
    tmp_path: Path, added: str, line: int, key: str, message: str, hint: str
) -> None:
    path = tmp_path / "r.yaml"
    error = refused(path, f"{SMALL}{added}\n")
    assert error.where == f"{path}:{line}: {key}"
    assert message in error.message
    assert hint in str(error.hint)


@pytest.mark.parametrize(
    ("written", "key", "message", "hint"),
    [
        ("[none, ablte]", "interventions.1", "no intervention is called 'ablte'", "did you mean 'ablate'?"),
        ("[{intervention: ster}]", "interventions.0.intervention", "no intervention is called", "'steer'?"),
        ("[{scale: 2}]", "interventions.0", "does not say which intervention", "add `intervention:`"),
        ("[{intervention: steer, scal: 2}]", "interventions.0.scal", "unknown key 'scal'", "did you mean 'scale'?"),
        (
            "[{intervention: steer, scale: big}]",
            "interventions.0.scale",
            "should be a number, not 'big'",
            "`scale`: Multiples",
        ),
        ("[{intervention: steer, scale: .nan}]", "interventions.0.scale", "not a number", "write a number"),
        ("[3]", "interventions.0", "should be keys and values, not 3", "one of: none, ablate"),
        ("ablate", "interventions", "should be a list, not 'ablate'", "one of: none, ablate"),
        ("[ablate, steer, ablate]", "interventions", "lists ablate twice", "one of: none, ablate"),
        (
            "[{intervention: ablate, layers: [2]}]",
            "interventions.0.layers",
            "should list at least 2, not 1",
            "`layers`",
        ),
        (
            "[{intervention: ablate, layers: [4, 2]}]",
            "interventions.0",
            "`layers: [4, 2]` ends before it starts",
            "Rem",
        ),
        ("[{intervention: ablate, where: promt}]", "interventions.0.where", "not 'promt'", "did you mean 'prompt'?"),
        (
            "[{intervention: ablate, where: prompt, steps: [1, 4]}]",
            "interventions.0",
            "`where: prompt` and `steps: [1, 4]` leave no token to change",
            "Remove the direction",
        ),
        ("[{intervention: ablate, steps: [null, 2]}]", "interventions.0", "`steps` has no first", "Remove"),
        ("[combine]", "interventions.0.parts", "'parts' is missing", "write combine as keys and values, with `parts:`"),
        ("[{intervention: combine, parts: [ablate]}]", "interventions.0.parts", "at least 2, not 1", "one of: none"),
        (
            "[{intervention: combine, parts: [ablate, orthogonalize]}]",
            "interventions.0",
            "orthogonalize edits the weights: list it by itself",
            "Apply several",
        ),
        ("[{intervention: combine, parts: [ablate, none]}]", "interventions.0", "none does nothing here", "Apply"),
        ("[{intervention: combine, parts: [clamp, clamp]}]", "interventions.0", "lists clamp twice", "Apply several"),
        (
            "[{intervention: combine, parts: [conditional, {intervention: conditional, when: harmless}]}]",
            "interventions.0",
            "two gates: conditional and conditional(when=harmless)",
            "Apply several",
        ),
        (
            "[{intervention: combine, parts: [ablate, {intervention: combine, parts: [clamp, steer]}]}]",
            "interventions.0",
            "holds a combination: write all parts in one list",
            "Apply several",
        ),
        (
            "[{intervention: combine, parts: [ablate, {intervention: steer, scal: 3}]}]",
            "interventions.0.parts.1.scal",
            "unknown key 'scal'",
            "did you mean 'scale'?",
        ),
        (
            "[{intervention: conditional, apply: {intervention: ster}}]",
            "interventions.0.apply.intervention",
            "no intervention is called 'ster'",
            "did you mean 'steer'?",
        ),
        (
            "[{intervention: conditional, apply: ablate}]",
            "interventions.0",
            "ablate acts from layer 0 on, before the gate is read in the direction's layer",
            "Apply another intervention",
        ),
        ("[{intervention: conditional, apply: conditional}]", "interventions.0", "two gates", "Apply another"),
    ],
)
def test_a_mistake_in_a_list_names_the_item(tmp_path: Path, written: str, key: str, message: str, hint: str) -> None:
    path = tmp_path / "r.yaml"
    error = refused(path, f"{SMALL}  interventions: {written}\n")
    assert error.where == f"{path}:12: evaluate.{key}"
    assert message in error.message
    assert hint in str(error.hint)


def test_an_unknown_metric_names_the_nearest(tmp_path: Path) -> None:
    error = refused(tmp_path / "r.yaml", f"{SMALL}  metrics: [refusal_rte]\n")
    assert error.message == "no metric is called 'refusal_rte'"
    assert str(error.hint).startswith("did you mean 'refusal_rate'?")
    assert refused(tmp_path / "r.yaml", f"{SMALL}  metrics: []\n").message == "lists nothing to measure"


@pytest.mark.parametrize("value", ["many", "0", "1.5", "true", '"16"', "", "-3", "[16]", "{a: 1}"])
def test_a_count_is_a_whole_number_above_zero(tmp_path: Path, value: str) -> None:
    error = refused(tmp_path / "r.yaml", SMALL.replace("train: 16", f"train: {value}"))
    assert error.where == f"{tmp_path / 'r.yaml'}:7: prompts.train"
    assert str(error.hint).startswith("`train`: Prompts a side for finding directions")


@pytest.mark.parametrize(
    ("old", "new", "where", "message"),
    [
        ("model:\n  id: tiny:llama\n", "", ": model", "'model' is missing"),
        ("  id: tiny:llama", "  device: cpu", ":2: model.id", "'id' is missing"),
        ("  harmless: tiny:harmless\n", "", ":4: prompts.harmless", "'harmless' is missing"),
        ("harmless: tiny", "harmles: tiny", ":6: prompts.harmles", "unknown key 'harmles'"),
        ("model:\n  id: tiny:llama\n", "model: tiny:llama\n", ":2: model", "should be keys and values, not"),
        ("name: small", "name: ../etc", ":1: name", "should match pattern"),
        ("name: small", "name: 42", ":1: name", "should be text, not 42"),
        ("harmful: tiny:harmful", "harmful: {train: a}", ":5: prompts.harmful.validation", "'validation' is missing"),
        ("harmful: tiny:harmful", "harmful: [a, b]", ":5: prompts.harmful", "cannot be a list"),
    ],
)
def test_a_missing_or_misplaced_part_is_named(tmp_path: Path, old: str, new: str, where: str, message: str) -> None:
    assert SMALL.count(old) == 1
    error = refused(tmp_path / "r.yaml", SMALL.replace(old, new))
    assert error.where == f"{tmp_path / 'r.yaml'}{where}"
    assert message in error.message


def test_the_first_of_several_mistakes_counts_the_others(tmp_path: Path) -> None:
    error = refused(tmp_path / "r.yaml", f"{SMALL}one: 1\ntwo: 2\nthree: 3\n")
    assert error.message == "unknown key 'one' (and 2 more: two, three)"


# Files


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "holds nothing, not keys and values"),
        ("# nothing yet\n", "", "holds nothing, not keys and values"),
        ("- a\n", "", "holds a list, not keys and values"),
        ("hello", "", "holds 'hello', not keys and values"),
        (f"{SMALL}find: [a\n", ":13", "not YAML: expected ',' or ']'"),
        (f"{SMALL}find:\n\tstrategy: x\n", ":13", "not YAML: found character '\\t'"),
        (f"{SMALL}find: !!python/object/apply:os.system [ls]\n", ":12", "not YAML: could not determine a constructor"),
        (f"{SMALL}---\nname: b\n", ":12", "not YAML: but found another document"),
        (f"{SMALL}description: a\x07b\n", ":12", "not YAML: special characters are not allowed"),
        (SMALL.encode() + b"# \xff\n", ":12", "is not UTF-8"),
        (SMALL.encode("utf-16"), ":1", "byte 0 is not UTF-8"),
        (f"{SMALL}find: {'[' * 3000}{']' * 3000}\n", "", "nested too deeply"),
        (f"{SMALL}description: 2024-13-45\n", "", "month must be in 1..12"),
        (f"{SMALL}description: {'9' * 5000}\n", "", "Exceeds the limit"),
        (f"{SMALL}? [a]\n: x\n", ":12", "found unhashable key"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | bytes, place: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    error = refused(path, text)
    assert error.where == f"{path}{place}"
    assert message in error.message


def test_aliases_that_stand_for_billions_of_items_are_refused_at_once(tmp_path: Path) -> None:
    bomb = 'a0: &a0 ["x"]\n' + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert refused(tmp_path / "r.yaml", bomb + SMALL).message.startswith("unknown key 'a0'")
    assert "a list" in refused(tmp_path / "r.yaml", f"{SMALL}find: &a [*a]\n").message


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("smal.yaml", "no such recipe", "did you mean 'small.yaml'?"),
        ("no/such/folder.yaml", "no such recipe", "a recipe is a YAML file"),
        (".", "this is a folder, not a recipe", "name the YAML file in it"),
        ("small.yaml/x", "cannot be read: Not a directory", "name a YAML file"),
        ("a" * 300, "cannot be read: File name too long", "name a YAML file"),
        ("nul\0.yaml", "cannot be read: embedded null byte", "name a YAML file"),
    ],
)
def test_a_path_without_a_recipe_is_refused(
    recipe_file: Path, registry: Registry, name: str, message: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file.parent / name, registry)
    assert caught.value.message == message
    assert hint in str(caught.value.hint)


# --set


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("prompts.train=17", lambda recipe: recipe.prompts.train == 17),
        ("find=random", lambda recipe: recipe.find.strategy == "random"),
        ("find.strategy=random", lambda recipe: recipe.find.strategy == "random"),
        ("select.max_kl_nats=0.2", lambda recipe: recipe.select.max_kl_nats == 0.2),
        ("evaluate.interventions=[ablate]", lambda recipe: len(recipe.evaluate.interventions) == 1),
        ("model.id=owner/name", lambda recipe: recipe.model.id == "owner/name"),
        ("prompts.system=a=b", lambda recipe: recipe.prompts.system == "a=b"),
    ],
)
def test_a_setting_replaces_a_value(recipe_file: Path, registry: Registry, setting: str, read: Any) -> None:
    assert not read(load_recipe(recipe_file, registry))
    assert read(load_recipe(recipe_file, registry, [setting]))


def test_a_setting_below_a_bare_name_keeps_the_name(recipe_file: Path, registry: Registry) -> None:
    recipe_file.write_text(f"{SMALL}find: random\n", encoding="utf-8")
    find = load_recipe(recipe_file, registry, ["find.seed=7"]).find
    assert find.model_dump(exclude_unset=True) == {"strategy": "random", "seed": 7}


def test_a_number_in_a_setting_counts_the_items_of_a_list(recipe_file: Path, registry: Registry) -> None:
    listed = "evaluate.interventions=[ablate, {intervention: steer}]"
    settings = [listed, "evaluate.interventions.1.scale=2.0", "evaluate.interventions.0.where=prompt"]
    labels = [spec.label for spec in load_recipe(recipe_file, registry, settings).evaluate.interventions]
    assert labels == ["ablate(where=prompt)", "steer(scale=2.0)"]
    with pytest.raises(InputError, match=r"'2' is no place in the list evaluate\.interventions") as caught:
        load_recipe(recipe_file, registry, [listed, "evaluate.interventions.2.scale=2.0"])
    assert caught.value.hint == "0 to 1, in its order"


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("x", "not of the form key=value", "for example --set"),
        ("=3", "not of the form key=value", "for example --set"),
        ("prompts.=3", "not of the form key=value", "for example --set"),
        ("model.dytpe=float32", "unknown key 'dytpe'", "did you mean 'dtype'?"),
        ("modl.id=x", "unknown key 'modl'", "did you mean 'model'?"),
        ("model.dtype=float23", "not 'float23'", "did you mean 'float32'?"),
        ("model.id.x=3", "model.id is not a section", "set the whole value"),
        ("prompts.train=[", "the value is not YAML", "quote it for the shell"),
        ("prompts.train=", "should be a whole number, not nothing", "`train`: Prompts"),
        ("model.revision=1234567", "should be text, not 1234567", 'quote it: "1234567"'),
        ("model=tiny:yi", "should be keys and values", "write its keys below `model:`"),
        ("evaluate.interventions.0=ablate", "should be a list, not keys and values", "one of: none"),
        ("description=!!python/name:os.system", "the value is not YAML", "quote it for the shell"),
    ],
)
def test_a_wrong_setting_is_named_instead_of_the_file(tmp_path: Path, setting: str, message: str, hint: str) -> None:
    error = refused(tmp_path / "r.yaml", SMALL, setting)
    assert error.where == f"--set {setting}"
    assert message in error.message
    assert hint in str(error.hint)


# The model


def test_a_recipe_cannot_be_changed(recipe_file: Path, registry: Registry) -> None:
    recipe = load_recipe(recipe_file, registry)
    with pytest.raises(ValueError, match="frozen"):
        recipe.prompts.train = 3  # type: ignore[misc]


def test_what_is_written_back_is_the_same_recipe(recipe_file: Path, registry: Registry) -> None:
    recipe = load_recipe(recipe_file, registry)
    text = yaml.safe_dump(recipe.model_dump(mode="json", serialize_as_any=True))
    recipe_file.write_text(text, encoding="utf-8")
    assert load_recipe(recipe_file, registry).model_dump() == recipe.model_dump()


# The schema


@pytest.fixture(scope="module")
def validator(registry: Registry) -> Any:
    schema = json_schema(registry)
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def test_every_recipe_validates_against_the_schema(validator: Any) -> None:
    assert len(RECIPES) >= 5
    for path in RECIPES:
        assert list(validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))) == [], path.name


@pytest.mark.parametrize(
    "added",
    [
        "find: random",
        "find: {strategy: random, seed: 3}",
        "select: causal",
        "select: {selector: fixed, layer: 3}",
        "capture: {positions: [-1, instruction_end]}",
        "  interventions: [conditional, {intervention: ablate, layers: [2, 4], where: last, steps: [1, null]}]",
        "  interventions: [{intervention: conditional, apply: {intervention: combine, parts: [steer, clamp]}}]",
        "  interventions: [{intervention: combine, parts: [{intervention: steer, scale: 2}, conditional]}]",
    ],
)
def test_the_schema_accepts_what_the_recipe_accepts(
    validator: Any, recipe_file: Path, registry: Registry, added: str
) -> None:
    recipe_file.write_text(f"{SMALL}{added}\n", encoding="utf-8")
    load_recipe(recipe_file, registry)
    assert list(validator.iter_errors(yaml.safe_load(f"{SMALL}{added}\n"))) == []


@pytest.mark.parametrize(
    "added",
    [
        "evalute: {}",
        "find: {strategy: random, sead: 3}",
        "find: rendom",
        "select: {selector: fixed, layers: 3}",
        "select: {selector: repair, apply: {intervention: affine, alfa: 1}}",
        "capture: {positions: 0}",
        "description: 3",
        "  interventions: [{intervention: ablate, layers: [2]}]",
        "  interventions: [{intervention: conditional, apply: {intervention: steer, scal: 3}}]",
        "  interventions: [{intervention: combine, parts: [ablate]}]",
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(validator: Any, tmp_path: Path, added: str) -> None:
    refused(tmp_path / "r.yaml", f"{SMALL}{added}\n")
    assert list(validator.iter_errors(yaml.safe_load(f"{SMALL}{added}\n"))) != []


def test_the_schema_describes_every_key_of_a_recipe(registry: Registry) -> None:
    schema = json.loads(json.dumps(json_schema(registry)))
    undocumented = [
        f"{name}.{key}"
        for name, model in {"Recipe": schema, **schema["$defs"]}.items()
        for key, field in model["properties"].items()
        # The name of a choice is described by the choice.
        if not (field.get("description") or "$ref" in field or "const" in field)
    ]
    assert undocumented == []
    assert set(schema["properties"]) == set(Recipe.model_fields)
