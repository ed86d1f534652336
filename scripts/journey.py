"""Goes the way of a new user on each Python that is there: an empty environment, the built wheel, the commands of the
documents.

`make journey` runs it. The first command that fails, or prints a traceback or a warning of Python's, ends it, with what
it printed. Packages are the newest that the index has, as a user gets them. `PIP_CONSTRAINT=$PWD/constraints.txt make
journey` takes those that the tests run with.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
TYPED = "12+5-3=?\n"
"""What somebody types who talks with a model."""

FIRST = """
infopo --version
infopo doctor
infopo docs
infopo docs data
infopo completion bash > completion
infopo objectives infopo
"""

DEMO = "infopo demo"

MORE = """
infopo init asked.yaml --model lab:policy --data pairs.jsonl --method lora --output-dir runs/lora
infopo train asked.yaml train.max_steps=2
infopo export runs/lora --output merged
infopo generate runs/lora --prompt "12+5-3=?"
infopo reference --list
infopo recipes lab > lab.yaml
infopo check lab.yaml
infopo sweep lab.yaml data.limit=32 train.max_steps=2 output_dir=runs/sweep sweep.objective=[infopo,dpo]
infopo recipes rounds > rounds.yaml
infopo rounds rounds.yaml rounds.number=1 rounds.prompts_per_round=48 train.max_steps=2 evaluate.limit=50
printf 'model_name_or_path: lab:policy\\ndataset_name: pairs.jsonl\\nlearning_rate: 1.0e-6\\nbeta: 0.1\\n' > dpo.yaml
infopo convert-recipe dpo.yaml --output converted.yaml
infopo check converted.yaml
"""
"""Commands of other pages than the tutorial, with fewer rows and steps."""

COMMANDS = (FIRST, DEMO, MORE)

ANSWER = """
asked = [{"role": "user", "content": "12+5-3=?"}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
"""


class StepFailedError(Exception):
    """A command that failed, with what it printed."""


def interpreter(version: str) -> str | None:
    """Returns the Python of a version that is found by name or among pyenv's, or None."""
    kept = Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    for found in [*map(str, sorted(kept)), shutil.which(f"python{version}")]:
        says = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = found and subprocess.run([found, "-c", says], capture_output=True, text=True, check=False)
        if done and done.stdout.strip() == version:
            return found
    return None


def blocks(page: str, language: str) -> list[str]:
    """Returns the code of a language on a page of the documents."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Returns the commands of a shell block, a line each."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


class Traveller:
    """Somebody with an environment and a folder of their own.

    Args:
        base: A folder for the environment, caches and results.
        python: The interpreter.
    """

    def __init__(self, base: Path, python: str) -> None:
        self.folder = base / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        left_out = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONWARNINGS"}
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in left_out},
            "PATH": f"{base / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "INFOPO_CACHE": str(base / "cache"),
            "HF_HOME": str(base / "hub"),
        }
        self.run(f"'{python}' -m venv '{base / 'venv'}'")

    def run(self, command: str) -> str:
        """Runs a line of shell in the folder, and returns what it printed.

        Raises:
            StepFailedError: It failed, or printed a traceback or a warning.
        """
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            input=TYPED,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        bad = re.search(r"^Traceback|\b\w+Warning: ", done.stdout, flags=re.MULTILINE)
        if done.returncode or bad:
            why = f"exit status {done.returncode}" if done.returncode else f"it printed {bad[0]!r}"
            raise StepFailedError(f"{command}\n{done.stdout}\n{why}")
        print(f"  {time.monotonic() - begin:4.0f} s  {command}", flush=True)
        return done.stdout


def journey(traveller: Traveller, wheel: Path, *, demo: bool) -> None:
    """Installs the wheel as README says, and runs the commands.

    Raises:
        StepFailedError: The first that failed.
    """
    install = next(
        line for block in blocks("README.md", "bash") for line in commands_of(block) if "'infopo[" in line
    )
    extras = re.search(r"'infopo(\[.*?\])'", install)[1]
    traveller.run("pip install --quiet torch")
    traveller.run(f"pip install --quiet '{wheel}{extras}'")
    for command in [*commands_of(FIRST), *([DEMO] if demo else [])]:
        traveller.run(command)
    trained = ""
    for block in blocks("docs/tutorial.md", "bash"):
        for command in commands_of(block):
            printed = traveller.run(command)
            trained = printed if command.startswith("infopo train") else trained
    suggested = re.findall(r"^  (infopo .*)$", trained.partition("\nnext:\n")[2], flags=re.MULTILINE)
    if len(suggested) != 3:
        raise StepFailedError(f"infopo train\n{trained}\nit suggests {len(suggested)} commands, not 3")
    for command in suggested:
        traveller.run(command)
    load = next(block for block in blocks("docs/after-training.md", "python") if "from_pretrained" in block)
    (traveller.folder / "load.py").write_text(load + ANSWER, encoding="utf-8")
    if "Answer:" not in (said := traveller.run("python -W error::DeprecationWarning:__main__ load.py")):
        raise StepFailedError(f"load.py\n{said}\nthe exported model does not answer")
    for command in commands_of(MORE):
        traveller.run(command)


def main() -> int:
    """Runs the journey on each interpreter, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--versions", nargs="+", default=VERSIONS, metavar="3.N", help="default: all that are there"
    )
    parser.add_argument(
        "--demo", choices=["none", "once", "each"], default="once", help="default: on the newest Python"
    )
    arguments = parser.parse_args()
    found = {version: python for version in arguments.versions if (python := interpreter(version))}
    for version in arguments.versions:
        if version not in found:
            print(f"Python {version} is not here")
    if not found:
        return 1
    with tempfile.TemporaryDirectory() as base:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", base, str(ROOT)]
        subprocess.run(build, check=True)
        (wheel,) = Path(base).glob("*.whl")
        for version in reversed(found):
            print(f"== Python {version}", flush=True)
            demo = arguments.demo == "each" or (arguments.demo == "once" and version == [*found][-1])
            try:
                journey(Traveller(Path(base) / version, found[version]), wheel, demo=demo)
            except StepFailedError as failure:
                print(f"Python {version}: {failure}", file=sys.stderr)
                return 1
            shutil.rmtree(Path(base) / version)
    return 0


if __name__ == "__main__":
    sys.exit(main())
