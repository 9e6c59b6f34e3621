"""Where the installed plugin and its YAML recipes are."""

from pathlib import Path
from typing import Optional

_PACKAGE = Path(__file__).resolve().parent


def user_dir() -> Path:
    """Absolute directory of the package: the value of fairseq's `common.user_dir`.

    Absolute because hydra changes the working directory before fairseq reads the value.
    """
    return _PACKAGE


def config_dir(group: Optional[str] = None) -> Path:
    """Absolute directory of the recipes, or of one group of them (`pretraining`, `finetuning`, ...).

    An installed wheel carries its own copy; a checkout uses its top-level `config` folder.
    Raises FileNotFoundError where neither exists, ValueError for a group that does not.
    """
    packaged, checkout = _PACKAGE / "config", _PACKAGE.parent / "config"
    # `site-packages/config` may belong to somebody else, a folder beside our setup.py does not
    is_checkout = checkout.is_dir() and (_PACKAGE.parent / "setup.py").is_file()
    if not packaged.is_dir() and not is_checkout:
        raise FileNotFoundError(
            f"no recipes found: expected {packaged} (installed package) or {checkout} (checkout). "
            "Install the package again, or point --config-dir at a copy of the repository's config folder"
        )
    root = packaged if packaged.is_dir() else checkout
    if group is None:
        return root
    groups = sorted(path.name for path in root.iterdir() if path.is_dir())
    if group not in groups:
        raise ValueError(f"no group {group!r} in {root}: expected one of {', '.join(groups)}")
    return root / group
