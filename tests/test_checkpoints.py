"""What is written at the end of a run replaces what stood there, whatever kind of artefact it is."""

from pathlib import Path

from transformers import TrainingArguments

from infopo.checkpoints import staged_files


def save(directory: Path, files: dict[str, str]) -> None:
    args = TrainingArguments(output_dir=str(directory), use_cpu=True)
    with staged_files(directory, args, lambda: None) as staging:
        for name, text in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text(text)


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_a_second_save_replaces_folders_as_it_replaces_files(tmp_path: Path) -> None:
    """Chat templates and further adapters are folders; a stale file of the first save must not be left in them."""
    save(tmp_path, {"model": "1", "templates/a": "1", "templates/b": "1", "kept": "1"})
    save(tmp_path, {"model": "2", "templates/a": "2"})
    assert contents(tmp_path) == {"model": "2", "templates/a": "2", "kept": "1"}


def test_a_folder_may_take_the_place_of_a_file_and_the_other_way_round(tmp_path: Path) -> None:
    save(tmp_path, {"one": "file", "two/a": "folder"})
    save(tmp_path, {"one/a": "folder", "two": "file"})
    assert contents(tmp_path) == {"one/a": "folder", "two": "file"}
