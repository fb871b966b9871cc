"""Makes sure that a launcher runs in an environment that has the project's packages.

Each launcher imports this module first. When a launcher is started with a Python that lacks the packages, it goes on in
the project's `.venv`; if there is none, it says what to type. Python 3.6, the oldest that clusters still offer, can
read this file.
"""

import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("run_contract", "snakmodel", "pydantic", "rich", "submitit", "yaml")
"""The toolkit itself, and packages that every launcher imports."""


def enter(project: Path) -> None:
    """Return if the packages can be imported; otherwise replace this process by the project's own Python, or exit."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if sys.version_info >= (3, 10) and not missing:
        return
    own = project / ".venv"
    if (own / "bin" / "python").exists() and Path(sys.prefix).resolve() != own.resolve():
        os.execv(str(own / "bin" / "python"), [str(own / "bin" / "python"), *sys.argv])
    why = f"it lacks {', '.join(missing)}" if missing else "3.10 or newer is needed"
    sys.exit(
        f"error: this Python cannot run the launcher: {sys.executable} is Python {sys.version.split()[0]}, and {why}. "
        f"{own} is not complete either. Type `make setup` in {project} once, or use a Python that has the packages."
    )


enter(Path(__file__).resolve().parent.parent)
