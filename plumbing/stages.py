"""The five stages as modules, for what builds on them."""

from importlib import import_module
from types import SimpleNamespace


def load_stages() -> SimpleNamespace:
    """The five stages as modules, for what builds on them: their names begin with digits."""
    names = {"data": "01_data", "tree": "02_label_tree", "model": "03_model", "train": "04_train", "eval": "05_eval"}
    return SimpleNamespace(**{name: import_module(file) for name, file in names.items()})
