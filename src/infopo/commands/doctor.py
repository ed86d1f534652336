"""The command `doctor`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command."""
    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices, kernels, extras and stores, and why something does not work here",
        description="Shows what is installed, which devices and attention kernels work and why others do not, how code "
        "would be isolated, and where things are kept. Secrets are masked. Nothing is written.",
    )
    doctor.add_argument("--json", action="store_true", dest="as_json", help="one JSON object, for a script")
    doctor.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from infopo.workflows.doctor import doctor

    doctor(as_json=arguments.as_json)
