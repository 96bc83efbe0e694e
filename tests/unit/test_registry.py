"""Modules of users' that do not import as they should: one line, and the process goes on."""

import pytest

from treepo_mcore import registry
from treepo_mcore.config import ConfigError, PruningConfig
from treepo_mcore.grow.pruning import make_pruner
from treepo_mcore.registry import import_function


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes one and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code, name=None):
        name = name or f"users_{abs(hash(code))}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "it ended its process with status 3"),
        ("import os; os._exit(0)", "it ended its process with status 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it ended its process by SIGKILL"),
        ("import time; time.sleep(60)", "it took longer than 1 s"),
        ("while True: pass", "it took longer than 1 s"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def g(view): pass", "AttributeError: "),
    ],
)
def test_what_happens_at_import_is_told_in_one_line(module, monkeypatch, code, words):
    monkeypatch.setattr(registry, "IMPORT_SECONDS", 1)
    name = f"{module(code)}:f"
    with pytest.raises(ConfigError) as caught:
        import_function("some.key", name, ("view",))
    assert str(caught.value).startswith(f"some.key: cannot import {name!r}: {words}")
    assert "\n" not in str(caught.value)


def test_a_module_that_talks_is_fine(module):
    name = module("import sys; print('x' * 10**6); sys.stderr.write('y' * 10**6)\ndef f(view): return view")
    assert import_function("some.key", f"{name}:f", ("view",))(3) == 3


def test_a_pruning_function_of_another_signature(module):
    name = module("def f(a, b): pass")
    with pytest.raises(ConfigError, match=r"rollout.tree.pruning.function: expected a function of \(view\), found"):
        make_pruner(PruningConfig(function=f"{name}:f"))
