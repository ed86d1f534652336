"""No secret reaches what a run writes or prints, whichever way it came in."""

import doctest
import os
from pathlib import Path

import pytest

from infopo import secrets
from infopo.build import build_arguments
from infopo.cli import main
from infopo.config import parse_recipe, to_yaml
from infopo.errors import DataError, RecipeError

TOKEN = "hf_" + "PlantedSecretToken" * 2
PASSWORD = "planted-pa55word"
RECIPE = """\
model: lab:policy
data: {path: pairs.jsonl, max_length: 64}
train: {per_device_train_batch_size: 4, max_steps: 1, save_steps: 1, save_strategy: steps, report_to: tensorboard,
        activation_checkpointing: false, use_cpu: true, disable_tqdm: true, logging_steps: 1,
        probe_size: 4, anchor_size: 2,
        anchor_tokens: 8, gradient_size: 1}
output_dir: run
"""


SECRET_VARIABLES = (
    "SOME_SERVICE_TOKEN", "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "OPENAI_KEY", "accessToken",
    "AZURE_STORAGE_CONNECTION_STRING", "AWS_SECRET_ACCESS_KEY", "GOOGLE_CREDENTIALS",
)  # fmt: skip


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"prompt": "{i}+1=?", "chosen": "{i + 1}", "rejected": "{i}"}}\n' for i in range(8))
    Path("pairs.jsonl").write_text(rows)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_doctests() -> None:
    assert doctest.testmod(secrets).failed == 0


def test_no_byte_of_a_run_directory_and_no_line_of_its_output_holds_a_secret(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TRACKER_API_KEY", PASSWORD)
    # A name in which nobody but the environment would know the secret.
    arguments = ["train", "recipe.yaml", f"train.hub_token={TOKEN}", f"train.run_name=run-{PASSWORD}"]
    monkeypatch.setattr("sys.argv", ["infopo", *arguments])
    assert main(arguments) == 0
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        assert TOKEN.encode() not in content, path
        if "events.out" not in path.name:  # which the tracker writes, of its own settings
            assert PASSWORD.encode() not in content, path
    assert not list(Path("run").rglob("training_args.bin"))
    assert "hub_token: '***'" in Path("run/recipe.yaml").read_text()
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err
    # The recipe is one still, and takes the token from the environment.
    assert main(["train", "run/recipe.yaml", "output_dir=again"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{PASSWORD}@host/data.jsonl",
        f"s3://key:{PASSWORD}@bucket/x",
        f"mlflow+http://{PASSWORD}aaaa@host/",
        f"https://host/x.jsonl?token={PASSWORD}&n=1",
        f"https://host/x.jsonl?X-Amz-Signature={PASSWORD}",
        f"https://host/x?api_key={PASSWORD}#top",
        f"postgresql://me:{PASSWORD}@db:5432/runs",
        f"https://user:p@{PASSWORD}@host/data.jsonl",
        f"redis://:{PASSWORD}@host",
        f"https://host/ Authorization: Bearer {PASSWORD}.eyJhbGciOi==",
    ],
)
def test_urls_keep_their_place_and_lose_their_secrets(text: str) -> None:
    masked = secrets.masked(text)
    assert PASSWORD not in masked
    assert secrets.MASK in masked
    assert masked.partition("://")[0] == text.partition("://")[0]


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a?page=2",
        "user@host:/data",
        "a = b@c",
        "see https://x.org/a_b",
        "sk-learn",
        "the bearer instruments",
        "http://host:80/x?to=me@home",
        "hf_hub",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secrets.masked(text) == text


def test_settings_lose_secrets_in_their_keys_and_values_at_any_depth() -> None:
    url = f"https://user:{PASSWORD}@host/x"
    tree = {"data": [{url: (url, {"hub_token": "short", "pad_token": "<pad>"})}], "names": {"a": 1}}
    assert secrets.masked_tree(tree) == {
        "data": [{"https://***@host/x": ["https://***@host/x", {"hub_token": "***", "pad_token": "<pad>"}]}],
        "names": {"a": 1},
    }


def test_errors_mask_what_they_quote(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"https://user:{PASSWORD}@host/data.jsonl"
    assert main(["train", "recipe.yaml", f"data={url}"]) == 2
    error = capsys.readouterr().err
    assert PASSWORD not in error
    assert "https://***@host/data.jsonl" in error
    for shown in (RecipeError(f"data: {url}"), DataError("no such file", url)):
        assert PASSWORD not in str(shown)


@pytest.mark.parametrize("override", [f"train.hub_token=[{TOKEN}", f"train.hub_token={{a: {TOKEN}}}"])
def test_a_secret_that_is_no_setting_is_masked_in_its_refusal(
    work: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert main(["check", "recipe.yaml", override]) == 2
    assert TOKEN not in capsys.readouterr().err


def test_a_masked_recipe_leaves_the_token_to_the_environment() -> None:
    recipe = parse_recipe(f"{RECIPE}", source="r", overrides=[f"train.hub_token={TOKEN}"])
    assert build_arguments(recipe).hub_token == TOKEN
    again = parse_recipe(to_yaml(recipe), source="r")
    assert again.train["hub_token"] == secrets.MASK
    assert build_arguments(again).hub_token is None


def test_values_of_secret_variables_are_found_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "a")
    for name in SECRET_VARIABLES:
        with monkeypatch.context() as one:
            one.setenv(name, PASSWORD)
            assert secrets.masked(f"failed with {PASSWORD} at host") == "failed with *** at host", name
    monkeypatch.setenv("PWD", PASSWORD)  # the working directory
    assert secrets.masked(PASSWORD) == PASSWORD
    monkeypatch.setenv("SOME_SERVICE_TOKEN", PASSWORD)
    assert secrets.masked(f"failed with {PASSWORD} at host") == "failed with *** at host"
    assert os.environ["SHORT_TOKEN"] in secrets.masked("a short value is in every text")
