import json
from pathlib import Path

import pytest

from deme_core.errors import InputError, PromptsError
from deme_core.prompts import load_prompts
from deme_core.recipe import EvaluateSpec
from tests.unit.test_recipe_file import SECRET_ADDRESSES

PARTI_PROMPTS = Path(__file__).parents[3] / "shared/data/parti-prompts/PartiPrompts.tsv"


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_a_text_file_holds_one_prompt_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "\ufeffa red cube\r\n\n  a cat, asleep \nfirst\u2028second\n")
    prompts = load_prompts(path, tmp_path)
    assert prompts.texts == ("a red cube", "a cat, asleep", "first\u2028second")
    assert prompts.columns == {}


def test_image_i_has_prompt_i_modulo_their_number(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path / "prompts.txt", "a\nb\nc\n"), tmp_path)
    assert prompts.of_images(range(7)) == ["a", "b", "c", "a", "b", "c", "a"]
    assert prompts.of_images(range(5, 8)) == ["c", "a", "b"]


def test_a_table_keeps_its_other_columns(tmp_path: Path) -> None:
    tsv = write(tmp_path / "p.tsv", 'Prompt\tCategory\n"HI" on a wall\tArts\na, b\tAnimals\n')
    csv = write(tmp_path / "p.csv", 'Category,caption\r\nArts,"""HI"" on a wall"\r\nAnimals,"a, b"\r\n')
    for path in (tsv, csv):
        prompts = load_prompts(path, tmp_path)
        assert prompts.texts == ('"HI" on a wall', "a, b")
        assert prompts.columns == {"Category": ("Arts", "Animals")}


@pytest.mark.skipif(not PARTI_PROMPTS.is_file(), reason="needs ../shared/data/parti-prompts")
def test_parti_prompts_are_read_whole(tmp_path: Path) -> None:
    prompts = load_prompts(str(PARTI_PROMPTS), tmp_path)
    assert len(prompts.texts) == 1632
    assert prompts.texts[:2] == ("bond", "element")
    assert [text for text in prompts.texts if text.startswith('"G I G G L E" painted')]
    assert list(prompts.columns) == ["Category", "Challenge", "Note"]
    assert len(set(prompts.columns["Category"])) == 12
    assert len(set(prompts.columns["Challenge"])) == 11


def test_json_holds_a_list_or_the_captions_of_coco_by_their_ids(tmp_path: Path) -> None:
    def texts(name: str, content: str) -> tuple[str, ...]:
        return load_prompts(write(tmp_path / name, content), tmp_path).texts

    assert texts("p.json", '\ufeff["a cat", " a\\n dog "]') == ("a cat", "a dog")
    annotations = [{"id": 9, "image_id": 1, "caption": "last"}, {"id": 3, "image_id": 2, "caption": "A cat.\n"}]
    coco = {"info": {}, "images": [], "annotations": annotations}
    assert texts("captions_val2014.JSON", json.dumps(coco)) == ("A cat.", "last")
    for key in ("text", "caption", "prompt", "Prompt"):  # The last is PartiPrompts'.
        assert texts("m.jsonl", f'{{"file_name": "0.jpg", "{key}": "a\u2028b"}}\r\n\n{{"{key}": "c"}}') == ("a b", "c")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", "a cat"),
        ("p.json", '"a cat"'),
        ("p.json", '["a cat", 7]'),
        ("p.json", "7"),
        ("p.json", '{"a cat": "Animals"}'),
        ("p.json", '{"annotations": [{"id": 1, "bbox": []}]}'),
        ("p.json", '{"annotations": [{"id": 1, "caption": "a"}, {"id": "2", "caption": "b"}]}'),
        ("p.json", '["half \\ud83d"]'),
        ("p.json", "[" * 100_000),
        ("p.jsonl", '{"file_name": "0.jpg"}'),
        ("p.jsonl", '{"text": "a", "prompt": "b"}'),
        ("p.jsonl", '{"prompt": "a", "Prompt": "b"}'),
        ("p.jsonl", '{"text": ["a", "b"]}'),
        ("p.jsonl", '"text"'),
    ],
)
def test_other_json_is_refused_with_what_is_taken(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=r"is JSON of a form that holds no prompts; set evaluate\.prompts to"):
        load_prompts(write(tmp_path / name, text), tmp_path)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    def digest(name: str, text: str) -> str:
        return load_prompts(write(tmp_path / name, text), tmp_path).digest

    first = digest("a.txt", "a\nb\n")
    assert digest("b.txt", "a\r\nb") == first
    assert digest("c.csv", "prompt\na\nb\n") == first
    assert digest("c.json", '["a", "b"]') == first
    others = [
        digest("d.txt", "b\na\n"),
        digest("e.txt", "a\nb\na\n"),
        digest("f.csv", "prompt,Category\na,X\nb,X\n"),
        digest("g.csv", "prompt,Category\na,X\nb,Y\n"),
    ]
    assert len({first, *others}) == 5


def test_a_file_uri_may_have_spaces(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "my prompts.tsv"
    path.parent.mkdir()
    write(path, "Prompt\tCategory\na\tX\n")
    assert load_prompts(path.as_uri(), tmp_path / "cache") == load_prompts(str(path), tmp_path / "cache")


def test_prompts_of_an_object_store_are_read_anew_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "store" / "lists" / "p.txt"
    path.parent.mkdir(parents=True)
    write(path, "a\nb\n")
    write(path.with_name("p.txt.bak"), "old\n")
    uri = f"{(tmp_path / 'store').as_uri()}/lists/p.txt"
    assert load_prompts(uri, tmp_path / "cache").texts == ("a", "b")
    write(path, "a\nb\nc\n")
    assert load_prompts(uri, tmp_path / "cache").texts == ("a", "b", "c")
    with pytest.raises(PromptsError, match=r"no prompts at .*/lists/q\.txt; set evaluate\.prompts"):
        load_prompts(uri.replace("p.txt", "q.txt"), tmp_path / "cache")


@pytest.mark.parametrize("uri", ["ftp://hush/p.txt", *SECRET_ADDRESSES])
def test_another_address_is_refused_without_repeating_it(uri: str, tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="cannot be had") as caught:
        load_prompts(uri, tmp_path)
    assert "hush" not in str(caught.value)


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path: Path) -> None:
    for name in ("a" * 300, "~nosuchuser/prompts.txt"):
        with pytest.raises(InputError, match="Cannot look for"):
            load_prompts(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", r"There are no prompts in .*p\.txt"),
        ("p.tsv", "Prompt\tCategory\n", r"There are no prompts in .*p\.tsv"),
        ("p.csv", "", "must name its columns once each"),
        ("p.csv", "text,Category\na,X\n", "'text, Category'"),
        ("p.csv", "prompt,caption\na,b\n", "'prompt, caption'"),
        ("p.csv", "prompt,X,X\na,b,c\n", "'prompt, X, X'"),
        ("p.tsv", "Prompt\tCategory\na\tX\nb\n", r"Prompt 2 of .*p\.tsv has 1 fields for 2 columns"),
        ("p.tsv", "Prompt\tCategory\n\tX\n", r"Prompt 1 of .*p\.tsv is empty"),
        ("p.json", "[]", r"There are no prompts in .*p\.json"),
        ("p.json", '["a", " "]', r"Prompt 2 of .*p\.json is empty"),
        ("p.csv", 'prompt\n"a\nb\n', "no CSV file"),
    ],
)
def test_what_is_no_list_of_prompts_is_one_sentence(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(PromptsError, match=message) as error:
        load_prompts(path, tmp_path)
    assert isinstance(error.value, InputError)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=r"absent\.txt cannot be read \(No such file or directory\)"):
        load_prompts(str(tmp_path / "absent.txt"), tmp_path)
    (tmp_path / "image.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(PromptsError, match="no UTF-8 text") as error:
        load_prompts(str(tmp_path / "image.txt"), tmp_path)
    for form in ("a text file", ".tsv", ".csv", ".json file with a list of texts", "COCO's captions", ".jsonl"):
        assert form in str(error.value)


def test_prompts_change_settings_only_where_they_are_given() -> None:
    assert "prompts" not in EvaluateSpec(num_images=2).model_dump(mode="json")
    given = EvaluateSpec(num_images=2, prompts="p.txt")
    assert EvaluateSpec.model_validate(given.model_dump(mode="json")) == given


def test_the_classes_of_imagenet_are_prompts_by_name(tmp_path: Path) -> None:
    prompts = load_prompts("imagenet1k", tmp_path)
    assert len(prompts.texts) == 1000
    assert prompts.texts[0] == "a photo of a tench"
    assert prompts.texts[999] == "a photo of a toilet tissue"
    assert {"a photo of a maillot", "a photo of a maillot, tank suit"} <= set(prompts.texts)
    # WordNet calls both crane and nothing else.
    assert (prompts.texts[134], prompts.texts[517]) == ("a photo of a crane bird", "a photo of a construction crane")
    assert len(set(prompts.texts)) == 1000
    assert prompts.of_images([1000]) == ["a photo of a tench"]
