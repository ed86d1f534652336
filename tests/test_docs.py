"""Documentation and code name the same things."""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import recipe_tables
from infopo import catalog, config, estimators, settings
from infopo.arguments import InfoPOConfig
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.registry import FUNCTIONS
from infopo.validation import YAML, setting

ROOT = Path(__file__).parents[1]
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
EQUATIONS = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")


def section_of(heading: str) -> str:
    """Text under a heading of the page on recipes, up to the next heading."""
    return re.split(r"^##", RECIPES.split(f"# `{heading}`\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def in_yaml(default: object) -> str:
    return config.dump_tree({"value": default}).partition(":")[2].strip()


def test_tables_of_the_page_on_recipes_are_written_from_the_settings():
    assert set(re.findall(r"<!-- settings of (.*) -->", RECIPES)) == recipe_tables.TABLES.keys()
    for name in recipe_tables.PAGES:
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert recipe_tables.with_tables(page) == page, f"{name}: run `make docs`"


def test_a_new_setting_is_one_edit():
    """A field is enough for the recipe, for its judgement, and for the table."""

    @dataclass
    class More(settings.TrainSettings):
        patience: settings.Positive = setting(3, "Steps to wait.")

    assert More().patience == 3
    assert More.wrong_values({"patience": 0}, YAML) == [("patience", "expected a value >= 1, got 0")]
    assert "| `patience` | `3` | Steps to wait. |" in recipe_tables.table(More)


def test_settings_of_rows_and_of_training_are_those_of_the_trainer():
    """With their defaults: what a script leaves out is what a recipe leaves out."""
    ours = {f.name: f.default for f in fields(InfoPOConfig)}
    for section in (*config.SECTIONS.values(), settings.TrainSettings):
        for name, argument in settings.arguments_of(section).items():
            assert ours[argument] == section.defaults()[name]


def test_page_on_recipes_has_every_top_level_key():
    for field in fields(config.Recipe):
        # `places` says where each key stands in the file, and is no key itself.
        assert field.name == "places" or f"\n## `{field.name}`\n" in RECIPES


def test_page_on_recipes_names_every_objective_with_its_parameters_and_defaults():
    for name, objective in OBJECTIVES.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", section_of("objective"), flags=re.MULTILINE)
        assert re.findall(r"`(\w+)` (\S+?)(?:,| |$)", row) == [
            (key, in_yaml(parameter.default)) for key, parameter in objective.parameters.items()
        ]


def test_page_on_recipes_names_every_choice():
    choices = (*settings.DTYPES, *catalog.ON_BAD_ROW, *catalog.REFERENCE_MODES, *catalog.REFERENCE_SIDES)
    assert [choice for choice in choices if f"`{choice}`" not in RECIPES] == []


def test_examples_on_the_page_are_sound_recipes():
    example, *sections = re.findall(r"```yaml\n(.*?)```", RECIPES, flags=re.DOTALL)
    overrides = re.findall(r"infopo train recipe.yaml (.*)", RECIPES)[0].split()
    config.parse_recipe(example, source="docs/recipes.md", overrides=overrides)
    for section in sections:
        whole = f"model: sft\ndata: pairs.jsonl\noutput_dir: run\n{section}"
        config.parse_recipe(whole, source="docs/recipes.md", overrides=["objective.1.weight=0.5"])


def test_every_objective_has_its_row_of_equations():
    assert [name for name in FUNCTIONS if f"| `{name}` |" not in EQUATIONS] == []


def test_every_estimator_has_its_row_of_equations():
    own = [n for n, f in vars(estimators).items() if getattr(f, "__module__", "") == estimators.__name__]
    public = [
        n for n in own if n[0].islower() and not n.startswith(("power", "interpolated_", "log_mixture"))
    ]
    assert len(public) > 9
    assert [
        name for name in public if f"| `{name}` |" not in EQUATIONS.split("## Bounds on their own")[1]
    ] == []


def test_a_new_objective_is_one_edit():
    """Its declaration is enough for the three tables, and each row is the catalog's."""
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"^\| `\w+` \| ", line)]
    catalog_rows = [
        [f"`{n}`", o.title, o.bound or "-", o.needs, o.when, o.source] for n, o in OBJECTIVES.items()
    ]
    assert rows[: len(OBJECTIVES)] == catalog_rows
    assert all(o.when for o in OBJECTIVES.values())
    without = re.sub(r"\| [^\n]* \| `dpo` \|[^\n]*\n", "", EQUATIONS)
    assert "| `dpo` |" not in without
    assert "| `dpo` | `test_losses.py::test_golden_values` |" in recipe_tables.with_tables(without)


def test_every_test_named_beside_an_equation_exists():
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", EQUATIONS)
    assert named
    missing = [
        f"{file}::{test}"
        for file, test in named
        if f"def {test}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def test_every_module_has_its_line_in_the_design():
    modules = {
        f"{path.stem}/" if path.is_dir() else path.name
        for path in (ROOT / "src" / "infopo").iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert [module for module in sorted(modules) if f"\n  {module} " not in DESIGN] == []


def test_the_design_names_no_file_that_does_not_exist():
    """Paths are relative to the repository or to the package; in the layout, a folder's files stand beneath it."""
    layout = DESIGN.split("```text\n")[1].split("```")[0]
    folder, paths = "", []
    for indent, name in re.findall(r"^( +)([\w./]+)  ", layout, re.MULTILINE):
        folder = name if len(indent) == 2 else folder
        paths.append(name if len(indent) == 2 else folder + name)
    paths += re.findall(r"`([\w./]+(?:\.py|\.md|/))`", DESIGN.replace("`utils.py`", ""))
    assert len(paths) > 60
    assert [
        path for path in paths if not ((ROOT / path).exists() or (ROOT / "src/infopo" / path).exists())
    ] == []


def test_the_layers_of_the_design_are_those_of_the_import_contract():
    with (ROOT / "pyproject.toml").open("rb") as file:
        layers = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = DESIGN.split("may not import each other:\n\n```text\n")[1].split("\n```")[0]
    assert shown.splitlines() == [re.sub(r"[()]", "", layer) for layer in layers]


def named_in_code(text: str) -> list[str]:
    """Names of Python in backticks, without files and without what is written in a recipe or a shell."""
    spans = re.findall(r"`([A-Za-z_][\w.]*)`", text)
    return [name for name in spans if not re.search(r"\.(py|md|json|jsonl|yaml|zst|pt)$", name)]


def test_the_design_names_nothing_that_the_source_does_not_have():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    names = named_in_code(re.sub(r"```.*?```", "", DESIGN, flags=re.DOTALL))
    assert len(names) > 40
    modules = {path.stem for path in (ROOT / "src").rglob("*.py")} | {
        path.name for path in (ROOT / "src").rglob("*") if path.is_dir()
    }
    assert [n for n in names if not set(n.split(".")) <= words | modules] == []


def test_what_a_newcomer_looks_for_stands_in_the_file_that_the_design_names():
    """Of each row of the table, every name is defined in one of the files that stand beside it."""
    rows = DESIGN.split("| to find out | read |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) > 8
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row)
        text = "".join((ROOT / "src" / "infopo" / file).read_text(encoding="utf-8") for file in files)
        names = [part for name in named_in_code(row.split("|")[2]) for part in name.split(".")]
        of_python = [n for n in names if n not in ("transformers", "TRL", "torch_compile")]
        assert [n for n in of_python if not re.search(rf"\b{n}\b", text)] == [], row
