"""Wheels of a few lines and a project of one module, so that an installation can be tried without a network."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

_BACKEND = """
import zipfile
from pathlib import Path

REQUIREMENTS = {requirements!r}
EXTRAS = {extras!r}


def _metadata():
    lines = ["Metadata-Version: 2.1", "Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {{requirement}}" for requirement in REQUIREMENTS]
    for extra, requirements in EXTRAS.items():
        lines.append(f"Provides-Extra: {{extra}}")
        lines += [f"Requires-Dist: {{requirement}}; extra == '{{extra}}'" for requirement in requirements]
    return "\\n".join(lines) + "\\n"


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as archive:
        archive.writestr("{module}.pth", str(Path(__file__).parent))
        archive.writestr("{module}-1.0.dist-info/METADATA", _metadata())
        archive.writestr("{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("{module}-1.0.dist-info/RECORD", "")
    return name


build_wheel = build_editable
"""


def make_wheel(folder: Path, name: str, version: str, requires: Sequence[str] = (), *, requires_python: str = ">=3.11") -> Path:
    """Writes a wheel that holds one module with a `__version__`, and returns its path."""
    module = name.replace("-", "_")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {requires_python}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    info = f"{module}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def make_project(folder: Path, name: str, requirements: Sequence[str], extras: dict[str, list[str]]) -> Path:
    """Writes a project that pip can install as an editable package without setuptools, and returns its folder."""
    folder.mkdir(parents=True)
    module = name.replace("-", "_")
    listed = "\n".join(f'{extra} = ["{required[0]}"]' for extra, required in extras.items())
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "{name}"\nversion = "1.0"\n[project.optional-dependencies]\n{listed}\n'
    )
    (folder / "backend.py").write_text(
        _BACKEND.format(requirements=list(requirements), extras=extras, name=name, module=module)
    )
    return folder
