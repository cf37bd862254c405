"""The five stages as modules, for what builds on them."""

from importlib import import_module
from types import SimpleNamespace


def load_stages() -> SimpleNamespace:
    """The five stages as modules, for what builds on them: their names begin with digits."""
    return SimpleNamespace(
        data=import_module("01_data"),
        tree=import_module("02_label_tree"),
        model=import_module("03_model"),
        train=import_module("04_train"),
        eval=import_module("05_eval"),
    )
