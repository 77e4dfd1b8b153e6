from deme_core.recipe_reference import RECIPE_PAGE, recipe_reference, recipe_sections


def rows(path: str) -> dict[str, str]:
    """The rows of a section's table, by key."""
    section = recipe_reference().split(f"\n## `{path}`\n")[1].split("\n## ")[0]
    return {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}


def test_the_page_says_what_the_code_says() -> None:
    assert RECIPE_PAGE.read_text("utf-8") == recipe_reference(), "run `make docs`"


def test_every_key_has_one_row_in_its_section_or_in_that_of_what_it_shares() -> None:
    sections = recipe_sections()
    for model, path in sections.items():
        if path:
            shared = next((rows(sections[base]) for base in model.__bases__ if base in sections), {})
            assert sorted([*rows(path), *shared]) == sorted(model.model_fields), path
    page = recipe_reference()
    assert all(page.count(f"\n## `{path}`\n") == 1 for path in sections.values() if path)


def test_a_row_says_what_the_value_may_be_what_it_is_by_default_and_what_it_does() -> None:
    assert rows("finetune")["consistency_weight"] == (
        "| `consistency_weight` | number, at least 0 | `1.0` | Weight of the consistency loss (lambda). |"
    )
    values = {
        name: row.split(" | ")[1:3] for path in ("merge", "evaluate", "segments") for name, row in rows(path).items()
    }
    assert values["on_bad_expert"] == ["`drop`, `keep` or `fail`", "`drop`"]
    assert values["weights"] == ["list of numbers", "`null`"]
    assert values["regmean"] == ["keys of [`merge.regmean`](#mergeregmean)", "those of its keys"]
    assert values["drop_rate"] == ["number, at least 0, less than 1", "`0.5`"]
    assert values["seeds"] == ["list of whole numbers, at least 3 of them", "`[1, 2, 3]`"]
    assert values["num_images"] == ["whole number, at least 2", "**required**"]
    assert values["reference_dataset"] == ["keys of [`dataset`](#dataset)", "`null`"]
    assert values["count"] == ["whole number, at least 1", "`null`"]
    assert rows("pretrained.training")["learning_rate"].split(" | ")[2] == "`5.0e-05`"  # As PyYAML reads it.
