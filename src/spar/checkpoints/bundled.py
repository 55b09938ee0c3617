"""The models that come with an installation, by name. No heavy library is imported here."""

from pathlib import Path

from spar.common.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT_MODEL = "spar"
BUNDLED_MODELS = {DEFAULT_MODEL: ASSETS / "weights", "dualtoken": ASSETS / "dualtoken"}


def is_bundled(path: str | Path) -> bool:
    """Whether a path is the name of a bundled model, and not that of a local folder with a model."""
    return str(path) in BUNDLED_MODELS and not (Path(path) / "config.json").exists()


def local_folder(path: Path) -> Path:
    """The path itself, or the folder of the bundled model that it names; `InputError` if the installation lacks it."""
    return bundled_folder(str(path)) if is_bundled(path) else path


def bundled_folder(name: str) -> Path:
    """The folder of a bundled model; `InputError` if this installation lacks it."""
    folder = BUNDLED_MODELS[name]
    if not (folder / "config.json").exists():
        raise InputError(f"this installation has no bundled model {name!r}; give a model folder, or train one")
    return folder
