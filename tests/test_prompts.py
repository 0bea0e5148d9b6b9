"""Prompts are read as they were written, divided by the seed alone, and never shared between splits or sides."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refusalkit.builtin.phrases import says_no
from refusalkit.builtin.sources import FIELDS, SOURCES
from refusalkit.errors import InputError
from refusalkit.prompt_source import Passage
from refusalkit.prompt_split import SPLITS, check_leaks, normalized, split_pool, without_duplicates

SIZES = {"train": 12, "validation": 5, "test": 8}
POOL = tuple(f"Write a poem about the number {number}" for number in range(40))
READ = {source.scheme: source.read for source in SOURCES}
READ_ANSWERED = {source.scheme: source.read_answered for source in SOURCES if source.read_answered is not None}
BUILTIN = ("harmful", "harmless", "over_refusal_safe", "over_refusal_unsafe")
DATA = importlib.resources.files("refusalkit.builtin").joinpath("prompts")

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Give a function that writes a file into the recipe's folder."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


def builtin(name: str) -> tuple[str, ...]:
    return READ["builtin"](name, Path())["all"]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in DATA.joinpath(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(scheme: str, address: str, folder: Path = Path()) -> InputError:
    with pytest.raises(InputError) as caught:
        READ[scheme](address, folder)
    return caught.value


# Splits


@pytest.mark.parametrize("seed", range(20))
def test_a_split_is_made_by_the_seed_alone(seed: int) -> None:
    first = split_pool(POOL, SIZES, seed, "prompts.harmful")
    assert first == split_pool(list(POOL), dict(reversed(SIZES.items())), seed, "prompts.harmful")
    assert {split: len(prompts) for split, prompts in first.items()} == SIZES
    drawn = [prompt for split in SPLITS for prompt in first[split]]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(POOL)
    check_leaks(("harmful", split, prompts) for split, prompts in first.items())


def test_seeds_draw_different_splits() -> None:
    assert len({split_pool(POOL, SIZES, seed, "")["train"] for seed in range(20)}) == 20


def test_a_split_does_not_depend_on_the_hash_seed() -> None:
    script = (
        "from refusalkit.prompt_split import split_pool\n"
        "pool = [f'Prompt {n}' for n in range(40)]\n"
        "print(split_pool(pool, {'train': 9, 'validation': 4, 'test': 6}, 3, ''))"
    )
    said = {
        subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert said != {b""}


def test_a_pool_may_be_used_up_and_no_further() -> None:
    sizes = {"train": 20, "validation": 10, "test": 10}
    assert sorted(p for part in split_pool(POOL, sizes, 0, "").values() for p in part) == sorted(POOL)
    with pytest.raises(InputError) as caught:
        split_pool(POOL, sizes | {"test": 11}, 0, "prompts.harmful")
    error = caught.value
    assert error.message.startswith("40 different prompts, but 41 are asked for")
    assert "20 train + 10 validation + 11 test" in error.message
    assert error.where == "prompts.harmful"
    assert error.hint
    assert "lower `prompts.train`" in error.hint


def test_duplicates_count_once() -> None:
    twice = ("Say hello", "say  HELLO ", "Say goodbye", "Say hello", "Straße", "STRASSE")
    assert without_duplicates(twice) == (("Say hello", "Say goodbye", "Straße"), 3)
    assert without_duplicates(POOL) == (POOL, 0)
    with pytest.raises(InputError, match=r"^prompts: 3 different prompts, but 4"):
        split_pool(twice, {"train": 2, "validation": 1, "test": 1}, 0, "prompts")
    for seed in range(20):
        check_leaks([("harmful", *part) for part in split_pool(twice, dict.fromkeys(SPLITS, 1), seed, "").items()])


# Leaks


@pytest.mark.parametrize(
    ("other", "place"),
    [(("harmful", "test"), "harmful.train and harmful.test"), (("harmless", "train"), "harmful.train and harmless.tr")],
)
@pytest.mark.parametrize("again", ["Say hello", "say HELLO", " Say \t hello\n"])
def test_a_prompt_in_two_places_is_a_leak(other: tuple[str, str], place: str, again: str) -> None:
    with pytest.raises(InputError) as caught:
        check_leaks([("harmful", "train", ["Say hello", "a"]), (*other, ["b", again])])
    assert repr(again) in caught.value.message
    assert place in caught.value.message


def test_at_most_three_leaks_are_quoted() -> None:
    prompts = [f"Prompt {number}" for number in range(7)]
    with pytest.raises(InputError, match=r"'Prompt 0'.*'Prompt 2'.*\(and 4 more\)") as caught:
        check_leaks([("harmful", "train", prompts), ("harmful", "test", prompts)])
    assert "Prompt 3" not in caught.value.message


def test_a_duplicate_inside_one_split_is_no_leak() -> None:
    check_leaks([("harmful", "train", ["Say hello", "say hello"]), ("harmless", "train", ["Say goodbye"])])


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "# a comment\n\n  First \nSecond\n"),
        ("p.TXT", "First\r\nSecond"),
        ("p.txt", "\ufeffFirst\rSecond\r"),
        ("p.json", '["First", "Second"]'),
        ("p.json", '[{"goal": "First"}, {"goal": "Second"}]'),
        ("p.jsonl", '{"prompt": "First", "n": 1}\n\n{"n": 2, "prompt": "Second"}\n'),
        ("p.jsonl", '"First"\n"Second"'),
        ("p.csv", "n,Behavior\n1,First\n2,Second\n"),
        ("p.csv", "prompt\rFirst\rSecond\r"),
    ],
)
def test_a_file_is_read(write: Write, name: str, content: str) -> None:
    folder = write(name, content).parent
    assert READ["file"](name, folder) == {"all": ("First", "Second")}


@pytest.mark.parametrize("field", FIELDS)
def test_a_known_field_is_found(write: Write, field: str) -> None:
    folder = write("p.jsonl", json.dumps({"id": "7", field: "First"})).parent
    assert READ["file"]("p.jsonl", folder)["all"] == ("First",)


def test_the_earlier_known_field_wins_and_a_named_field_wins_over_all(write: Write) -> None:
    folder = write("p.csv", "question,goal,prompt,mine\nD,C,A,B\n").parent
    assert READ["file"]("p.csv", folder)["all"] == ("A",)
    assert READ["file"]("p.csv#mine", folder)["all"] == ("B",)


def test_a_path_starts_at_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "p.txt").write_text("First")
    (tmp_path / "recipes").mkdir()
    assert READ["file"]("../sets/p.txt", tmp_path / "recipes")["all"] == ("First",)
    assert READ["file"](str(tmp_path / "sets" / "p.txt"), Path("elsewhere"))["all"] == ("First",)


def test_only_line_ends_end_a_line(write: Write) -> None:
    folder = write("p.jsonl", '{"prompt": "one\u2028text\u0085here"}\n').parent
    assert READ["file"]("p.jsonl", folder)["all"] == ("one\u2028text\u0085here",)


@pytest.mark.parametrize(
    ("address", "content", "place", "message"),
    [
        ("p.txt", b"ok\nb\xffd", "p.txt:2", "byte 4 is not UTF-8"),
        ("p.txt", b"\xef\xbb\xbfok\n\xff", "p.txt:2", "byte 6 is not UTF-8"),
        ("p.txt", "", "p.txt", "holds no prompts"),
        ("p.txt", "# only\n\n  \n", "p.txt", "holds no prompts"),
        ("p.json", "", "p.json", "holds no prompts"),
        ("p.jsonl", "\n", "p.jsonl", "holds no prompts"),
        ("p.csv", "prompt\n", "p.csv", "holds no prompts"),
        ("p.txt#goal", "First", "p.txt", "a .txt file has no field 'goal'"),
        ("p.jsonl", '"First"\n\n{"a": }\n', "p.jsonl:3", "not JSON: Expecting value at column 7"),
        ("p.json", '[\n"First",\n}', "p.json:3", "not JSON: Expecting value at column 1"),
        ("p.json", "[" * 100_000, "p.json:1", "nested too deeply"),
        ("p.jsonl", '"First"\n' + "9" * 5000, "p.jsonl:2", "a number too long"),
        ("p.json", '{"prompt": "First"}', "p.json", "holds no list of prompts"),
        ("p.jsonl", '{"a": 1, "b": 2}', "p.jsonl:1", "has no field that holds a prompt; it has 'a', 'b'"),
        ("p.jsonl", "{}", "p.jsonl:1", "it has no fields"),
        ("p.csv#gaol", "goal,n\nFirst,1\n", "p.csv:2", "has no field 'gaol'; it has 'goal', 'n'"),
        ("p.jsonl", '{"prompt": "A"}\n{"text": "B"}', "p.jsonl:2", "has no field 'prompt'; it has 'text'"),
        ("p.jsonl", '{"prompt": "A"}\n{"prompt": 7}', "p.jsonl:2", "field 'prompt' is of type int, not a text"),
        ("p.json", '["A", ["B"]]', "p.json[1]", "is of type list, not a text"),
        ("p.json#goal", '["A"]', "p.json[0]", "is a text, which has no field 'goal'"),
        ("p.json", '["\\ud800"]', "p.json[0]", "half of a surrogate pair"),
        ("p.csv", 'n,prompt\n1,"two\nlines"\n2\n', "p.csv:4", "field 'prompt' is empty, not a text"),
        ("p.csv", 'prompt\n"never closed\n', "p.csv:2", "not CSV: unexpected end of data"),
        ("p.csv", "prompt\n" + "x" * 200_000, "p.csv:2", "not CSV: field larger than field limit"),
        ("p.parquet", "PAR1", "p.parquet", "'.parquet' is not a known kind of file"),
        ("p", "First", "p", "no extension"),
    ],
)
def test_a_file_that_cannot_be_used(write: Write, address: str, content: str | bytes, place: str, message: str) -> None:
    folder = write(address.partition("#")[0], content).parent
    error = refused("file", address, folder)
    assert message in error.message
    assert error.where == str(folder / place)


@pytest.mark.parametrize(
    ("address", "content"),
    [
        ("p.jsonl", '{"prompt": "A?", "answer": "B."}\n{"prompt": "C?", "answer": " D. "}'),
        ("p.json", '[{"instruction": "A?", "input": "", "output": "B."}, {"instruction": "C?", "output": "D."}]'),
        ("p.csv", "goal,target\nA?,B.\nC?,D.\n"),
        ("p.csv#ask,say", "say,prompt,ask\nB.,x,A?\nD.,x,C?\n"),
        ("p.csv#ask", "answer,ask\nB.,A?\nD.,C?\n"),
        # Rows that need something else beside the prompt, or lack a part, are left out as a whole.
        ("p.csv", "prompt,input,output\nE?,F,G.\nA?,,B.\nH?,,\n,,I.\nC?,,D.\n"),
    ],
)
def test_answers_stay_with_their_prompts(write: Write, address: str, content: str) -> None:
    path = write(address.partition("#")[0], content)
    assert READ_ANSWERED["file"](address, path.parent) == (Passage("B.", "A?"), Passage("D.", "C?"))


@pytest.mark.parametrize(
    ("address", "content", "place", "message"),
    [
        ("p.jsonl", '{"prompt": "A?", "reply": "B."}', "p.jsonl:1", "has no field that holds an answer"),
        ("p.jsonl#prompt,reply", '{"prompt": "A?", "answer": "B."}', "p.jsonl:1", "has no field 'reply'"),
        ("p.txt", "A?\nB.\n", "p.txt:1", "is a text, which has no field that holds an answer"),
        ("p.json#ask", '["A?"]', "p.json[0]", "is a text, which has no field 'ask'"),
        ("p.json", '[{"prompt": "A?", "input": "x", "answer": "B."}]', "p.json", "holds no prompt with an answer"),
    ],
)
def test_a_file_without_answers_cannot_be_used(
    write: Write, address: str, content: str, place: str, message: str
) -> None:
    path = write(address.partition("#")[0], content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        READ_ANSWERED["file"](address, path.parent)
    assert caught.value.where == str(path.parent / place)
    assert caught.value.hint


def test_a_missing_file_names_the_nearest(write: Write) -> None:
    for number in range(30):
        write(f"a{number}.txt", "First")
    folder = write("harmful.txt", "First").parent
    (folder / "harmfull.d").mkdir()
    error = refused("file", "harmfull.txt", folder)
    assert (error.message, error.hint) == ("no such file", "did you mean 'harmful.txt'?")
    assert refused("file", "nothing/like/it.csv", folder).hint == (
        "the folder is not there either; paths start at the recipe's folder"
    )


@pytest.mark.parametrize("address", ["", ".", "folder", "folder.txt"])
def test_a_folder_is_not_a_file(tmp_path: Path, address: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.txt").mkdir()
    assert refused("file", address, tmp_path).message == "this is a folder"


@pytest.mark.parametrize("address", ["~nobody-of-that-name/p.txt", "nul\0l.txt", "p.txt/p.txt"])
def test_a_path_that_cannot_be_is_an_input_error(write: Write, address: str) -> None:
    refused("file", address, write("p.txt", "First").parent)


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for the package `datasets`; give the list of what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str) -> list[dict[str, Any]]:
        asked.append((name, config, split, revision))
        if name == "missing":
            raise FileNotFoundError("no such data set\nand more")
        if name == "silent":
            raise ValueError
        return [] if name == "empty" else [{"prompt": "First", "goal": "Third"}, {"prompt": "Second", "goal": "Fourth"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("address", "asked", "prompts"),
    [
        ("owner/name@abc1", ("owner/name", None, "train", "abc1"), ("First", "Second")),
        ("name@refs/pr/1?split=test", ("name", None, "test", "refs/pr/1"), ("First", "Second")),
        ("n@r?field=goal&split=a+b&config=x:y", ("n", "x:y", "a+b", "r"), ("Third", "Fourth")),
        ("n@r?split=train[:10%]", ("n", None, "train[:10%]", "r"), ("First", "Second")),
    ],
)
def test_a_hub_address_is_taken_apart(
    hub: list[tuple[Any, ...]], address: str, asked: tuple[Any, ...], prompts: tuple[str, ...]
) -> None:
    assert READ["hf"](address, Path()) == {"all": prompts}
    assert hub == [asked]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("owner/name", "names no revision"),
        ("owner/name@", "names no revision"),
        ("owner/name?split=a@b", "names no revision"),
        ("@abc1", "names no data set"),
        ("", "names no data set"),
        ("n@r#goal", "`#` has no meaning here"),
        ("n@r?spilt=test", "unknown option 'spilt'"),
        ("n@r?split", "option 'split' needs exactly one value"),
        ("n@r?split=a&split=b", "option 'split' needs exactly one value"),
        ("missing@r", "cannot be loaded: no such data set"),
        ("silent@r", "cannot be loaded: ValueError"),
        ("empty@r", "holds no prompts"),
        ("n@r?field=gaol", "has no field 'gaol'; it has 'prompt', 'goal'"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_hub_address_that_cannot_be_used(address: str, message: str) -> None:
    error = refused("hf", address)
    assert error.message == message
    assert error.where
    assert error.where.startswith(f"hf:{address}")
    assert error.hint


def test_the_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused("hf", "name@abc1").hint == 'pip install "refusalkit[hf]"'
    assert refused("hf", "name").message == "names no revision"


# The package's own sets


def test_schemes_are_distinct_and_explained() -> None:
    assert sorted(READ) == ["builtin", "file", "hf", "tiny"]
    assert all(source.help and "\n" not in source.help for source in SOURCES)


def test_sources_start_without_torch() -> None:
    script = "import refusalkit.builtin.sources, refusalkit.prompt_split, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("scheme", ["builtin", "tiny"])
def test_a_misspelt_set_is_answered_with_the_nearest(scheme: str) -> None:
    assert refused(scheme, "harmfull").hint == "did you mean 'harmful'?"


def test_tiny_prompts_come_with_what_the_models_were_taught() -> None:
    for side in ("harmful", "harmless"):
        passages = READ_ANSWERED["tiny"](side, Path())
        assert tuple(passage.prompt for passage in passages) == READ["tiny"](side, Path())["test"]
        assert all(says_no(passage.text) == (side == "harmful") for passage in passages)
        assert len({passage.text for passage in passages}) > 5


def test_the_built_in_texts_and_answers_are_plain_and_stand_once() -> None:
    texts, answers = builtin("texts"), READ_ANSWERED["builtin"]("answers", Path())
    assert len(set(texts)) == len(texts) >= 32
    assert len({passage.prompt for passage in answers}) == len(answers) >= 32
    assert {row["kind"] for row in rows("texts")} == {"encyclopaedia", "prose", "code", "other"}
    for text in (*texts, *(passage.text for passage in answers)):
        assert text.isascii()
        assert text == text.strip()
        assert not says_no(text, wide=True)
    # What a direction is found or tested with is measured nowhere else.
    used = {normalized(prompt) for name in BUILTIN for prompt in builtin(name)}
    assert not used & {normalized(passage.prompt or "") for passage in answers}


def test_tiny_sets_are_divided_and_do_not_leak() -> None:
    parts = [
        (side, split, prompts)
        for side in ("harmful", "harmless")
        for split, prompts in READ["tiny"](side, Path()).items()
    ]
    assert [split for _, split, _ in parts] == [*SPLITS, *SPLITS]
    assert all(prompts for _, _, prompts in parts)
    check_leaks(parts)


def test_no_prompt_stands_twice_in_the_built_in_sets() -> None:
    prompts = [normalized(prompt) for name in BUILTIN for prompt in builtin(name)]
    assert [prompt for prompt, times in Counter(prompts).items() if times > 1] == []


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_prompts_are_short_single_lines(name: str) -> None:
    for prompt in builtin(name):
        assert prompt == " ".join(prompt.split())
        assert prompt.isascii()
        assert prompt[0].isupper()
        assert 4 <= len(prompt.split()) <= 20


@pytest.mark.parametrize("name", ["harmful", "harmless"])
def test_categories_are_even(name: str) -> None:
    counts = Counter(row["category"] for row in rows(name))
    assert len(counts) == 10
    assert len(set(counts.values())) == 1
    assert counts.total() >= 176
    assert all(len(row["prompt"].split()) >= 6 for row in rows(name))
    assert all(set(row) == {"prompt", "category"} for row in rows(name))


def test_harmful_and_harmless_have_the_same_form() -> None:
    sides = [builtin("harmful"), builtin("harmless")]
    assert len(sides[0]) == len(sides[1])
    lengths = [sorted(len(prompt.split()) for prompt in side) for side in sides]
    means = [sum(words) / len(words) for words in lengths]
    assert abs(means[0] - means[1]) < 0.15 * means[0]
    for quarter in (1, 2, 3):
        at = quarter * len(sides[0]) // 4
        assert abs(lengths[0][at] - lengths[1][at]) <= 1
    openers = [Counter(prompt.split()[0] for prompt in side) for side in sides]
    assert (openers[0] & openers[1]).total() >= 0.9 * len(sides[0])
    marks = [sum(prompt.endswith("?") for prompt in side) for side in sides]
    assert abs(marks[0] - marks[1]) <= 0.05 * len(sides[0])


def test_over_refusal_prompts_come_in_twins() -> None:
    labels: dict[int, list[str]] = {}
    for row in rows("over_refusal"):
        assert set(row) == {"prompt", "label", "pair", "category"}
        labels.setdefault(row["pair"], []).append(row["label"])
    assert sorted(labels) == list(range(len(labels)))
    assert len(labels) >= 110
    assert all(sorted(pair) == ["safe", "unsafe"] for pair in labels.values())
    assert len(builtin("over_refusal_safe")) == len(builtin("over_refusal_unsafe")) == len(labels)
